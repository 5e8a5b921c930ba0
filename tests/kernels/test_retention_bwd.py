"""`retention_bwd` in Triton's interpreter against float64 autograd of the reference, and its schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from retention_cases import RetentionCase, largest_error, normal
from torch import Tensor

from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import RetentionConfig, padded
from retpop.kernels.configs_bwd import RetentionBwdConfig, SweepConfig, retention_bwd_config
from retpop.kernels.gpus import SHARED_MEMORY
from retpop.kernels.launch import run as run_launches
from retpop.kernels.retention_bwd import plan_retention_bwd, retention_bwd
from retpop.kernels.retention_fwd import retention_fwd

LIMIT = 2e-5

FLOAT16 = 2**-10
"""Of float16 tokens and a float32 gradient, which is rounded to their dtype, as are scores and results."""
ALL = (True, True, True, True)

# How many sweeps find dk and dv, and the tokens of a stretch in a forced split; None is one launch.
SCHEDULES = {"both": (1, None), "each": (2, None), "both, split": (1, 32), "each, split": (2, 32)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
two_schedules = pytest.mark.parametrize("schedule", ["both", "each, split"])

Grads = tuple[Tensor | None, Tensor | None]


def tiles_for(
    case: RetentionCase,
    schedule: str,
    *,
    tile: int = 16,
    cols: int = 32,
    scale_v: bool = False,
    **changes: int | None,
) -> RetentionBwdConfig:
    """Small tiles, in slices where there are two sweeps."""
    sweeps, stretch = SCHEDULES[schedule]
    common = {"tile": tile, "num_warps": 4, "num_stages": 1, "scale_v": scale_v}
    Dk, Dv = (padded(x.shape[-1]) for x in (case.q, case.v))
    config = RetentionBwdConfig(
        both=SweepConfig(cols_v=Dv, **common) if sweeps == 1 else None,
        keys=SweepConfig(cols_v=min(cols, Dk), **common),
        values=SweepConfig(cols_v=min(cols, Dv), **common),
        stretch=stretch,
    )
    return replace(config, **changes)


def grads_for(case: RetentionCase, sequences: int | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of the outputs and of the final state."""
    B, _, H, Dk = case.q.shape
    state = normal(sequences or B, H, Dk, case.v.shape[-1], seed=8, dtype=torch.float32)
    return normal(*case.v.shape, seed=7, dtype=case.v.dtype), state


def run(
    case: RetentionCase,
    grads: Grads,
    cu_seqlens: Tensor | None = None,
    config: RetentionBwdConfig | None = None,
    needs: Sequence[bool] = ALL,
    reset: Tensor | None = None,
) -> list[Tensor | None]:
    """`retention_bwd` of a case; it must leave its inputs as they are, and its accesses are audited."""
    tensors = [case.q, case.k, case.v, case.log_decay, case.state, cu_seqlens, reset, *grads]
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    scale = case.q.shape[-1] ** -0.5
    with audit():
        found = retention_bwd(
            case.q,
            case.k,
            case.v,
            case.log_decay,
            case.state,
            scale,
            cu_seqlens,
            *grads,
            reset=reset,
            needs=needs,
            config=config,
        )
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))
    for x, grad, need in zip((case.q, case.k, case.v, case.state), found, needs, strict=True):
        assert (grad is not None) == (need and x is not None)
        if grad is not None:
            assert (grad.shape, grad.dtype, grad.is_contiguous()) == (x.shape, x.dtype, True)
    return found


