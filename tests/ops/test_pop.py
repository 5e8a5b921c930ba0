"""Laws of `retpop.pop_retention`: it is block-by-block passes, whatever N, L, P, M, offset and reset are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from retention_cases import PopCase, RetentionCase, assert_same_gradients, assert_same_results, gradients

import retpop


@st.composite
def cases(draw: st.DrawFn, max_dim: int = 6) -> PopCase:
    """Any number of blocks and predictions, none included; predictions shorter and longer than blocks."""
    N = draw(st.integers(0, 4))
    offset = draw(st.integers(0, N))
    return PopCase.make(
        draw(st.integers(0, 3)),
        N,
        draw(st.integers(1, 5)),
        draw(st.integers(0, N + 1 - offset)),
        draw(st.integers(0, 6)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, max_dim)),
        draw(st.integers(1, max_dim)),
        offset=offset,
        seed=draw(st.integers(0, 999)),
        with_state=draw(st.booleans()),
        with_reset=draw(st.booleans()),
    )


TRAINING = {"N": 3, "L": 5, "P": 3, "M": 4, "offset": 0}
IMAGINATION = {"N": 1, "L": 5, "P": 1, "M": 4, "offset": 1}
PREDICT_ONLY = {"N": 0, "L": 5, "P": 1, "M": 4, "offset": 0}
ALL_BOUNDARIES = {"N": 3, "L": 1, "P": 4, "M": 2, "offset": 0}
LONG_PREDICTIONS = {"N": 2, "L": 2, "P": 1, "M": 7, "offset": 2}
USES = [TRAINING, IMAGINATION, PREDICT_ONLY, ALL_BOUNDARIES, LONG_PREDICTIONS]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(case=cases())
@example(case=PopCase.make(2, 2, 65, 2, 64, 2, 4, 4))
@example(case=PopCase.make(2, 3, 65, 4, 70, 2, 4, 4, with_reset=True))
def test_pop_is_block_by_block_passes(backend: str, case: PopCase) -> None:
    assert_same_results(case.run(backend=backend), case.run_block_by_block(backend="reference"), 1e-12)


@given(case=cases(max_dim=4))
def test_every_gradient_is_that_of_block_by_block_passes(case: PopCase) -> None:
    case = case.for_gradients()
    expected = gradients(case.run_block_by_block(backend="reference"), case.leaves())
    assert_same_gradients(gradients(case.run(backend="torch"), case.leaves()), expected, 1e-11)
    assert_same_gradients(gradients(case.run(backend="reference"), case.leaves()), expected, 1e-11)


@given(case=cases())
def test_the_main_stream_is_retention(case: PopCase) -> None:
    """Predictions leave no trace: without resets, outputs and state are those of plain retention."""
    case = replace(case, reset=None)
    out, _, state = case.run(backend="torch")
    alone = RetentionCase(q=case.q, k=case.k, v=case.v, log_decay=case.log_decay, state=case.state)
    assert_same_results((out, state), alone.run(backend="torch", mode="parallel"), 1e-12)


@pytest.mark.parametrize("use", USES)
def test_gradcheck(use: dict[str, int]) -> None:
    case = PopCase.make(1, H=2, Dk=2, Dv=1, **use, with_reset=True, seed=4).for_gradients()

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, q_pred, k_pred, v_pred, state = leaves
        changed = replace(case, q=q, k=k, v=v, q_pred=q_pred, k_pred=k_pred, v_pred=v_pred, state=state)
        return changed.run(backend="torch")

    assert torch.autograd.gradcheck(run, case.leaves())


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_flow_from_predictions_into_the_main_stream(offset: int) -> None:
    """A prediction reads the blocks before its boundary and nothing else of the main stream."""
    case = PopCase.make(1, 3, 2, 1, 2, 1, 4, 4, offset=offset + 1, seed=2).for_gradients()
    _, pred, _ = case.run()
    q, k, v, q_pred, _, _, state = gradients((pred,), case.leaves())
    seen = 2 * (offset + 1)
    assert torch.equal(q, torch.zeros_like(q))
    for gradient in (k, v):
        assert gradient[:, :seen].abs().amin(dim=(0, 2, 3)).min() > 0
        assert torch.equal(gradient[:, seen:], torch.zeros_like(gradient[:, seen:]))
    assert q_pred.abs().min() > 0
    assert state.abs().min() > 0


@pytest.mark.parametrize("changed", ["q", "k", "v"])
def test_a_later_block_changes_no_earlier_prediction(changed: str) -> None:
    case = PopCase.make(2, 4, 3, 5, 2, 2, 4, 5)
    _, before, _ = case.run()
    for n in range(4):
        data = getattr(case, changed).clone()
        data[:, n * 3 : (n + 1) * 3] += 1.0
        _, after, _ = replace(case, **{changed: data}).run()
        assert torch.equal(before[:, : n + 1], after[:, : n + 1])
        if changed != "q":
            assert not torch.equal(before[:, n + 1], after[:, n + 1])


@pytest.mark.parametrize("changed", ["q_pred", "k_pred", "v_pred"])
def test_prediction_blocks_are_causal_and_do_not_see_each_other(changed: str) -> None:
    case = PopCase.make(2, 3, 3, 4, 4, 2, 4, 5)
    out, before, state = case.run()
    data = getattr(case, changed).clone()
    data[:, 1, 2] += 1.0
    same_out, after, same_state = replace(case, **{changed: data}).run()
    assert torch.equal(out, same_out)
    assert torch.equal(state, same_state)
    different = (before != after).any(dim=-1).any(dim=-1).any(dim=0)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, 2] = True
    expected[1, 3] = changed != "q_pred"
    assert torch.equal(different, expected)


def reset_at(case: PopCase, *blocks: int) -> PopCase:
    reset = torch.zeros(case.q.shape[0], case.q.shape[1] // case.block_size, dtype=torch.bool)
    reset[:, list(blocks)] = True
    return replace(case, reset=reset)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_reset_block_starts_a_new_sequence(backend: str) -> None:
    case = reset_at(PopCase.make(2, 4, 3, 5, 2, 2, 4, 5), 2)
    out, pred, state = case.run(backend=backend)
    fresh = replace(
        case,
        **{name: getattr(case, name)[:, 6:] for name in ("q", "k", "v")},
        **{name: getattr(case, name)[:, 2:] for name in ("q_pred", "k_pred", "v_pred")},
        state=None,
        reset=None,
    )
    assert_same_results((out[:, 6:], pred[:, 2:], state), fresh.run(backend="torch"), 1e-12)
    unreset = replace(case, reset=None).run(backend=backend)
    assert torch.equal(out[:, :6], unreset[0][:, :6])
    assert torch.equal(pred[:, :2], unreset[1][:, :2])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_reset_of_the_first_block_drops_the_given_state(backend: str, poison: float) -> None:
    """Even a broken one: the state is replaced, not multiplied by 0."""
    case = reset_at(PopCase.make(2, 2, 3, 3, 2, 2, 4, 5), 0)
    expected = replace(case, state=None, reset=None).run(backend="reference")
    broken = replace(case, state=torch.full_like(case.state, poison))
    assert_same_results(broken.run(backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_reset_stops_non_finite_blocks_and_their_gradients(backend: str) -> None:
    case = reset_at(PopCase.make(1, 3, 2, 4, 2, 2, 4, 5), 1)
    broken = case.k.clone()
    broken[:, :2] = torch.inf
    case = replace(case, k=broken).for_gradients()
    out, pred, state = case.run(backend=backend)
    assert torch.isfinite(out[:, 2:]).all()
    assert torch.isfinite(pred[:, 1:]).all()
    assert torch.isfinite(state).all()
    found = gradients((out[:, 2:], pred[:, 1:], state), case.leaves())
    clean = [gradient[:, 2:] for gradient in found[:3]] + [gradient[:, 1:] for gradient in found[3:6]]
    assert all(torch.isfinite(gradient).all() for gradient in clean)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_with_offset_a_reset_comes_before_the_prediction_from_its_boundary(backend: str) -> None:
    """The state after the last block is never reset: there is no block N to start."""
    case = PopCase.make(1, 2, 3, 2, 2, 1, 4, 5, offset=1)
    _, pred, state = reset_at(case, 1).run(backend=backend)
    zeros = torch.zeros_like(case.state)
    from_zero, _ = retpop.retention(
        case.q_pred[:, 0], case.k_pred[:, 0], case.v_pred[:, 0], case.log_decay, state=zeros
    )
    from_final, _ = retpop.retention(
        case.q_pred[:, 1], case.k_pred[:, 1], case.v_pred[:, 1], case.log_decay, state=state
    )
    torch.testing.assert_close(pred[:, 0], from_zero, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pred[:, 1], from_final, rtol=1e-12, atol=1e-12)


def test_a_reset_of_nothing_is_no_reset() -> None:
    case = PopCase.make(2, 3, 2, 4, 2, 2, 4, 5)
    assert_same_results(reset_at(case).run(), case.run(), 1e-15)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("B", "N", "P", "M"), [(2, 0, 0, 3), (2, 0, 1, 0), (2, 2, 0, 0), (2, 2, 3, 0), (0, 2, 3, 4)]
)
def test_empty_tensors(backend: str, B: int, N: int, P: int, M: int) -> None:
    case = PopCase.make(B, N, 3, P, M, 2, 4, 5, with_reset=True)
    out, pred, state = case.run(backend=backend)
    assert out.shape == (B, N * 3, 2, 5)
    assert pred.shape == (B, P, M, 2, 5)
    assert state.shape == (B, 2, 4, 5)
    if N == 0:
        assert torch.equal(state, case.state)
        zeros = replace(case, state=None).run(backend=backend)[2]
        assert torch.equal(zeros, torch.zeros_like(state))


def test_scale_is_applied_to_both_streams_and_not_to_the_state() -> None:
    case = PopCase.make(2, 2, 3, 3, 2, 2, 4, 5)
    out, pred, state = case.run(scale=1.0)
    twice_out, twice_pred, same_state = case.run(scale=2.0)
    torch.testing.assert_close(twice_out, 2 * out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twice_pred, 2 * pred, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, same_state)


def test_a_cut_between_blocks_with_carried_state_is_the_whole() -> None:
    case = PopCase.make(2, 4, 3, 4, 2, 2, 4, 5, with_reset=True, seed=1)
    whole = case.run()
    parts, state = [], case.state
    for first, last in [(0, 1), (1, 4)]:
        part = replace(
            case,
            **{name: getattr(case, name)[:, first * 3 : last * 3] for name in ("q", "k", "v")},
            **{name: getattr(case, name)[:, first:last] for name in ("q_pred", "k_pred", "v_pred", "reset")},
            state=state,
        )
        *outputs, state = part.run()
        parts.append(outputs)
    out, pred = (torch.cat(streams, dim=1) for streams in zip(*parts, strict=True))
    assert_same_results((out, pred, state), whole, 1e-12)


def test_one_pass_a_step_is_two_passes() -> None:
    """Imagination: taking in a block and predicting after it is one call (offset 1) or two."""
    case = PopCase.make(2, 1, 5, 1, 4, 2, 4, 5, offset=1)
    out, pred, state = case.run()
    taken_in, after = retpop.retention(case.q, case.k, case.v, case.log_decay, state=case.state)
    empty = {name: getattr(case, name)[:, :0] for name in ("q", "k", "v")}
    _, predicted, unchanged = replace(case, **empty, offset=0, state=after).run()
    assert_same_results((out, pred, state), (taken_in, predicted, after), 1e-12)
    assert torch.equal(unchanged, after)


@pytest.mark.parametrize("use", USES)
def test_inputs_stay_bit_for_bit(use: dict[str, int]) -> None:
    case = PopCase.make(2, H=2, Dk=4, Dv=5, **use, with_reset=True)
    tensors = [value for value in vars(case).values() if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    out, pred, _ = case.run()
    out.fill_(9.0)
    pred.fill_(9.0)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_views_and_expanded_inputs() -> None:
    case = PopCase.make(2, 3, 2, 3, 2, 2, 4, 4, with_reset=True)
    packed = torch.stack([case.q, case.k, case.v], dim=-2)
    packed_pred = torch.stack([case.q_pred, case.k_pred, case.v_pred], dim=-2)
    views = dict(zip(["q", "k", "v"], packed.unbind(-2), strict=True))
    views |= dict(zip(["q_pred", "k_pred", "v_pred"], packed_pred.unbind(-2), strict=True))
    viewed = replace(case, **views, reset=case.reset.t().contiguous().t())
    assert not viewed.q.is_contiguous()
    assert_same_results(viewed.run(), case.run_block_by_block(backend="reference"), 1e-12)
    shared = replace(case, q_pred=case.q_pred[:1, :1].expand(2, 3, 2, 2, 4))
    assert_same_results(shared.run(), shared.run_block_by_block(backend="reference"), 1e-12)


@pytest.mark.parametrize("leaf", range(7))
def test_each_input_alone_may_require_gradients(leaf: int) -> None:
    whole = PopCase.make(2, 2, 3, 3, 2, 2, 3, 4).for_gradients()
    expected = gradients(whole.run(), whole.leaves())[leaf]
    names = ["q", "k", "v", "q_pred", "k_pred", "v_pred", "state"]
    alone = replace(
        whole, **{name: getattr(whole, name).detach().requires_grad_(name == names[leaf]) for name in names}
    )
    results = alone.run()
    assert [r.requires_grad for r in results] == {
        "q": [True, False, False],
        "k": [True, True, True],
        "v": [True, True, True],
        "q_pred": [False, True, False],
        "k_pred": [False, True, False],
        "v_pred": [False, True, False],
        "state": [True, True, True],
    }[names[leaf]]
    assert_same_gradients(gradients(results, [getattr(alone, names[leaf])]), [expected], 1e-12)


def test_repeats_are_bitwise_equal() -> None:
    case = PopCase.make(2, 3, 5, 3, 4, 2, 8, 8, dtype=torch.float32, with_reset=True).for_gradients()
    first, second = case.run(), case.run()
    grads = [gradients(results, case.leaves()) for results in (first, second)]
    for a, b in zip([*first, *grads[0]], [*second, *grads[1]], strict=True):
        assert torch.equal(a, b)


def test_training_after_inference_mode() -> None:
    case = PopCase.make(2, 3, 2, 3, 2, 2, 4, 5).for_gradients()
    with torch.inference_mode():
        case.run()
    expected = gradients(case.run(backend="reference"), case.leaves())
    assert_same_gradients(gradients(case.run(), case.leaves()), expected, 1e-11)


def test_autocast_casts_both_streams_and_leaves_the_state_alone() -> None:
    case = PopCase.make(2, 2, 3, 3, 2, 2, 8, 8, dtype=torch.float32)
    names = ("q", "k", "v", "q_pred", "k_pred", "v_pred")
    expected = replace(case, **{name: getattr(case, name).bfloat16() for name in names}).run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = case.run()
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_predictions_alone_need_no_table_for_a_block_that_is_not_there() -> None:
    """With N = 0 any block_size is right; a table of 300,000² powers would not fit into memory."""
    nothing, pred = torch.randn(1, 0, 2, 4), torch.randn(1, 1, 3, 2, 4)
    log_decay = retpop.retnet_decay(2)
    out, prediction, state = retpop.pop_retention(
        nothing, nothing, nothing, pred, pred, pred, log_decay, block_size=300_000
    )
    alone, _ = retpop.retention(pred[:, 0], pred[:, 0], pred[:, 0], log_decay, mode="parallel")
    torch.testing.assert_close(prediction[:, 0], alone)
    assert out.shape == (1, 0, 2, 4)
    assert not state.any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_results_stay_in_the_graph(backend: str) -> None:
    nothing = torch.randn(1, 0, 2, 4, requires_grad=True)
    no_prediction = torch.randn(1, 0, 3, 2, 4, requires_grad=True)
    log_decay = retpop.retnet_decay(2)
    out, pred, _ = retpop.pop_retention(
        *(nothing,) * 3, *(no_prediction,) * 3, log_decay, block_size=5, backend=backend
    )
    whole, _ = retpop.retention(nothing, nothing, nothing, log_decay, backend=backend)
    (out.sum() + pred.sum() + whole.sum()).backward()
    assert nothing.grad.shape == nothing.shape
    assert no_prediction.grad.shape == no_prediction.shape
