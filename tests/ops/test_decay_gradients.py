"""Gradients of ln γ in the torch backend: every mode and form against autograd through the reference.

`test_triton_backend` has those of the kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from retention_cases import (
    MODES,
    PopCase,
    RetentionCase,
    assert_same_gradients,
    gradients,
    mode_options,
    normal,
)
from torch import Tensor

import retpop
from retpop.ops.powers import DecayPowers

BOUNDS = {"cu_seqlens": torch.tensor([0, 5, 5, 22, 39])}
RESET = {"reset": torch.arange(2 * 37).view(2, 37) % 23 == 3}

CASES: dict[str, tuple[RetentionCase | PopCase, dict[str, object]]] = {
    **{mode: (RetentionCase.make(2, 37, 6, 4, 5), mode_options(mode)) for mode in MODES},
    **{
        f"{mode}, packed": (RetentionCase.make(1, 39, 6, 4, 5, sequences=4), BOUNDS | mode_options(mode))
        for mode in MODES
    },
    "resets": (RetentionCase.make(2, 37, 6, 4, 5), RESET | mode_options("chunkwise")),
    "without a state": (RetentionCase.make(2, 37, 6, 4, 5, with_state=False), mode_options("chunkwise")),
    "one token": (RetentionCase.make(2, 1, 6, 4, 5), {}),
    "no token": (RetentionCase.make(2, 0, 6, 4, 5), {}),
    "POP": (PopCase.make(2, 3, 4, 3, 2, 6, 4, 5, offset=1, with_reset=True, seed=2), {}),
    "POP, predictions only": (PopCase.make(2, 0, 4, 1, 3, 6, 4, 5), {}),
}


def by_reference(case: RetentionCase | PopCase, options: dict[str, object]) -> tuple[Tensor, ...]:
    cuts = {name: options[name] for name in options.keys() & {"cu_seqlens", "reset"}}
    return case.run(backend="reference", **cuts)


@pytest.mark.parametrize("name", CASES)
def test_torch_backend(name: str) -> None:
    case, options = CASES[name]
    case = case.for_gradients(decay=True)
    expected = gradients(by_reference(case, options), case.leaves())
    assert_same_gradients(gradients(case.run(**options), case.leaves()), expected, 1e-12)


@pytest.mark.parametrize("name", ["chunkwise", "chunkwise, packed", "POP"])
def test_of_the_decay_alone(name: str) -> None:
    """Gradients of queries and keys are computed for it, and not returned."""
    case, options = CASES[name]
    case = replace(case, log_decay=case.log_decay.clone().requires_grad_())
    whole = case.for_gradients(decay=True)
    expected = gradients(whole.run(**options), whole.leaves())[-1]
    assert_same_gradients(gradients(case.run(**options), [case.log_decay]), [expected], 1e-12)


@pytest.mark.parametrize("name", ["parallel", "chunkwise", "chunkwise, packed", "resets", "one token", "POP"])
def test_second_derivatives(name: str) -> None:
    case, options = CASES[name]
    case = case.for_gradients(decay=True)
    penalties = []
    for results in (by_reference(case, options), case.run(**options)):
        first = gradients(results, case.leaves(), create_graph=True)
        penalties.append(gradients([sum((x**2).sum() for x in first).view(1)], case.leaves()))
    assert_same_gradients(penalties[1], penalties[0], 1e-10)


@pytest.mark.parametrize("name", ["chunkwise", "POP"])
def test_forward_mode(name: str) -> None:
    """With the finite γ alone: the derivative of γ = 0 is 0, and a tangent of -inf is not its."""
    case, options = CASES[name]
    log_decay = torch.tensor([-2.0, -0.5, -0.1, -0.03, -0.01, 0.0], dtype=torch.float64)
    tangent = normal(6, seed=3)

    def along(**options: object) -> tuple[Tensor, ...]:
        def run(log_decay: Tensor) -> tuple[Tensor, ...]:
            return replace(case, log_decay=log_decay).run(**options)

        return torch.func.jvp(run, (log_decay,), (tangent,))[1]

    for actual, expected in zip(along(**options), along(backend="reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_errors_do_not_add_up_over_a_long_sequence() -> None:
    """float32 over 2048 tokens, with random gradients of the outputs."""
    log_decay = retpop.retnet_decay(4)
    case = replace(RetentionCase.make(1, 2048, 4, 4, 4, dtype=torch.float32), log_decay=log_decay)
    exact = case.double().for_gradients(decay=True)
    expected = gradients(exact.run(), exact.leaves())[-1]
    case = case.for_gradients(decay=True)
    torch.testing.assert_close(
        gradients(case.run(), case.leaves())[-1], expected.float(), rtol=5e-6, atol=0.0
    )


def test_powers_of_a_call_without_gradient_are_not_reused_by_one_with() -> None:
    """A decoder's layers share powers: tables made in no_grad have no graph."""
    log_decay = retpop.retnet_decay(2).requires_grad_()
    powers = DecayPowers(log_decay, 1.0, torch.float32)
    with torch.no_grad():
        powers.block(4)
        powers.across_token()
    assert powers.block(4).within.requires_grad
    assert powers.across_token().rest.requires_grad
