"""Laws of `retpop.retention`: its forms agree, a cut changes nothing, nothing looks ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

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
    mode_options,
    normal,
)

import retpop
from retpop.arguments import autocast_is_on


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 40) -> RetentionCase:
    """Shapes around the corners: nothing, one, a partial chunk, several chunks, Dk != Dv, odd dims."""
    tokens = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 33]), st.integers(0, max_tokens))
    return RetentionCase.make(
        draw(st.integers(0, 3)),
        min(draw(tokens), max_tokens),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 7)),
        draw(st.integers(1, 7)),
        seed=draw(st.integers(0, 999)),
        with_state=draw(st.booleans()),
    )


@pytest.mark.parametrize("mode", MODES)
@given(case=cases())
def test_every_mode_is_the_reference(mode: str, case: RetentionCase) -> None:
    expected = case.run(backend="reference")
    actual = case.run(backend="torch", **mode_options(mode))
    assert_same_results(actual, expected, 1e-12)
    assert [t.dtype for t in actual] == [torch.float64, torch.float64]


@pytest.mark.parametrize("mode", MODES)
@given(case=cases(max_tokens=20))
def test_every_gradient_is_the_reference_s(mode: str, case: RetentionCase) -> None:
    leaves = case.for_gradients()
    expected = gradients(leaves.run(backend="reference"), leaves.leaves())
    actual = gradients(leaves.run(backend="torch", **mode_options(mode)), leaves.leaves())
    assert_same_gradients(actual, expected, 1e-11)


@pytest.mark.parametrize("mode", MODES)
@given(case=cases(), cuts=st.lists(st.integers(0, 40), max_size=3))
def test_a_cut_sequence_with_carried_state_is_the_whole(
    mode: str, case: RetentionCase, cuts: list[int]
) -> None:
    T = case.q.shape[1]
    edges = [0, *sorted(min(cut, T) for cut in cuts), T]
    outs, state = [], case.state
    for start, stop in pairwise(edges):
        out, state = case.part(start, stop, state).run(backend="torch", **mode_options(mode))
        outs.append(out)
    whole = case.run(backend="torch", **mode_options(mode))
    assert_same_results((torch.cat(outs, dim=1), state), whole, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changed", ["q", "k", "v"])
def test_a_later_token_changes_nothing_earlier(mode: str, changed: str) -> None:
    """Bit for bit: an earlier output may not even round differently."""
    case = RetentionCase.make(2, 37, 3, 4, 5)
    before, _ = case.run(backend="torch", **mode_options(mode))
    for t in [0, 15, 16, 20, 36]:
        data = getattr(case, changed).clone()
        data[:, t] += 1.0
        after, _ = replace(case, **{changed: data}).run(backend="torch", **mode_options(mode))
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("mode", MODES)
def test_rows_and_heads_do_not_touch_each_other(mode: str) -> None:
    case = RetentionCase.make(3, 18, 3, 4, 5)
    before = case.run(backend="torch", **mode_options(mode))
    q, k, v, state = (leaf.clone() for leaf in case.leaves())
    for data in (q, k, v):
        data[1, :, 2] += 1.0
    state[1, 2] += 1.0
    changed = replace(case, q=q, k=k, v=v, state=state).run(backend="torch", **mode_options(mode))
    same = torch.ones(3, 3, dtype=torch.bool)
    same[1, 2] = False
    for b, h in [(b, h) for b in range(3) for h in range(3)]:
        assert torch.equal(before[0][b, :, h], changed[0][b, :, h]) == bool(same[b, h])
        assert torch.equal(before[1][b, h], changed[1][b, h]) == bool(same[b, h])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_give_an_empty_output_and_the_state_as_given(mode: str, backend: str) -> None:
    case = RetentionCase.make(2, 0, 3, 4, 5)
    out, state = case.run(backend=backend, mode=mode)
    assert out.shape == (2, 0, 3, 5)
    assert torch.equal(state, case.state)
    _, zeros = replace(case, state=None).run(backend=backend, mode=mode)
    assert torch.equal(zeros, torch.zeros(2, 3, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.0, -1.5, 2])
def test_the_scale_multiplies_outputs_and_leaves_states_alone(mode: str, scale: float) -> None:
    case = RetentionCase.make(2, 18, 3, 4, 5)
    unscaled, state = case.run(backend="torch", scale=1.0, **mode_options(mode))
    scaled, same_state = case.run(backend="torch", scale=scale, **mode_options(mode))
    torch.testing.assert_close(scaled, unscaled * scale, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, same_state)


@given(case=cases(max_tokens=70), chunk_size=st.sampled_from([None, 16, 32, 64, 128]))
def test_the_chunk_size_changes_nothing(case: RetentionCase, chunk_size: int | None) -> None:
    actual = case.run(backend="torch", mode="chunkwise", chunk_size=chunk_size)
    assert_same_results(actual, case.run(backend="torch", mode="parallel"), 1e-12)


def test_defaults_are_chunkwise_and_on_a_cpu_torch() -> None:
    case = RetentionCase.make(2, 70, 3, 4, 5, dtype=torch.float32)
    for actual, expected in zip(case.run(), case.run(backend="torch", mode="chunkwise"), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    case = RetentionCase.make(1, 18, 2, 2, 3, seed=5).for_gradients()

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, state = leaves
        return retpop.retention(q, k, v, case.log_decay, state=state, backend="torch", **mode_options(mode))

    assert torch.autograd.gradcheck(run, case.leaves())


def test_gradcheck_of_the_reference() -> None:
    case = RetentionCase.make(1, 4, 2, 2, 3, seed=5).for_gradients()

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, state = leaves
        return retpop.retention(q, k, v, case.log_decay, state=state, backend="reference")

    assert torch.autograd.gradcheck(run, case.leaves())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subset", range(16))
def test_any_subset_may_require_gradients(mode: str, subset: int) -> None:
    whole = RetentionCase.make(2, 18, 2, 3, 4).for_gradients()
    expected = gradients(whole.run(backend="torch", **mode_options(mode)), whole.leaves())
    wanted = [bool(subset >> bit & 1) for bit in range(4)]
    leaves = [leaf.detach().requires_grad_(on) for leaf, on in zip(whole.leaves(), wanted, strict=True)]
    case = replace(whole, q=leaves[0], k=leaves[1], v=leaves[2], state=leaves[3])
    results = case.run(backend="torch", **mode_options(mode))
    assert results[0].requires_grad == any(wanted)
    assert results[1].requires_grad == any(wanted[1:])
    chosen = [leaf for leaf in leaves if leaf.requires_grad]
    found = gradients(results, chosen)
    assert_same_gradients(found, [g for g, on in zip(expected, wanted, strict=True) if on], 1e-12)


def carry_over(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[RetentionCase], RetentionCase]:
    return lambda case: replace(
        case, **{name: make(getattr(case, name)) for name in ("q", "k", "v", "state")}
    )


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the memory of the dims reversed."""
    dims = list(range(tensor.ndim))[::-1]
    return tensor.permute(dims).contiguous().permute(dims)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [strided, transposed])
