"""`pop_fwd` in Triton's interpreter against the reference: both forms of the walk, in one pass and split."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retention_cases import PopCase, assert_same_results
from torch import Tensor

from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import PopConfig
from retpop.kernels.launch import Target
from retpop.kernels.pop_fwd import plan_pop_fwd, pop_fwd

LIMIT = 5e-6

Results = tuple[Tensor, Tensor, Tensor]

# Small tiles, so that short blocks have several, the last one partial.
LINE = PopConfig(tile=16, cols_v=32, num_warps=4, num_stages=2)
FORMS = {
    "line": LINE,
    "steps": replace(LINE, steps=True),
    "line, split": replace(LINE, split=True),
    "steps, split": replace(LINE, steps=True, split=True),
}
ONE_PASS = ("line", "steps")

TOKENS = ("q", "k", "v", "q_pred", "k_pred", "v_pred")


def run(case: PopCase, config: PopConfig | None = None, **outputs: Tensor) -> Results:
    """`pop_fwd` of a case; it must leave its inputs as they are, and its accesses are audited."""
    before = {name: x.clone() for name, x in vars(case).items() if isinstance(x, Tensor)}
    with audit():
        results = pop_fwd(
            case.q,
            case.k,
            case.v,
            case.q_pred,
            case.k_pred,
            case.v_pred,
            case.log_decay,
            case.state,
            case.reset,
            case.block_size,
            case.offset,
            case.q.shape[-1] ** -0.5,
            config=config,
            **outputs,
        )
    for name, copy in before.items():
        assert torch.equal(getattr(case, name).nan_to_num(7.0), copy.nan_to_num(7.0)), name
    assert results[2].dtype is torch.float32
    return results


def check(case: PopCase, config: PopConfig | None = None, limit: float = LIMIT, **outputs: Tensor) -> Results:
    """Compare with the reference in float64."""
    results = run(case, config, **outputs)
    assert_same_results(results, case.double().run(backend="reference"), limit)
    return results


def make(*sizes: int, **options: object) -> PopCase:
    return PopCase.make(*sizes, dtype=torch.float32, **options)


# N, L, P, M, offset
USES = {
    "training": (3, 17, 3, 16, 0),
    "imagination": (1, 17, 1, 16, 1),
    "every boundary": (2, 5, 3, 4, 0),
    "late predictions": (4, 3, 2, 2, 2),
    "last boundary": (2, 18, 1, 20, 2),
    "long blocks": (2, 34, 2, 1, 0),
    "long predictions": (2, 1, 2, 34, 1),
    "whole tiles": (2, 32, 2, 32, 0),
    "one token": (3, 1, 4, 1, 0),
    "no predictions": (2, 17, 0, 3, 1),
    "predictions of nothing": (2, 17, 2, 0, 0),
}


@pytest.mark.parametrize("form", ONE_PASS)
@pytest.mark.parametrize("use", USES)
def test_uses(use: str, form: str) -> None:
    """In one form with blocks that start an episode, in the other without."""
    N, L, P, M, offset = USES[use]
    seed = len(use)
    if (form == "line") == (seed % 2 == 0):
        check(make(1, N, L, P, M, 2, 8, 12, offset=offset, seed=seed, with_state=seed % 3 > 0), FORMS[form])
    else:
        check_with_starts(use, form)


def check_with_starts(use: str, form: str) -> None:
    N, L, P, M, offset = USES[use]
    seed = len(use)
    starts = make(2, N, L, P, M, 1, 8, 12, offset=offset, seed=seed + 2, with_reset=True)
    check(replace(starts, reset=~starts.reset if seed % 3 == 0 else starts.reset), FORMS[form])


@pytest.mark.parametrize("use", USES)
def test_uses_of_a_split(use: str) -> None:
    check_with_starts(use, "line, split" if len(use) % 2 else "steps, split")


@pytest.mark.parametrize("form", ONE_PASS)
def test_predictions_alone(form: str) -> None:
    check(make(2, 0, 5, 1, 20, 2, 8, 12), FORMS[form])
    check(make(1, 0, 5, 1, 4, 2, 8, 12, with_state=False, with_reset=True), FORMS[form])


@pytest.mark.parametrize(
    ("Dk", "Dv", "forms"),
    [
        (8, 100, ("line", "steps, split")),
        (24, 60, ("steps", "line, split")),
        (60, 24, ("line", "steps, split")),
        (100, 33, ("steps", "line, split")),
        (128, 16, ("line", "steps, split")),
    ],
)
def test_head_dims(Dk: int, Dv: int, forms: tuple[str, str]) -> None:
    for form in forms:
        check(make(1, 2, 5, 3, 4, 1, Dk, Dv, seed=Dk), FORMS[form])


@pytest.mark.parametrize(("form", "tile"), [("line", 64), ("steps", 32)])
def test_rem_lengths_in_larger_tiles(form: str, tile: int) -> None:
    check(make(1, 2, 65, 3, 64, 1, 16, 16, with_reset=True), replace(FORMS[form], tile=tile, cols_v=16))


def test_defaults() -> None:
    """What is chosen for float32: a pass for many heads, narrow slices for a few, a split for many blocks."""
    check(make(1, 2, 17, 2, 16, 2, 24, 40))
    check(make(1, 4, 3, 4, 2, 1, 16, 16, with_reset=True))


@pytest.mark.parametrize(
    ("form", "scale_v"), [("line", False), ("line", True), ("steps", True), ("steps, split", False)]
)
def test_gammas(form: str, scale_v: bool) -> None:
    """Positive exponents on masked rows would not be finite for a small γ."""
    gammas = [0.0, 0.01, 0.1, 0.2, 0.5, 1 - 2**-9, 1 - 1e-6, 1.0]
    logs = torch.tensor([math.log(gamma) if gamma else -math.inf for gamma in gammas], dtype=torch.float64)
    case = make(1, 2, 19, 2, 5, len(gammas), 8, 8, seed=3)
    check(replace(case, log_decay=logs.float()), replace(FORMS[form], scale_v=scale_v))


@pytest.mark.parametrize("form", ["line", "line, split"])
def test_a_state_that_lives_long_gathers_no_bias(form: str) -> None:
    """A time scale of 30,000 tokens over 1,024: a product with a rounded γ^n would err in one direction."""
    case = make(1, 64, 16, 0, 0, 1, 8, 8, with_state=True)
    slow = torch.tensor([math.log1p(-1 / 30_000)])
    positive = replace(case, log_decay=slow, k=case.k.abs(), v=case.v.abs())
    *_, state = run(positive, FORMS[form])
    expected = positive.double().run(backend="torch")[2]
    assert ((state - expected) / expected).mean().abs() < 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_views(form: str) -> None:
    """Main and prediction tokens, q, k and v, in one tensor, as a projection makes them; outputs likewise."""
    N, L, P, M, H, D = 2, 17, 2, 4, 2, 12
    case = make(2, N, L, P, M, H, D, D, with_reset=True)
    main = torch.stack((case.q, case.k, case.v), 2)
    pred = torch.stack((case.q_pred, case.k_pred, case.v_pred), 3)
    rows = torch.cat((main, pred.flatten(1, 2)), 1)
    made = torch.full((2, N * L + P * M, H, D + 4), math.nan)[..., 2:-2]
    out, predicted = made[:, : N * L], made[:, N * L :].unflatten(1, (P, M))
    names = ("q", "k", "v")
    views = {name: rows[:, : N * L, i] for i, name in enumerate(names)}
    views |= {f"{name}_pred": rows[:, N * L :, i].unflatten(1, (P, M)) for i, name in enumerate(names)}
    results = check(replace(case, **views), FORMS[form], out=out, pred=predicted)
    assert results[0] is out
    assert results[1] is predicted


@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str) -> None:
    """Transposed, expanded and reversed tensors, and a last dim that is not contiguous."""
    case = make(2, 3, 5, 2, 3, 2, 8, 8, with_reset=True, offset=1)
    strange = replace(
        case,
        q=case.q[:, :, :1].expand(-1, -1, 2, -1),
        k=case.k.transpose(1, 2).contiguous().transpose(1, 2),
        v=case.v.transpose(2, 3).contiguous().transpose(2, 3),
        q_pred=case.q_pred[:1, :1].expand(2, 2, -1, -1, -1),
        k_pred=case.k_pred.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
        state=case.state.transpose(2, 3).contiguous().transpose(2, 3),
        reset=case.reset.t().contiguous().t(),
        log_decay=case.log_decay.repeat_interleave(2)[::2],
    )
    assert not strange.v.is_contiguous()
    check(strange, FORMS[form])


@pytest.mark.parametrize("form", ["line", "steps, split"])
def test_outputs_do_not_depend_on_their_memory(form: str) -> None:
    """The fixture fills new memory with NaN; twice the same call is bitwise the same."""
    case = make(1, 2, 17, 2, 18, 1, 12, 20)
    for first, second in zip(run(case, FORMS[form]), run(case, FORMS[form]), strict=True):
        assert torch.isfinite(first).all()
        assert first.is_contiguous()
        assert torch.equal(first, second)


def with_reset_at(case: PopCase, *blocks: int) -> PopCase:
    reset = torch.zeros(case.q.shape[0], case.q.shape[1] // case.block_size, dtype=torch.bool)
    reset[:, list(blocks)] = True
    return replace(case, reset=reset)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("form", "offset", "poison"),
    [
        ("line", 0, math.nan),
        ("steps", 1, math.inf),
        ("line, split", 1, math.inf),
        ("steps, split", 0, math.nan),
    ],
)
def test_nothing_crosses_a_reset(form: str, offset: int, poison: float) -> None:
    """Neither a broken given state nor broken blocks: a state is replaced, not multiplied by 0."""
    L, M = 18, 5
    case = with_reset_at(make(1, 4, L, 3, M, 1, 8, 8, offset=offset), 0, 2)
    expected = replace(case, state=None).double().run(backend="reference")
    k = case.k.clone()
    k[:, L : 2 * L] = poison
    broken = replace(case, k=k, state=torch.full_like(case.state, poison))
    out, pred, state = run(broken, FORMS[form])
    kept = [*range(L), *range(2 * L, 4 * L)]
    assert_same_results((out[:, kept], pred, state), (expected[0][:, kept], *expected[1:]), LIMIT)
    assert not torch.isfinite(out[:, L : 2 * L]).all()


@pytest.mark.parametrize(
    ("form", "M"), [("line", 5), ("steps", 18), ("line, split", 18), ("steps, split", 5)]
)
def test_a_broken_prediction_leaves_no_trace(form: str, M: int) -> None:
    case = make(1, 3, 4, 3, M, 1, 8, 8)
    expected = case.double().run(backend="reference")
    k_pred = case.k_pred.clone()
    k_pred[:, 1, M - 1] = math.nan
    out, pred, state = run(replace(case, k_pred=k_pred), FORMS[form])
    assert_same_results((out, pred[:, ::2], state), (expected[0], expected[1][:, ::2], expected[2]), LIMIT)
    assert pred[:, 1, M - 1].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_propagates(form: str) -> None:
    """In the data it is dropped nowhere: every later output of its head is NaN, none of earlier tiles."""
    case = make(1, 2, 18, 2, 4, 2, 8, 8, offset=1)
    v = case.v.clone()
    v[:, 16, 1] = math.nan
    case = replace(case, v=v, log_decay=torch.full((2,), -0.01))
    out, pred, state = run(case, FORMS[form])
    assert torch.isfinite(out[:, :16]).all()
    assert torch.isfinite(out[:, :, 0]).all()
    assert out[:, 16:, 1].isnan().all()
    assert pred[:, :, :, 1].isnan().all()
    assert state[:, 1].isnan().all()
    assert torch.isfinite(state[:, 0]).all()


@pytest.mark.parametrize(
    ("B", "N", "P", "M"), [(2, 0, 0, 3), (2, 0, 1, 0), (0, 2, 3, 4), (2, 2, 0, 0), (2, 2, 3, 0)]
)
def test_empty_tensors(B: int, N: int, P: int, M: int) -> None:
    case = make(B, N, 3, P, M, 2, 4, 5, with_reset=True)
    out, pred, state = check(case)
    assert (out.shape, pred.shape, state.shape) == ((B, N * 3, 2, 5), (B, P, M, 2, 5), (B, 2, 4, 5))
    if N == 0:
        assert torch.equal(state, case.state)
        assert state.data_ptr() != case.state.data_ptr()
        assert not run(replace(case, state=None))[2].any()


@pytest.mark.parametrize("form", ONE_PASS)
def test_a_state_beyond_float16(form: str) -> None:
    """States of slow decays outgrow float16, which the outputs do not: as an operand a state is scaled."""
    case = make(1, 2, 5, 2, 4, 2, 16, 16)
    case = replace(case, state=case.state * 1e6, log_decay=torch.tensor([0.0, -0.01]))
    half = {name: getattr(case, name).half() * (1e-3 if "q" in name else 1) for name in TOKENS}
    out, pred, state = run(replace(case, **half), FORMS[form])
    assert out.dtype is pred.dtype is torch.float16
    expected = replace(case, **half).double().run(backend="reference")
    assert_same_results((out, pred, state), expected, 5e-4)


@pytest.mark.parametrize("form", ONE_PASS)
def test_outputs_beyond_float16(form: str) -> None:
    """In float32, in new tensors or where they are told to be."""
    case = make(1, 2, 5, 2, 4, 2, 16, 16)
    case = replace(case, state=case.state * 1e6, log_decay=torch.tensor([0.0, -0.01]))
    case = replace(case, **{name: getattr(case, name).half() for name in TOKENS})
    expected = case.double().run(backend="reference")
    results = run(case, FORMS[form], out_dtype=torch.float32)
    assert results[0].dtype is results[1].dtype is torch.float32
    assert results[0].abs().max() > 65504
    assert_same_results(results, expected, 5e-4)
    row = torch.full((1, 18, 2, 16), math.nan)
    out, pred = row[:, :10], row[:, 10:].unflatten(1, (2, 4))
    run(case, FORMS[form], out=out, pred=pred)
    assert torch.equal(row, torch.cat((results[0], results[1].flatten(1, 2)), dim=1))


@st.composite
def cases(draw: st.DrawFn) -> tuple[PopCase, PopConfig]:
    N = draw(st.integers(0, 5))
    offset = draw(st.integers(0, N))
    case = make(
        draw(st.integers(1, 2)),
        N,
        draw(st.integers(1, 70)),
        draw(st.integers(0, N + 1 - offset)),
        draw(st.integers(0, 70)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
        offset=offset,
        seed=draw(st.integers(0, 999)),
        with_state=draw(st.booleans()),
        with_reset=draw(st.booleans()),
    )
    config = PopConfig(
        tile=draw(st.sampled_from([16, 32, 64])),
        cols_v=draw(st.sampled_from([16, 32, 64])),
        num_warps=4,
        num_stages=2,
        scale_v=draw(st.booleans()),
        steps=draw(st.booleans()),
        split=N > 0 and draw(st.booleans()),
    )
    return case, config


@pytest.mark.slow
@settings(max_examples=100)
@given(drawn=cases())
def test_anything(drawn: tuple[PopCase, PopConfig]) -> None:
    check(*drawn)


def test_a_plan_runs_nothing_and_reads_no_value() -> None:
    """Meta tensors have none: what a launch is depends on shapes and strides alone."""
    case = make(2, 3, 5, 3, 4, 2, 8, 8, with_reset=True)
    meta = {name: x.to("meta") for name, x in vars(case).items() if isinstance(x, Tensor)}
    order = ("q", "k", "v", "q_pred", "k_pred", "v_pred", "log_decay", "state", "reset")
    launches, outputs = plan_pop_fwd(*(meta[name] for name in order), 5, 0, 1.0, target=Target("sm_80", 108))
    assert len(launches) == 1
    assert [x.shape for x in outputs] == [case.v.shape, case.v_pred.shape, case.state.shape]


def test_head_dims_that_are_too_large() -> None:
    case = make(1, 1, 2, 1, 2, 1, 257, 8)
    with pytest.raises(ValueError, match=r"pop_fwd\(\): Dk is 257; the kernel takes at most 256"):
        run(case)