def expected(
    case: RetentionCase, grads: Grads, cu_seqlens: Tensor | None = None, reset: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of q, k, v and the state in float64; zeros where there is no influence."""
    leaves = case.double().for_gradients()
    results = leaves.run(backend="reference", cu_seqlens=cu_seqlens, reset=reset)
    total = sum((r * g.double()).sum() for r, g in zip(results, grads, strict=True) if g is not None)
    inputs = [leaves.q, leaves.k, leaves.v, leaves.state]
    wanted = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    found_or_zero = (None if x is None else (next(found), x) for x in inputs)
    return [None if y is None else torch.zeros_like(y[1]) if y[0] is None else y[0] for y in found_or_zero]


def assert_same(actual: list[Tensor | None], wanted: list[Tensor | None], limit: float = LIMIT) -> None:
    """Errors per head and 64-token block, and per state."""
    for name, a, w in zip(("q", "k", "v", "state"), actual, wanted, strict=True):
        if a is not None:
            assert w is not None
            error = largest_error(a, w, tokens_dim=None if name == "state" else 1)
            assert error <= limit, f"{name}: error {error:.3g} is above {limit:.3g}"


def check(
    case: RetentionCase,
    cu_seqlens: Tensor | None = None,
    config: RetentionBwdConfig | None = None,
    *,
    grads: Grads | None = None,
    needs: Sequence[bool] = ALL,
    reset: Tensor | None = None,
    limit: float = LIMIT,
) -> None:
    """Compare with autograd of the reference in float64."""
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = grads_for(case, sequences) if grads is None else grads
    found = run(case, grads, cu_seqlens, config, needs, reset)
    assert_same(found, expected(case, grads, cu_seqlens, reset), limit)


def with_gammas(case: RetentionCase, gammas: list[float]) -> RetentionCase:
    logs = [math.log(gamma) if gamma else -math.inf for gamma in gammas]
    return replace(case, log_decay=torch.tensor(logs, dtype=torch.float64).float())


@pytest.mark.parametrize(
    ("T", "Dk", "Dv", "schedules"),
    [
        (1, 8, 8, ("both", "each, split")),
        (7, 24, 60, ("each", "both, split")),
        (16, 16, 16, ("both", "each, split")),
        (33, 60, 100, tuple(SCHEDULES)),
        (65, 8, 24, ("each", "both, split", "each, split")),
    ],
)
def test_lengths_and_head_dims(T: int, Dk: int, Dv: int, schedules: Sequence[str]) -> None:
    B, H = (2, 2) if T < 33 else (1, 1)
    case = RetentionCase.make(B, T, H, Dk, Dv, dtype=torch.float32, seed=T, with_state=T != 65)
    for schedule in schedules:
        check(case, config=tiles_for(case, schedule))


@pytest.mark.parametrize(
    ("tile", "schedule"), [(16, "both"), (32, "both"), (32, "each, split"), (64, "each, split")]
)
def test_every_size_of_a_tile(tile: int, schedule: str) -> None:
    case = RetentionCase.make(1, 98, 1, 24, 24, dtype=torch.float32, seed=tile)
    stretch = tile if "split" in schedule else None
    config = tiles_for(case, schedule, tile=tile, cols=16, scale_v=tile == 32, stretch=stretch)
    check(case, config=config, needs=(False, True, True, True))


@pytest.mark.parametrize(("Dk", "Dv"), [(64, 64), (128, 128), (256, 8), (8, 256), (100, 24)])
def test_head_dims_with_the_default_config(Dk: int, Dv: int) -> None:
    check(RetentionCase.make(1, 33, 1, Dk, Dv, dtype=torch.float32))


@two_schedules
@pytest.mark.parametrize("T", [33, pytest.param(48, marks=pytest.mark.slow)])
def test_any_decay_with_a_partial_chunk(T: int, schedule: str) -> None:
    case = RetentionCase.make(1, T, 8, 8, 8, dtype=torch.float32)
    case = with_gammas(case, [0.0, 1e-30, 0.01, 0.1, 0.2, 0.5, 1 - 2**-20, 1.0])
    check(case, config=tiles_for(case, schedule))


@two_schedules
def test_every_subset_of_gradients(schedule: str) -> None:
    """Of k, v and the state, whose kernels leave out what is not needed; that of q is a launch of its own."""
    case = RetentionCase.make(1, 18, 1, 8, 8, dtype=torch.float32)
    config = tiles_for(case, schedule, **({"stretch": 16} if "split" in schedule else {}))
    grads = grads_for(case)
    wanted = expected(case, grads)
    for needs in itertools.product([False, True], repeat=3):
        assert_same(run(case, grads, config=config, needs=(not any(needs), *needs)), wanted)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_nothing_is_launched_that_is_not_needed(needs: tuple[bool, ...]) -> None:
    x = torch.empty(1, 40, 1, 8, device="meta")
    log_decay, state = torch.empty(1, device="meta"), torch.empty(1, 1, 8, 8, device="meta")
    sweeps = {"both": [0, 1, 1, 1], "each": [0, 1, 1, 2]}
    dq, dk, dv, dstate = needs
    for name, counts in sweeps.items():
        case = RetentionCase(q=x, k=x, v=x, log_decay=log_decay, state=state)
        for schedule in (name, f"{name}, split"):
            arguments = (x, x, x, log_decay, state, 1.0, None, x, state)
            config = tiles_for(case, schedule)
            launches, _ = plan_retention_bwd(*arguments, needs=needs, config=config)
            names = [launch.kernel.__name__ for launch in launches]
            assert names.count("retention_fwd_kernel") == dq
            reverse = names.count("retention_bwd_kernel")
            assert names.count("scan_states_kernel") == ("split" in schedule and any(needs[1:]))
            if "split" in schedule:
                assert reverse == counts[dk + 2 * dv] + any(needs[1:])
            else:
                assert reverse == max(counts[dk + 2 * dv], dstate)


@pytest.mark.parametrize(
    ("with_state", "given", "schedule"),
    [
        (True, (True, False), "both"),
        (True, (False, True), "each, split"),
        (False, (True, False), "each, split"),
        (False, (False, True), "both"),
    ],
)
def test_a_gradient_that_is_not_given_is_zero(
    with_state: bool, given: tuple[bool, bool], schedule: str
) -> None:
    case = RetentionCase.make(1, 35, 2, 8, 24, dtype=torch.float32, with_state=with_state)
    grads = [grad if here else None for grad, here in zip(grads_for(case), given, strict=True)]
    check(case, config=tiles_for(case, schedule), grads=grads)


def test_no_gradient_given() -> None:
    case = RetentionCase.make(1, 5, 2, 8, 8, dtype=torch.float32)
    for grad in run(case, (None, None)):
        assert not grad.any()


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_do(B: int, T: int, with_grad: bool) -> None:
    case = RetentionCase.make(B, T, 2, 8, 24, dtype=torch.float32)
    out, state = grads_for(case)
    *_, found = run(case, (out, state if with_grad else None))
    assert torch.equal(found, state if with_grad else torch.zeros_like(state))
    assert B == 0 or found.data_ptr() != state.data_ptr()


def layouts(case: RetentionCase) -> dict[str, RetentionCase]:
    """The same numbers, where not said otherwise, in other strides."""
    B, T, H, Dk = case.q.shape
    one_row = torch.cat((case.q, case.k, case.v), dim=-1)
    swapped = {name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in "qkv"}
    by_column = {name: getattr(case, name).mT.contiguous().mT for name in "qkv"}
    return {
        "one projection": replace(
            case, q=one_row[..., :Dk], k=one_row[..., Dk : 2 * Dk], v=one_row[..., 2 * Dk :]
        ),
        "time first": replace(case, **swapped),
        "last dim strided": replace(case, **by_column, state=case.state.mT.contiguous().mT),
        "heads expanded": replace(case, k=case.k[:, :, :1].expand(B, T, H, Dk)),
        "batch expanded": replace(case, q=case.q[:1].expand(B, T, H, Dk), v=case.v[:1].expand_as(case.v)),
        "state expanded": replace(case, state=case.state[:1, :1].expand_as(case.state)),
        "decay expanded": replace(case, log_decay=case.log_decay[:1].expand_as(case.log_decay)),
    }


@pytest.mark.parametrize("layout", list(layouts(RetentionCase.make(2, 3, 2, 8, 8))))
def test_layouts(layout: str) -> None:
    case = layouts(RetentionCase.make(2, 18, 2, 8, 8, dtype=torch.float32))[layout]
    check(case, config=tiles_for(case, "both"))


@pytest.mark.parametrize("layout", ["one projection", "last dim strided", "state expanded"])
def test_layouts_of_split_sequences(layout: str) -> None:
    case = layouts(RetentionCase.make(2, 18, 2, 8, 8, dtype=torch.float32))[layout]
    check(case, config=tiles_for(case, "each, split", stretch=16))


@two_schedules
def test_layouts_of_gradients(schedule: str) -> None:
    """As autograd makes them: one value for all, a transposed tensor, a part of a wider one."""
    case = RetentionCase.make(2, 18, 2, 8, 24, dtype=torch.float32)
    config = tiles_for(case, schedule, **({"stretch": 16} if "split" in schedule else {}))
    out, state = grads_for(case)
    wide = torch.full((2, 18, 2, 40), math.nan)
    wide[..., 7:31] = out
    for grads in (
        (out[:1, :1, :1, :1].expand_as(out), state[:1, :1].expand_as(state)),
        (out.transpose(1, 2).contiguous().transpose(1, 2), state.mT.contiguous().mT),
        (wide[..., 7:31], state),
    ):
        check(case, config=config, grads=grads)


@pytest.mark.parametrize(
    ("bounds", "stretch"), [(None, None), ([0, 0, 40, 70], 16)], ids=["one sweep", "packed, split"]
)
def test_states_that_the_forward_found_are_not_found_again(
    bounds: list[int] | None, stretch: int | None
) -> None:
    """Whatever the stretches of the sweep for keys and values; one head starts the forward's early."""
    packed = None if bounds is None else torch.tensor(bounds)
    sequences = None if bounds is None else len(bounds) - 1
    case = RetentionCase.make(1, 70, 2, 8, 24, dtype=torch.float32, sequences=sequences)
    case = with_gammas(case, [0.3, 1.0])
    common = {"rows": 16, "num_warps": 4, "num_stages": 1, "scale_v": False, "stretch": 32}
    forward = RetentionConfig(cols_k=16, cols_v=32, **common)
    inputs, scale = (case.q, case.k, case.v, case.log_decay, case.state), 8**-0.5
    *_, states = retention_fwd(*inputs, scale, packed, with_states=True, config=forward)
    config = tiles_for(case, "both", stretch=stretch, queries=RetentionConfig(cols_k=32, cols_v=16, **common))
    grads = grads_for(case, sequences)
    launches, found = plan_retention_bwd(*inputs, scale, packed, *grads, states=states, config=config)
    names = [launch.kernel.__name__ for launch in launches]
    assert "added_states_kernel" not in names
    assert names.count("retention_fwd_kernel") == 1
    with audit():
        run_launches(launches, case.q.device)
    assert_same(found, expected(case, grads, packed))


def test_a_forward_in_one_sweep_has_no_states_to_keep() -> None:
    case = RetentionCase.make(1, 20, 1, 8, 8, dtype=torch.float32)
    for T in (0, 1, 20):
        *_, states = retention_fwd(
            *(x[:, :T] for x in (case.q, case.k, case.v)), case.log_decay, None, 1.0, with_states=True
        )
        assert states is None


@every_schedule
def test_packed_sequences(schedule: str) -> None:
    """Empty ones first, between and last; of one token; that end with a stretch and within one."""
    bounds = torch.tensor(
        [0, 0, 32, 33, 33, 70, 70], dtype=torch.int32 if "split" in schedule else torch.int64
    )
    case = RetentionCase.make(1, 70, 1, 8, 24, dtype=torch.float32, sequences=6)
    config = tiles_for(case, schedule, cols=16)
    grads = grads_for(case, 6)
    found = run(case, grads, bounds, config)
    assert_same(found, expected(case, grads, bounds))
    for empty in (0, 3, 5):
        assert torch.equal(found[3][empty], grads[1][empty])


@two_schedules
def test_packed_is_the_same_as_separate(schedule: str) -> None:
    """To the bit; a sequence of one token alone has a kernel of its own, which rounds otherwise."""
    bounds = [0, 20, 22, 60]
    case = RetentionCase.make(1, 60, 2, 8, 8, dtype=torch.float32, sequences=3)
    config = tiles_for(case, schedule)
    out, state = grads_for(case, 3)
    found = run(case, (out, state), torch.tensor(bounds), config)
    separate = [
        run(
            case.part(start, stop, case.state[i : i + 1]),
            (out[:, start:stop], state[i : i + 1]),
            config=config,
        )
        for i, (start, stop) in enumerate(pairwise(bounds))
    ]
    for i, whole in enumerate(found):
        assert torch.equal(whole, torch.cat([part[i] for part in separate], dim=0 if i == 3 else 1))


@every_schedule
def test_no_packed_tokens(schedule: str) -> None:
    case = RetentionCase.make(1, 0, 2, 8, 8, dtype=torch.float32, sequences=2)
    grads = grads_for(case, 2)
    *_, state = run(case, grads, torch.tensor([0, 0, 0]), tiles_for(case, schedule))
    assert torch.equal(state, grads[1])


@pytest.mark.parametrize(
    ("bounds", "schedule"), [([0, 20, 10_000_000], "each, split"), ([-10_000_000, 20, 40], "both")]
)
def test_wrong_bounds_lead_nowhere(bounds: list[int], schedule: str) -> None:
    """On a GPU nobody checks their values; outside the tokens nothing is read or written."""
    case = RetentionCase.make(1, 40, 1, 8, 8, dtype=torch.float32, sequences=2)
    config = tiles_for(case, schedule)
    grads = grads_for(case, 2)
    right = run(case, grads, torch.tensor([0, 20, 40]), config)
    for a, e in zip(run(case, grads, torch.tensor(bounds), config), right, strict=True):
        assert torch.equal(a, e)


def resets_at(T: int, *rows: Sequence[int]) -> Tensor:
    """A mask (B, T) with resets at some tokens of each row."""
    return torch.stack([torch.isin(torch.arange(T), torch.tensor(tokens)) for tokens in rows])


@two_schedules
def test_resets(schedule: str) -> None:
    """At the first and the last token, in a row, where a chunk begins anyway, nowhere; never in a split."""
    case = RetentionCase.make(3, 50, 1, 24, 20, dtype=torch.float32)
    reset = resets_at(50, [0, 1, 2, 18, 19], [17, 33, 34, 49], [])
    check(case, config=tiles_for(case, schedule), reset=reset)


def test_resets_of_packed_sequences() -> None:
    case = RetentionCase.make(1, 40, 1, 8, 8, dtype=torch.float32, sequences=4)
    bounds = torch.tensor([0, 5, 5, 33, 40])
    check(case, bounds, tiles_for(case, "both"), reset=resets_at(40, [2, 5, 33, 39]))


def test_nothing_passes_a_reset() -> None:
    """A NaN before it or after it, in tokens and in gradients of outputs, stays there."""
    case = RetentionCase.make(2, 40, 1, 8, 8, dtype=torch.float32)
    grad_out, grad_state = grads_for(case)
    lost = torch.zeros(2, 40, dtype=torch.bool)
    lost[0, :21] = lost[1, 21:] = True
    broken = {
        name: getattr(case, name).masked_fill(lost[..., None, None], torch.nan) for name in ("q", "k", "v")
    }
    grads = grad_out.masked_fill(lost[..., None, None], torch.nan), grad_state
    reset = resets_at(40, [21], [21])
    *found, of_state = run(replace(case, **broken), grads, config=tiles_for(case, "both"), reset=reset)
    *wanted, state = expected(case, (grads[0].nan_to_num(0.0), grad_state), reset=reset)
    assert_same([*(x[~lost] for x in found), of_state[1:]], [*(x[~lost] for x in wanted), state[1:]])


def test_bounds_that_rise_and_fall_do_not_outgrow_the_scan() -> None:
    """They ask for 11 stretches; there is room for 40 // 16 + 5."""
    case = RetentionCase.make(1, 40, 1, 8, 8, dtype=torch.float32, sequences=5)
    config = tiles_for(case, "both, split", stretch=16)
    bounds = torch.tensor([0, 40, 0, 40, 0, 40])
    grads = grads_for(case, 5)
    tokens = (case.q, case.k, case.v, case.log_decay, case.state)
    launches, _ = plan_retention_bwd(
        *tokens, 1.0, bounds, *grads, needs=(False, True, True, True), config=config
    )
    states, scan, _ = launches
    run_launches([states], case.q.device)
    arguments = dict(scan.arguments)
    assert arguments["p_states"].shape[0] == 7
    arguments["p_states"] = torch.full((11, 1, 8, 8), 5.0)
    arguments["p_added"] = torch.zeros(11, 1, 8, 8)
    run_launches([replace(scan, arguments=arguments)], case.q.device)
    assert (arguments["p_states"][7:] == 5.0).all()


@pytest.mark.parametrize(("cut", "schedule"), [(1, "both"), (33, "each, split")])
def test_a_cut_sequence_with_carried_gradients_is_the_whole(cut: int, schedule: str) -> None:
    case = RetentionCase.make(1, 50, 1, 8, 24, dtype=torch.float32)
    config = tiles_for(case, schedule)
    out, state = grads_for(case)
    _, between = case.part(0, cut, case.state).run(backend="torch")
    later = run(case.part(cut, 50, between), (out[:, cut:], state), config=config)
    earlier = run(case.part(0, cut, case.state), (out[:, :cut], later[3]), config=config)
    joined = [torch.cat(pair, dim=1) for pair in zip(earlier[:3], later[:3], strict=True)]
    assert_same([*joined, earlier[3]], run(case, (out, state), config=config))


@pytest.mark.parametrize(("at", "schedule"), [(0, "each, split"), (17, "both"), (17, "each, split")])
def test_an_earlier_output_gives_nothing_to_later_tokens(at: int, schedule: str) -> None:
    case = RetentionCase.make(1, 50, 1, 8, 8, dtype=torch.float32)
    config = tiles_for(case, schedule)
    out, state = grads_for(case)
    changed = out.clone()
    changed[:, at] = 9.0
    before = run(case, (out, state), config=config)
    after = run(case, (changed, state), config=config)
    for a, b in zip(after[1:3], before[1:3], strict=True):
        assert torch.equal(a[:, at + 1 :], b[:, at + 1 :])
        assert not torch.equal(a[:, at], b[:, at])


@every_schedule
def test_nan_goes_where_it_belongs_and_nowhere_else(schedule: str) -> None:
    """Up to token 20 of one row and head, from one column of its gradient; masked lanes hold none."""
    case = with_gammas(RetentionCase.make(2, 37, 2, 8, 8, dtype=torch.float32), [0.5, 1.0])
    out, state = grads_for(case)
    out[1, 20, 1, 3] = math.nan
    dq, dk, dv, dstate = run(case, (out, state), config=tiles_for(case, schedule))
    # In a matrix product 0 · NaN is NaN, so a chunk's other rows have it too; those of other chunks have not.
    wanted = torch.zeros_like(dv, dtype=torch.bool)
    wanted[1, :32, 1, 3] = True
    assert torch.equal(dv.isnan(), wanted)
    assert dk[1, :21, 1].isnan().all()
    assert dq[1, 20, 1].isnan().all()
    for grad in (dk, dq):
        grad[1, :32, 1] = 0
        assert grad.isfinite().all()
    wanted = torch.zeros_like(dstate, dtype=torch.bool)
    wanted[1, 1, :, 3] = True
    assert torch.equal(dstate.isnan(), wanted)


@two_schedules
def test_float16(schedule: str) -> None:
    case = RetentionCase.make(1, 70, 2, 16, 24, dtype=torch.float16)
    check(case, config=tiles_for(case, schedule), limit=6e-4)


@two_schedules
def test_a_gradient_of_the_state_that_outgrows_float16(schedule: str) -> None:
    case = with_gammas(RetentionCase.make(1, 70, 2, 16, 16, dtype=torch.float16), [1.0, 1 - 2**-9])
    out, state = grads_for(case)
    case = replace(case, k=case.k * 1e-3, v=case.v * 1e-3)
    check(case, config=tiles_for(case, schedule), grads=(out, state * 3e5), needs=(0, 1, 1, 1), limit=6e-4)


@every_schedule
def test_gradients_too_small_for_float16_of_outputs_too_large(schedule: str) -> None:
    """Outputs of large states, kept in float32, have gradients of which float16 holds a few bits."""
    case = RetentionCase.make(1, 70, 2, 16, 24, dtype=torch.float16)
    case = replace(case, q=case.q * 30, k=case.k * 30, v=case.v * 30, state=case.state * 1e5)
    out, state = (1e-6 * grad.float() for grad in grads_for(case))
    check(case, config=tiles_for(case, schedule), grads=(out, state), limit=FLOAT16)


@pytest.mark.parametrize("T", [1, 40])
def test_a_gradient_in_float32_of_float16_tokens_alone(T: int) -> None:
    """Of queries, with the tiles of float16; and without a gradient of the outputs."""
    case = RetentionCase.make(2, T, 2, 16, 24, dtype=torch.float16)
    out, state = (grad.float() for grad in grads_for(case))
    check(case, grads=(out, None), needs=(True, False, False, False), limit=FLOAT16)
    check(case, grads=(None, state), limit=FLOAT16)


@pytest.mark.parametrize("stretch", [None, pytest.param(256, marks=pytest.mark.slow)])
def test_a_long_lived_gradient_gathers_no_bias(stretch: int | None) -> None:
    """The first state's gradient after 4,096 tokens at a time scale of 30,000."""
    T = 4096
    log_decay = torch.log1p(torch.tensor([-1 / 30_000], dtype=torch.float64)).float()
    q = normal(1, T, 1, 8, seed=0, dtype=torch.float32)
    out = normal(1, T, 1, 8, seed=1, dtype=torch.float32)
    case = RetentionCase(q=q, k=q, v=q, log_decay=log_decay, state=torch.zeros(1, 1, 8, 8))
    config = tiles_for(case, "both", tile=64, stretch=stretch)
    *_, found = retention_bwd(
        q, q, q, log_decay, case.state, 1.0, None, out, None, needs=(0, 0, 0, 1), config=config
    )
    weights = torch.exp(log_decay.double() * torch.arange(1, T + 1)).view(1, T, 1, 1)
    wanted = torch.einsum("bthk,bthv->bhkv", q.double() * weights, out.double())
    assert largest_error(found, wanted, tokens_dim=None) <= 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "default"])