def test_any_memory_layout_gives_the_same(mode: str, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = RetentionCase.make(2, 21, 3, 4, 6)
    other = carry_over(layout)(case)
    assert not other.q.is_contiguous()
    assert_same_results(
        other.run(backend="torch", **mode_options(mode)), case.run(backend="reference"), 1e-12
    )


@pytest.mark.parametrize("mode", MODES)
def test_expanded_inputs(mode: str) -> None:
    """Stride 0 in every input: one row, one head and one token shown as many."""
    one = RetentionCase.make(1, 1, 1, 4, 6)
    expanded = replace(
        one,
        q=one.q.expand(2, 21, 3, 4),
        k=one.k.expand(2, 21, 3, 4),
        v=one.v.expand(2, 21, 3, 6),
        state=one.state.expand(2, 3, 4, 6),
        log_decay=one.log_decay.expand(3),
    )
    expected = _map_contiguous(expanded).run(backend="reference")
    assert_same_results(expanded.run(backend="torch", **mode_options(mode)), expected, 1e-12)


def _map_contiguous(case: RetentionCase) -> RetentionCase:
    return replace(case, **{name: value.contiguous() for name, value in vars(case).items()})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [0, 1, 18])
def test_inputs_stay_bit_for_bit_and_results_are_new_memory(mode: str, backend: str, T: int) -> None:
    case = RetentionCase.make(2, T, 3, 4, 5)
    before = [tensor.clone() for tensor in vars(case).values()]
    out, state = case.run(backend=backend, mode=mode)
    out.fill_(9.0)
    if T > 0:  # Without tokens the state may come back as it is.
        state.fill_(9.0)
    for tensor, copy in zip(vars(case).values(), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [1, 18, 70])
