"""One token at a time: the form that decoding takes, whatever the mode, against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from retention_cases import (
    MODES,
    RetentionCase,
    assert_same_gradients,
    assert_same_results,
    gradients,
    normal,
)
from torch import Tensor

import retpop
from retpop.ops.powers import DecayPowers

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def slow_decays(num_heads: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """γ from 1/2 to 1, both included but for rounding: where the state is carried as S + (γ - 1) S."""
    log_decay = torch.linspace(math.log(0.5), 0, num_heads, dtype=dtype).clamp(min=math.log(0.5) + 1e-7)
    assert DecayPowers(log_decay, 1.0, dtype, log_decay.tolist()).across_token().whole is None
    return log_decay


def token(
    *, slow: bool, with_state: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
) -> RetentionCase:
    """B = 2, T = 1, H = 3, Dk = 4, Dv = 5; decays near 1, or some of any size, 0 among them."""
    case = RetentionCase.make(2, 1, 3, 4, 5, dtype=dtype, seed=seed, with_state=with_state)
    return replace(case, log_decay=slow_decays(3, case.log_decay.dtype)) if slow else case


@st.composite
def tokens(draw: st.DrawFn) -> RetentionCase:
    """Any sizes, with and without a state; log-decays of either dtype."""
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    heads = draw(st.integers(1, 4))
    case = RetentionCase.make(
        draw(st.integers(0, 3)),
        1,
        heads,
        draw(st.integers(1, 7)),
        draw(st.integers(1, 7)),
        dtype=dtype,
        seed=draw(st.integers(0, 999)),
        with_state=draw(st.booleans()),
    )
    log_decay = slow_decays(heads) if draw(st.booleans()) else case.log_decay
    float32_inputs = dtype is not torch.float64
    decay_dtype = draw(st.sampled_from([torch.float32, torch.float64])) if float32_inputs else torch.float64
    return replace(case, log_decay=log_decay.to(decay_dtype))


@pytest.mark.parametrize("mode", MODES)
@given(case=tokens())
def test_a_token_is_the_reference_s(mode: str, case: RetentionCase) -> None:
    actual = case.run(mode=mode)
    expected = case.double().run(backend="reference")
    assert [x.dtype for x in actual] == [case.v.dtype, retpop.arguments.state_dtype(case.v.dtype)]
    assert_same_results(actual, expected, TOLERANCES[case.v.dtype], TOLERANCES[case.v.dtype])


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_its_gradients_of_any_order(slow: bool, with_state: bool) -> None:
    case = token(slow=slow, with_state=with_state).for_gradients()
    expected = gradients(case.run(backend="reference"), case.leaves())
    assert_same_gradients(gradients(case.run(), case.leaves()), expected, 1e-12)

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *state = leaves
        return retpop.retention(q, k, v, case.log_decay, state=state[0] if state else None)

    assert torch.autograd.gradgradcheck(run, case.leaves(), fast_mode=True)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("subset", range(1, 16))
def test_vmap_over_some_of_its_inputs(slow: bool, subset: int) -> None:
    """Whichever inputs an ensemble shares: nothing may be written over what has fewer dims."""
    names = ("q", "k", "v", "state")
    dims = tuple(0 if subset >> bit & 1 else None for bit in range(4))
    members = [token(slow=slow, seed=6 * i) for i in range(3)]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return replace(members[0], **dict(zip(names, values, strict=True))).run()

    def of(member: int) -> list[Tensor]:
        pairs = zip(names, dims, strict=True)
        return [getattr(members[0 if dim is None else member], name) for name, dim in pairs]

    values = [
        x if dim is None else torch.stack([of(i)[at] for i in range(3)])
        for at, (x, dim) in enumerate(zip(of(0), dims, strict=True))
    ]
    actual = torch.vmap(run, in_dims=dims)(*values)
    for i in range(3):
        expected = replace(members[0], **dict(zip(names, of(i), strict=True))).run(backend="reference")
        assert_same_results(tuple(x[i] for x in actual), expected, 1e-12)


@pytest.mark.parametrize("slow", [True, False])
def test_forward_mode(slow: bool) -> None:
    case = token(slow=slow)
    tangents = tuple(normal(*x.shape, seed=90 + i) for i, x in enumerate(case.leaves()))

    def run_by(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda q, k, v, state: retpop.retention(q, k, v, case.log_decay, state=state, backend=backend)

    found, expected = (
        torch.func.jvp(run_by(name), tuple(case.leaves()), tangents) for name in ("torch", "reference")
    )
    for a, e in zip(found, expected, strict=True):
        assert_same_results(a, e, 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_compiled_without_a_graph_break(slow: bool, with_state: bool) -> None:
    case = token(slow=slow, with_state=with_state).for_gradients()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(), case.run(backend="reference")
    assert_same_results(actual, expected, 1e-12)
    assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-12)


def test_decays_that_change_in_place_are_seen() -> None:
    """Nothing is kept from one call to the next."""
    case = token(slow=True)
    case.run()
    for other in (slow_decays(3) - 0.01, torch.full((3,), -torch.inf), torch.zeros(3)):
        case.log_decay.copy_(other)
        assert_same_results(case.run(), case.run(backend="reference"), 1e-12)
    case.log_decay[1] = 0.5
    with pytest.raises(ValueError, match=r"log_decay holds 0\.5"):
        case.run()


def test_decays_as_a_parameter() -> None:
    """A frozen one, as a model may hold; a state of a subclass of Tensor goes in too."""
    case = token(slow=True, dtype=torch.float32)
    frozen = replace(case, log_decay=torch.nn.Parameter(case.log_decay, requires_grad=False))
    frozen = replace(frozen, state=torch.nn.Parameter(case.state))
    for actual, expected in zip(frozen.run(), case.run(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("same_token", [False, True])
def test_a_long_walk_does_not_drift(same_token: bool) -> None:
    """4,000 calls. With γ rounded to float32 the error is 3e-5, and as much where the same token comes again
    and again and kᵀ v is added to a rounded γ S instead of to (γ - 1) S.
    """
    log_decay = torch.log1p(-torch.tensor([1e-3, 1e-4], dtype=torch.float64)).float()
    gamma = log_decay.double().exp()[:, None, None]
    exact = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    state = exact.float()
    for t in range(4_000):
        k, v = (normal(1, 1, 2, 8, seed=i + 2 * t * (not same_token), dtype=torch.float32) for i in range(2))
        _, state = retpop.retention(k, k, v, log_decay, state=state, mode="recurrent")
        exact = gamma * exact + k.double().permute(0, 2, 3, 1) * v.double().transpose(1, 2)
    error = (state - exact).square().mean((-1, -2)).sqrt() / exact.square().mean((-1, -2)).sqrt()
    assert error.max() < 5e-6