@pytest.mark.parametrize("T", [63, 130, 257])
@pytest.mark.parametrize(("Dk", "Dv"), [(8, 100), (24, 24), (60, 60), (100, 256), (128, 64), (256, 128)])
def test_the_longer_matrix(Dk: int, Dv: int, T: int, schedule: str, packed: bool) -> None:
    bounds = torch.tensor([0, T // 3, T // 3, T // 2 + 1, T]) if packed else None
    case = RetentionCase.make(1, T, 3, Dk, Dv, dtype=torch.float32, seed=T, sequences=4 if packed else None)
    check(case, bounds, None if schedule == "default" else tiles_for(case, schedule, tile=32))


# ---- The choice of tiles and schedule: plain functions of shapes and of the number of multiprocessors ----


def choose(
    tokens: int,
    sequences: int,
    num_heads: int,
    head_dims: tuple[int, int] = (64, 64),
    *,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
    architecture: str = "sm_90",
) -> RetentionBwdConfig:
    return retention_bwd_config(
        tokens=tokens,
        sequences=sequences,
        num_heads=num_heads,
        head_dims=head_dims,
        dtype=dtype,
        precision=precision,
        architecture=architecture,
        multiprocessors=132,
    )


def test_one_sweep_for_both_where_a_program_holds_the_state() -> None:
    """Up to 64, on sm_90 up to 128, all in one program; two beyond, and for float32 without tf32."""
    for head_dims in ((8, 8), (64, 64), (24, 60), (65, 8), (8, 128), (128, 128)):
        both = choose(64 * 4096, 64, 16, head_dims).both
        assert both is not None
        assert both.cols_v == padded(head_dims[1])
    for head_dims in ((256, 256), (8, 129)):
        assert choose(64 * 4096, 64, 16, head_dims).both is None
    for B, cols in ((64, 128), (1, 32)):  # slices of 256 columns, wide where they are programs enough
        config = choose(B * 1024, B, 16, (256, 256))
        assert {config.keys.cols_v, config.values.cols_v} == {cols}
    assert choose(64 * 4096, 64, 16, (128, 128), architecture="sm_80").both is None
    assert choose(64 * 4096, 64, 16, (128, 128), dtype=torch.float32).both is None
    assert choose(4096, 64, 16, dtype=torch.float32).both is None
    assert choose(4096, 64, 16, dtype=torch.float32, precision="tf32").both is not None


def test_a_whole_state_keeps_the_multiprocessors_busy() -> None:
    """A program has one for itself: 141 programs take as long as 264. Where it does not, there is a split."""

    def chosen(B: int, T: int, H: int) -> RetentionBwdConfig:
        return choose(B * T, B, H, (128, 128))

    assert chosen(1, 512, 80).both is not None
    for H in (79, 141):
        assert chosen(1, 512, H).both is None  # of 132 multiprocessors
        assert chosen(1, 512, H).queries is None
    assert chosen(1, 8192, 80).stretch is None
    assert chosen(1, 8192, 79).stretch == 2752  # 3 stretches: 237 programs in 2 rounds
    split = chosen(1, 8192, 4)
    assert split.both is not None
    assert split.queries is not None
    assert split.stretch == split.queries.stretch == 512
    assert split.queries.cols_v == split.states.cols_v == 128


def test_a_whole_state_of_128_columns() -> None:
    case = RetentionCase.make(1, 70, 1, 100, 128, dtype=torch.float16)
    for split in (False, True):
        config = choose(64 * 4096, 1 if split else 64, 1 if split else 16, (100, 128))
        assert config.both is not None
        assert config.both.cols_v == 128
        assert (config.stretch is not None) == split
        if split:
            config = replace(config, stretch=64, queries=replace(config.queries, stretch=64))
        check(case, config=config, limit=6e-4)


def test_the_sweep_for_keys_is_that_for_values_with_dims_swapped() -> None:
    config = choose(64 * 4096, 64, 16, (64, 256))
    assert config.values == choose(64 * 4096, 64, 16, (256, 64)).keys
    assert config.values != config.keys


def test_the_schedule_fills_the_gpu() -> None:
    assert choose(16 * 4096, 16, 16).stretch is None  # 256 programs
    assert choose(8 * 4096, 8, 16).stretch == 1408  # 128 programs, so 3 stretches, rounded up to chunks of 64
    assert choose(64 * 4096, 64, 16, (128, 128)).values.cols_v == 64
    assert choose(2 * 2047, 2, 16, (128, 128)).values.cols_v == 32
    assert choose(2 * 4096, 2, 16, (128, 128)).values.cols_v == 64
    assert choose(2 * 4096, 2, 16, (128, 128)).stretch == 1024  # 32 programs a stretch: 4 for one an SM
    assert choose(65_536, 1, 4).stretch == 1024  # 4 programs a stretch: 66 for two a multiprocessor
    assert choose(2047, 1, 1).stretch is None
    assert choose(2048, 1, 1).stretch == 256


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_fit_the_head_dims(dtype: torch.dtype, architecture: str) -> None:
    for Dk, Dv in itertools.product((1, 8, 24, 60, 64, 100, 128, 256), repeat=2):
        for tokens in (1, 650, 100_000):
            config = choose(tokens, 1, 2, (Dk, Dv), dtype=dtype, architecture=architecture)
            for sweep, columns in ((config.keys, Dk), (config.values, Dv)):
                assert 16 <= sweep.cols_v <= padded(columns)
                assert config.stretch is None or config.stretch % sweep.tile == 0


@pytest.mark.parametrize("head_dims", [(257, 8), (8, 257)])
def test_a_head_dim_that_no_program_holds(head_dims: tuple[int, int]) -> None:
    q, v = (torch.empty(1, 3, 2, dim, device="meta") for dim in head_dims)
    with pytest.raises(ValueError, match=r"retention_bwd\(\): \(Dk, Dv\) is .*257.*at most 256 of each"):
        plan_retention_bwd(q, q, v, torch.empty(2, device="meta"), None, 1.0, None, v, None)