def test_repeats_are_bitwise_equal(mode: str, T: int) -> None:
    case = RetentionCase.make(2, T, 3, 8, 8, dtype=torch.float32).for_gradients()
    first, second = (case.run(mode=mode) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(first, case.leaves()), gradients(second, case.leaves()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_training_after_inference_mode(mode: str) -> None:
    """Nothing made under inference_mode may be kept and met again by autograd."""
    case = RetentionCase.make(2, 18, 3, 4, 5).for_gradients()
    with torch.inference_mode():
        case.run(mode=mode)
    results = case.run(mode=mode)
    assert_same_gradients(
        gradients(results, case.leaves()), gradients(case.run(backend="reference"), case.leaves()), 1e-11
    )


@pytest.mark.parametrize("mode", MODES)
def test_autocast_casts_q_k_v_and_leaves_the_state_alone(mode: str) -> None:
    case = RetentionCase.make(2, 18, 3, 8, 8, dtype=torch.float32)
    low = replace(case, q=case.q.bfloat16(), k=case.k.bfloat16(), v=case.v.bfloat16())
    expected_out, expected_state = low.run(mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = case.run(mode=mode)
    assert out.dtype is torch.bfloat16
    assert state.dtype is torch.float32
    assert torch.equal(out, expected_out)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_autocast_is_seen_on_devices_that_have_it(device: str) -> None:
    """On each for itself: no device's autocast is another's, and "meta" has none."""
    assert not autocast_is_on(device)
    if device == "meta":
        return
    torch.set_autocast_enabled(device, True)
    try:
        seen = [name for name in ("cpu", "mps", "meta") if autocast_is_on(name)]
        assert seen == [device]
    finally:
        torch.set_autocast_enabled(device, False)


def test_the_state_s_gradient_flows_through_many_carried_steps() -> None:
    """Truncated nowhere: the first token of forty single steps still hears of the last output."""
    case = RetentionCase.make(1, 40, 1, 4, 4, seed=3).for_gradients()  # the first head: γ = 1
    state = case.state
    for t in range(40):
        out, state = case.part(t, t + 1, state).run(mode="recurrent")
    whole, final = case.run(mode="parallel")
    actual = gradients((out, state), case.leaves())
    assert_same_gradients(actual, gradients((whole[:, -1:], final), case.leaves()), 1e-11)
    assert actual[1][:, 0].abs().min() > 0


@pytest.mark.parametrize(
    ("backend", "name"), [("auto", "torch"), ("torch", "torch"), ("reference", "reference")]
)
def test_explain_backend_names_the_backend_and_the_reason(backend: str, name: str) -> None:
    explanation = retpop.explain_backend(normal(1, 2, 1, 4, seed=0, dtype=torch.float32), backend=backend)
    for word in (f"{name} backend", "cpu", "float32"):
        assert word in explanation
