"""The gradients by formula, in float64, against autograd through the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from retention_cases import (
    CHUNK,
    PopCase,
    RetentionCase,
    assert_same_gradients,
    gradients,
    normal,
)
from torch import Tensor

from retpop.ops.powers import DecayPowers
from retpop.ops.rows import PopSpec
from retpop.ops.torch_backend import Form, eager, packed


def weights_of(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of the results that `gradients` takes."""
    return tuple(normal(*result.shape, seed=7 + i) for i, result in enumerate(results))


def by_formula(form: Form, case: RetentionCase | PopCase, grads: tuple[Tensor, ...]) -> list[Tensor]:
    """All gradients of the form's inputs, the decay's last."""
    *tokens, state = replace(case, log_decay=case.log_decay.detach()).leaves()
    with torch.no_grad():
        *_, states = form.forward(tokens, state, keep=True)
        *found, decay, grad_state = form.gradients(tokens, grads, states, [True] * (len(tokens) + 2))
        return [*found, grad_state, decay]


def powers_of(case: RetentionCase | PopCase) -> DecayPowers:
    return DecayPowers(case.log_decay.detach(), case.q.shape[-1] ** -0.5, torch.float64)


@pytest.mark.parametrize("T", [0, 1, 7, 16, 37, 48])
@pytest.mark.parametrize("seed", [0, 1])
def test_retention(T: int, seed: int) -> None:
    case = RetentionCase.make(2, T, 3, 4, 5, seed=seed).for_gradients(decay=True)
    results = case.run(backend="reference")
    actual = by_formula(eager.Chunks(powers_of(case), CHUNK, torch.float64), case, weights_of(results))
    assert_same_gradients(actual, gradients(results, case.leaves()), 1e-12)


@pytest.mark.parametrize("bounds", [[0, 5, 5, 22, 70], [0, 0, 2], [0, 40], [0, 16, 32, 33]], ids=str)
def test_packed_retention(bounds: list[int]) -> None:
    cu_seqlens = torch.tensor(bounds)
    case = RetentionCase.make(1, bounds[-1], 3, 4, 5, seed=1, sequences=len(bounds) - 1)
    case = case.for_gradients(decay=True)
    results = case.run(backend="reference", cu_seqlens=cu_seqlens)
    plan = packed.Packing("here", cu_seqlens, bounds[-1]).plan(CHUNK)
    actual = by_formula(packed.Chunks(powers_of(case), plan, torch.float64), case, weights_of(results))
    assert_same_gradients(actual, gradients(results, case.leaves()), 1e-12)


@pytest.mark.parametrize(
    ("N", "L", "P", "M", "offset", "with_reset"),
    [
        (3, 4, 3, 2, 0, True),
        (3, 4, 2, 5, 2, True),
        (3, 1, 4, 2, 0, True),
        (2, 3, 0, 2, 1, True),
        (2, 3, 2, 0, 1, False),
        (1, 5, 1, 4, 1, False),
        (0, 3, 1, 4, 0, False),
        (0, 3, 0, 0, 0, False),
    ],
)
def test_pop(N: int, L: int, P: int, M: int, offset: int, with_reset: bool) -> None:
    case = PopCase.make(2, N, L, P, M, 3, 4, 5, offset=offset, with_reset=with_reset, seed=2)
    case = case.for_gradients(decay=True)
    results = case.run(backend="reference")
    spec = PopSpec(powers_of(case), (P, M), L, offset, case.reset)
    actual = by_formula(eager.Pop(spec), case, weights_of(results))
    assert_same_gradients(actual, gradients(results, case.leaves()), 1e-12)


def test_a_nan_does_not_cross_a_reset_backwards() -> None:
    """The new episode's gradients are NaN; those of the one before it are as if it were not there."""
    case = PopCase.make(1, 3, 2, 0, 0, 2, 3, 4)
    reset = torch.tensor([[False, False, True]])
    spec = PopSpec(powers_of(case), (0, 0), 2, 0, reset)
    grads = normal(1, 6, 2, 4, seed=1), case.v_pred
    grads[0][:, 4:] = torch.nan
    *found, grad_state, _ = by_formula(eager.Pop(spec), case, (*grads, normal(1, 2, 3, 4, seed=2)))
    for grad in found[:3]:
        assert grad[:, 4:].isnan().any()
        assert grad[:, :4].isfinite().all()
    assert grad_state.isfinite().all()
