"""`retention_fwd` in Triton's interpreter against the reference, and the choice of its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from retention_cases import RetentionCase, assert_same_results, normal
from torch import Tensor

from benchmarks.kernel_audit.programs import H200, SHAPES, launches
from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import (
    MOST_PACKED_IN_A_SPLIT,
    SHORTEST_STRETCH,
    SPLIT_FROM,
    RetentionConfig,
    enough,
    padded,
    retention_config,
    retention_tiles,
)
from retpop.kernels.configs_bwd import BUSY_ENOUGH, busy
from retpop.kernels.gpus import SHARED_MEMORY
from retpop.kernels.launch import Target
from retpop.kernels.launch import run as run_launches
from retpop.kernels.retention_fwd import plan_retention_fwd, retention_fwd

LIMIT = 5e-6

# Tokens that a stretch has in a forced split; None is one sweep.
SCHEDULES = {"sweep": None, "split": 32}


def tiles_for(case: RetentionCase, stretch: int | None = None, **changes: int) -> RetentionConfig:
    """The default tiles of float32, with a schedule."""
    head_dims = (case.q.shape[-1], case.v.shape[-1])
    return replace(retention_tiles(head_dims, torch.float32, "ieee", "sm_90"), stretch=stretch, **changes)


def run(
    case: RetentionCase,
    cu_seqlens: Tensor | None = None,
    config: RetentionConfig | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`retention_fwd` of a case; it must leave its inputs as they are, and its accesses are audited."""
    tensors = [case.q, case.k, case.v, case.log_decay, case.state, cu_seqlens, reset]
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    scale = case.q.shape[-1] ** -0.5
    with audit():
        out, state = retention_fwd(
            case.q, case.k, case.v, case.log_decay, case.state, scale, cu_seqlens, reset, config=config
        )
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))
    assert (out.dtype, state.dtype) == (case.v.dtype, torch.float32)
    assert out.is_contiguous()
    assert state.is_contiguous()
    return out, state


def check(
    case: RetentionCase,
    cu_seqlens: Tensor | None = None,
    config: RetentionConfig | None = None,
    limits: tuple[float, float] = (LIMIT, LIMIT),
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare with the reference in float64."""
    results = run(case, cu_seqlens, config, reset)
    expected = case.double().run(backend="reference", cu_seqlens=cu_seqlens, reset=reset)
    assert_same_results(results, expected, *limits)
    return results


def resets_at(T: int, *rows: Sequence[int]) -> Tensor:
    """A mask (B, T) with resets at some tokens of each row."""
    return torch.stack([torch.isin(torch.arange(T), torch.tensor(tokens)) for tokens in rows])


def with_gammas(case: RetentionCase, gammas: list[float]) -> RetentionCase:
    logs = [math.log(gamma) if gamma else -math.inf for gamma in gammas]
    return replace(case, log_decay=torch.tensor(logs, dtype=torch.float64).float())


@pytest.mark.parametrize(
    ("T", "Dk", "Dv", "schedule"),
    [
        (1, 8, 8, "split"),
        (7, 24, 60, "sweep"),
        (16, 16, 16, "split"),
        (33, 60, 100, "sweep"),
        (33, 60, 100, "split"),
        (65, 8, 24, "split"),
        (130, 24, 16, "sweep"),
    ],
)
def test_lengths_and_head_dims(T: int, Dk: int, Dv: int, schedule: str) -> None:
    B, H = (2, 3) if T < 33 else (1, 2)
    case = RetentionCase.make(B, T, H, Dk, Dv, dtype=torch.float32, seed=T, with_state=T != 65)
    check(case, config=tiles_for(case, SCHEDULES[schedule]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_every_size_of_a_chunk(rows: int, schedule: str) -> None:
    case = RetentionCase.make(1, 130, 1, 24, 24, dtype=torch.float32, seed=rows)
    stretch, scale_v = (None, rows == 32) if schedule == "sweep" else (64, rows != 32)
    check(case, config=tiles_for(case, stretch, rows=rows, cols_v=16, scale_v=scale_v))


@pytest.mark.parametrize(("Dk", "Dv"), [(128, 128), (256, 8), (8, 256), (100, 24)])
def test_large_head_dims_with_the_default_config(Dk: int, Dv: int) -> None:
    check(RetentionCase.make(1, 33, 1, Dk, Dv, dtype=torch.float32))


@pytest.mark.parametrize(("T", "schedule"), [(33, "split"), (47, "sweep"), (48, "split")])
def test_any_decay_with_a_partial_chunk(T: int, schedule: str) -> None:
    case = RetentionCase.make(1, T, 8, 8, 8, dtype=torch.float32)
    case = with_gammas(case, [0.0, 1e-30, 0.01, 0.1, 0.2, 0.5, 1 - 2**-20, 1.0])
    check(case, config=tiles_for(case, SCHEDULES[schedule]))


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_do(B: int, T: int, with_state: bool) -> None:
    case = RetentionCase.make(B, T, 2, 8, 24, dtype=torch.float32, with_state=with_state)
    out, state = run(case)
    assert out.shape == (B, T, 2, 24)
    assert torch.equal(state, case.state if with_state else torch.zeros(B, 2, 8, 24))
    if B and with_state:
        assert state.data_ptr() != case.state.data_ptr()


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
        "last dim expanded": replace(case, k=case.k[..., :1].expand(B, T, H, Dk)),
        "state expanded": replace(case, state=case.state[:1, :1].expand_as(case.state)),
        "state transposed": replace(case, state=case.state.transpose(0, 1).contiguous().transpose(0, 1)),
        "decay expanded": replace(case, log_decay=case.log_decay[:1].expand_as(case.log_decay)),
    }


@pytest.mark.parametrize("layout", list(layouts(RetentionCase.make(2, 3, 2, 8, 8))))
def test_layouts(layout: str) -> None:
    case = layouts(RetentionCase.make(2, 19, 2, 8, 8, dtype=torch.float32))[layout]
    check(case, config=tiles_for(case))


@pytest.mark.parametrize("layout", ["one projection", "last dim strided", "state transposed"])
def test_layouts_of_split_sequences(layout: str) -> None:
    """Kernels of their own read k, v and the state; the others are read as above."""
    case = layouts(RetentionCase.make(2, 19, 2, 8, 8, dtype=torch.float32))[layout]
    check(case, config=tiles_for(case, 16))


@pytest.mark.parametrize(("stretch", "dtype"), [(None, torch.int32), (16, torch.int64), (32, torch.int32)])
def test_packed_sequences(stretch: int | None, dtype: torch.dtype) -> None:
    """Empty ones first, between and last; of one token; that end with a stretch and within one."""
    bounds = torch.tensor([0, 0, 32, 33, 33, 70, 70], dtype=dtype)
    case = RetentionCase.make(1, 70, 1, 8, 24, dtype=torch.float32, sequences=6)
    config = tiles_for(case, stretch, cols_v=16)
    _, state = check(case, bounds, config)
    for empty in (0, 3, 5):
        assert torch.equal(state[empty], case.state[empty])


@pytest.mark.parametrize("stretch", [None, 16])
def test_packed_is_the_same_as_separate(stretch: int | None) -> None:
    bounds = [0, 20, 21, 60]
    case = RetentionCase.make(1, 60, 2, 8, 8, dtype=torch.float32, with_state=False, sequences=3)
    config = tiles_for(case, stretch)
    out, states = run(case, torch.tensor(bounds), config)
    separate = [run(case.part(start, stop, None), config=config) for start, stop in pairwise(bounds)]
    assert torch.equal(out, torch.cat([out for out, _ in separate], dim=1))
    assert torch.equal(states, torch.cat([state for _, state in separate]))


def test_strided_bounds() -> None:
    case = RetentionCase.make(1, 20, 1, 8, 8, dtype=torch.float32, sequences=2)
    check(case, torch.tensor([0, 9, 7, 9, 20, 9])[::2])


@pytest.mark.parametrize("stretch", [None, 16])
def test_no_packed_tokens(stretch: int | None) -> None:
    case = RetentionCase.make(1, 0, 2, 8, 8, dtype=torch.float32, sequences=2)
    out, state = run(case, torch.tensor([0, 0, 0]), tiles_for(case, stretch))
    assert out.shape == (1, 0, 2, 8)
    assert torch.equal(state, case.state)
    out, state = run(replace(case, state=None), torch.tensor([0]))
    assert state.shape == (0, 2, 8, 8)


@pytest.mark.parametrize("stretch", [None, 16])
@pytest.mark.parametrize("bounds", [[0, 20, 10_000_000], [-10_000_000, 20, 40]])
def test_wrong_bounds_lead_nowhere(bounds: list[int], stretch: int | None) -> None:
    """On a GPU nobody checks their values; outside the tokens nothing is read or written."""
    case = RetentionCase.make(1, 40, 1, 8, 8, dtype=torch.float32, sequences=2)
    config = tiles_for(case, stretch)
    right = run(case, torch.tensor([0, 20, 40]), config)
    assert_same_results(run(case, torch.tensor(bounds), config), right, 0.0)


def test_bounds_that_rise_and_fall_do_not_outgrow_the_scan() -> None:
    """They ask for 11 stretches; there is room for 40 // 16 + 5."""
    case = RetentionCase.make(1, 40, 1, 8, 8, dtype=torch.float32, sequences=5)
    launches, (_, state) = plan_retention_fwd(
        case.q,
        case.k,
        case.v,
        case.log_decay,
        case.state,
        1.0,
        torch.tensor([0, 40, 0, 40, 0, 40]),
        config=tiles_for(case, 16),
    )
    states, scan, _ = launches
    run_launches([states], state.device)
    arguments = dict(scan.arguments)
    assert arguments["p_states"].shape[0] == 7
    arguments["p_states"] = torch.full((11, 1, 8, 8), 5.0)
    run_launches([replace(scan, arguments=arguments)], state.device)
    assert (arguments["p_states"][7:] == 5.0).all()
    assert (arguments["p_states"][:7] != 5.0).all()


@pytest.mark.parametrize(("cut", "schedule"), [(1, "sweep"), (16, "split"), (33, "sweep"), (33, "split")])
def test_a_cut_sequence_with_carried_state_is_the_whole(cut: int, schedule: str) -> None:
    case = RetentionCase.make(1, 66, 2, 8, 24, dtype=torch.float32)
    config = tiles_for(case, SCHEDULES[schedule])
    first, between = run(case.part(0, cut, case.state), config=config)
    second, last = run(case.part(cut, 66, between), config=config)
    assert_same_results((torch.cat((first, second), dim=1), last), run(case, config=config), LIMIT)


@pytest.mark.parametrize(("at", "schedule"), [(0, "split"), (17, "sweep"), (63, "split")])
def test_a_later_token_changes_nothing_earlier(at: int, schedule: str) -> None:
    case = RetentionCase.make(1, 66, 2, 8, 8, dtype=torch.float32)
    config = tiles_for(case, SCHEDULES[schedule])
    changed = {name: getattr(case, name).clone() for name in "qkv"}
    for tensor in changed.values():
        tensor[:, at] = 9.0
    before, _ = run(case, config=config)
    after, _ = run(replace(case, **changed), config=config)
    assert torch.equal(after[:, :at], before[:, :at])
    assert not torch.equal(after[:, at], before[:, at])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nan_goes_where_it_belongs_and_nowhere_else(schedule: str) -> None:
    """From token 20 of one row and head on, in one column of v; masked lanes of a partial chunk hold none."""
    case = with_gammas(RetentionCase.make(2, 37, 2, 8, 8, dtype=torch.float32), [0.5, 1.0])
    case.v[1, 20, 1, 3] = math.nan
    out, state = run(case, config=tiles_for(case, SCHEDULES[schedule]))
    expected_out = torch.zeros_like(out, dtype=torch.bool)
    expected_out[1, 20:, 1, 3] = True
    # The row of its chunk before it: 0 · NaN is NaN, in a matrix product as anywhere.
    expected_out[1, 16:20, 1, 3] = True
    assert torch.equal(out.isnan(), expected_out)
    expected_state = torch.zeros_like(state, dtype=torch.bool)
    expected_state[1, 1, :, 3] = True
    assert torch.equal(state.isnan(), expected_state)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float16(schedule: str) -> None:
    case = RetentionCase.make(1, 70, 2, 16, 24, dtype=torch.float16)
    check(case, config=tiles_for(case, SCHEDULES[schedule]), limits=(5e-4, 3.5e-4))


def test_a_float16_state_outgrows_float16() -> None:
    """Slow decays add up to states beyond 65,504, which float16 does not hold; the outputs here it does."""
    case = with_gammas(RetentionCase.make(1, 70, 2, 16, 16, dtype=torch.float16), [1.0, 1 - 2**-9])
    case = replace(case, q=case.q * 1e-3, v=case.v + 30, state=case.state * 3e5)
    _, state = check(case, config=tiles_for(case), limits=(5e-4, 3.5e-4))
    assert state.abs().max() > 1e5


@pytest.mark.parametrize("T", [1, 40])
def test_an_output_that_outgrows_float16(T: int) -> None:
    """In float32 it is what the reference finds for these tokens; one token takes the kernel of steps."""
    case = with_gammas(RetentionCase.make(2, T, 2, 16, 16, dtype=torch.float16), [1.0, 1 - 2**-9])
    case = replace(case, v=case.v + 30, state=case.state * 3e5)
    with audit():
        results = retention_fwd(
            case.q, case.k, case.v, case.log_decay, case.state, 0.25, out_dtype=torch.float32
        )
    assert results[0].dtype is torch.float32
    assert results[0].abs().max() > 65504
    assert_same_results(results, case.double().run(backend="reference"), 5e-4, 3.5e-4)


@pytest.mark.parametrize("rows", [16, 32])
def test_resets(rows: int) -> None:
    """At the first and the last token, in a row, where a chunk ends anyway, nowhere; never in a split."""
    case = RetentionCase.make(3, 70, 2, 24, 20, dtype=torch.float32)
    reset = resets_at(70, [0, 1, 2, rows + 2, rows + 3], [rows - 1, 2 * rows - 1, 69], [])
    check(case, config=tiles_for(case, rows=rows, stretch=32), reset=reset)


def test_a_reset_after_more_tokens_than_are_counted_at_once() -> None:
    case = RetentionCase.make(1, 1100, 1, 8, 8, dtype=torch.float32, with_state=False)
    check(case, config=tiles_for(case, rows=64), reset=resets_at(1100, [7, 1023, 1024, 1030]))


def test_resets_of_packed_sequences() -> None:
    """Sequences of no token, too; what comes after a sequence is another's."""
    case = RetentionCase.make(1, 40, 1, 8, 8, dtype=torch.float32, sequences=4)
    bounds = torch.tensor([0, 5, 5, 33, 40])
    check(case, bounds, tiles_for(case, rows=16), reset=resets_at(40, [2, 5, 33, 39]))


def test_nothing_passes_a_reset() -> None:
    case = RetentionCase.make(1, 40, 1, 8, 8, dtype=torch.float32)
    reset = resets_at(40, [21])
    expected = run(case.part(21, 40, None))
    for name in ("q", "k", "v"):
        getattr(case, name)[:, :21] = torch.nan
    out, state = run(replace(case, state=torch.full_like(case.state, torch.inf)), reset=reset)
    assert out[:, :21].isnan().all()
    assert_same_results((out[:, 21:], state), expected, LIMIT)


def test_one_token_takes_the_kernel_of_steps() -> None:
    """But not with tiles of the caller's, nor packed: the length of a sequence is then on the device."""
    case = RetentionCase.make(3, 1, 2, 8, 24, dtype=torch.float32)
    check(case)
    check(case, config=tiles_for(case))
    inputs = (case.q, case.k, case.v, case.log_decay, None, 1.0)
    kernels = []
    for bounds, config in ((None, None), (None, tiles_for(case)), (torch.tensor([0, 1]), None)):
        (launch,), (out, _) = plan_retention_fwd(*inputs, bounds, config=config)
        assert out.shape == case.v.shape
        kernels.append(launch.kernel.__name__)
    assert kernels == ["retention_step_kernel", "retention_fwd_kernel", "retention_fwd_kernel"]
    (launch,), _ = plan_retention_fwd(*inputs, with_final=False)
    assert launch.arguments["p_new_state"] is None


def longest_lived_state_error(T: int, time_scale: float, config: RetentionConfig) -> float:
    """RMS error of the final state of one head after T tokens, relative to its RMS."""
    log_decay = torch.log1p(torch.tensor([-1 / time_scale], dtype=torch.float64)).float()
    k, v = (normal(1, T, 1, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    case = RetentionCase(q=torch.zeros_like(k), k=k, v=v, log_decay=log_decay, state=None)
    exact = case.double()
    weights = (exact.log_decay * torch.arange(T - 1, -1, -1)).exp()
    expected = torch.einsum("bthk,bthv,t->bhkv", exact.k, exact.v, weights)
    _, state = run(case, config=config)
    return ((state - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_a_state_that_lives_long_gathers_no_bias() -> None:
    """A rounded γ^n would err in one direction at every chunk; here the state lives for 8,192 tokens."""
    case = RetentionCase.make(1, 1, 1, 8, 8, dtype=torch.float32)
    assert longest_lived_state_error(8192, 30_000, tiles_for(case, rows=64)) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("stretch", [None, 256])
@pytest.mark.parametrize("time_scale", [2.0, 37.0, 1000.0, 7000.0, 30_000.0])
def test_no_bias_with_the_chunks_of_float32(time_scale: float, stretch: int | None) -> None:
    case = RetentionCase.make(1, 1, 1, 8, 8, dtype=torch.float32)
    assert longest_lived_state_error(8192, time_scale, tiles_for(case, stretch)) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("stretch", [None, 64])
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize(("Dk", "Dv"), [(8, 8), (24, 60), (60, 24), (100, 128), (64, 64), (256, 16)])
def test_the_long_matrix(T: int, Dk: int, Dv: int, stretch: int | None) -> None:
    # One token without a state is q · k alone, which may nearly cancel: no float32 is then right to 5e-6.
    for with_state, rows in ((True, 16), (T == 1, 64)):
        case = RetentionCase.make(2, T, 2, Dk, Dv, dtype=torch.float32, seed=T + Dk, with_state=with_state)
        check(case, config=tiles_for(case, stretch, rows=rows, cols_v=min(64, padded(Dv))))


@pytest.mark.slow
@pytest.mark.parametrize("stretch", [None, 128])
def test_ten_blocks_of_rem(stretch: int | None) -> None:
    case = RetentionCase.make(2, 650, 4, 64, 64, dtype=torch.float32)
    check(case, config=tiles_for(case, stretch, rows=64))


@pytest.mark.slow
@pytest.mark.parametrize("stretch", [None, 256])
def test_four_thousand_tokens(stretch: int | None) -> None:
    case = RetentionCase.make(1, 4096, 6, 16, 16, dtype=torch.float32)
    check(case, config=tiles_for(case, stretch, rows=64))


# ---- The choice of tiles and schedule: plain functions of shapes and of the number of multiprocessors ----


def choose(
    tokens: int,
    sequences: int,
    num_heads: int,
    head_dim: int = 64,
    *,
    dtype: torch.dtype = torch.bfloat16,
    architecture: str = "sm_90",
    multiprocessors: int = 132,
) -> RetentionConfig:
    return retention_config(
        tokens=tokens,
        sequences=sequences,
        num_heads=num_heads,
        head_dims=(head_dim, head_dim),
        dtype=dtype,
        precision="ieee",
        architecture=architecture,
        multiprocessors=multiprocessors,
    )


def test_the_schedule_fills_the_gpu() -> None:
    full = choose(64 * 4096, sequences=64, num_heads=16)
    assert (full.stretch, full.cols_v) == (None, 64)
    narrow = choose(8 * 4096, sequences=8, num_heads=16)  # 128 programs of 64 columns for 132 multiprocessors
    assert (narrow.stretch, narrow.cols_v) == (None, 32)
    assert choose(8 * 4096, sequences=8, num_heads=16, multiprocessors=68).cols_v == 64

    split = choose(65_536, sequences=1, num_heads=4)  # 4 programs, so 66 stretches for two a multiprocessor
    assert split.cols_v == 64
    assert split.stretch == 1024  # 65,536 / 66, rounded up to chunks of 64
    assert choose(65_536, sequences=1, num_heads=4, multiprocessors=16).stretch == 8192
    assert choose(65_536, sequences=1, num_heads=4, multiprocessors=4) == narrow


@pytest.mark.parametrize(
    ("programs", "is_enough"), [(264, True), (256, True), (248, True), (247, False), (128, False)]
)
def test_two_programs_a_multiprocessor_are_enough(programs: int, is_enough: bool) -> None:
    assert enough(programs, 132, cols_k=128) is is_enough


@pytest.mark.parametrize(("programs", "is_enough"), [(80, True), (79, False), (158, False), (159, True)])
def test_programs_of_256_columns_have_a_multiprocessor_each(programs: int, is_enough: bool) -> None:
    assert enough(programs, 132, cols_k=256) is is_enough


def test_slices_of_256_columns_are_as_wide_as_programs_are_enough() -> None:
    """In two slices q and k are read twice; 40 heads of a short sequence are 80 programs."""
    assert [choose(2047, 1, H, head_dim=256).cols_v for H in (1, 20, 33, 40, 64)] == [32, 64, 64, 128, 128]


def test_slices_of_many_columns_are_cut_in_time_first() -> None:
    """Four slices would each read all of q and k, which the cache cannot give fast enough."""
    config = choose(8192, sequences=1, num_heads=96, head_dim=128)
    assert (config.cols_v, config.stretch) == (64, 4096)
    assert choose(2047, sequences=1, num_heads=96, head_dim=128).cols_v == 32


def test_every_walk_has_two_waves_or_the_shortest_stretches() -> None:
    """One wave is enough of programs that hold a whole state of 128 columns, each on an SM of its own."""
    for shape in SHAPES:
        for _, launch in launches(shape):
            few = not enough(launch.grid[0], H200.multiprocessors, padded(shape.D))
            if launch.arguments.get("COLS_V") == 128:
                few = busy(launch.grid[0], H200.multiprocessors) < BUSY_ENOUGH
            if few and launch.kernel.__name__ != "scan_states_kernel" and shape.T >= SPLIT_FROM:
                assert launch.arguments["stretch"] == max(SHORTEST_STRETCH, 4 * shape.D), shape


def test_a_split_waits_for_long_sequences() -> None:
    assert choose(2047, sequences=1, num_heads=1).stretch is None
    assert choose(2048, sequences=1, num_heads=1).stretch == 256
    assert choose(4095, sequences=2, num_heads=1).stretch is None
    assert choose(4096, sequences=2, num_heads=1).stretch == 256
    assert choose(2048, sequences=1, num_heads=1, head_dim=256).stretch == 1024


def test_a_split_has_a_limit_of_sequences() -> None:
    most = MOST_PACKED_IN_A_SPLIT
    assert choose(4096 * most, most, 1, multiprocessors=10_000).stretch is not None
    assert choose(4096 * (most + 1), most + 1, 1, multiprocessors=10_000).stretch is None


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_fit_the_head_dims(dtype: torch.dtype, architecture: str) -> None:
    for head_dim in (1, 8, 24, 60, 64, 100, 128, 256):
        for tokens in (1, 650, 100_000):
            config = choose(tokens, 1, 2, head_dim, dtype=dtype, architecture=architecture)
            assert config.cols_k == padded(head_dim)
            assert 16 <= config.cols_v <= padded(head_dim)
            assert config.stretch is None or config.stretch % config.rows == 0
            if dtype is torch.float32:
                assert config.rows == 16


def test_narrow_copies_have_more_warps_where_registers_run_out() -> None:
    """A head dim of 100 makes copies of 8 bytes; with 4 warps they cost sm_90 a stack."""
    for head_dim, num_warps in ((100, 8), (104, 4), (128, 4), (60, 4)):
        assert choose(650, 1, 2, head_dim).num_warps == num_warps
    assert choose(650, 1, 2, 100, architecture="sm_80").num_warps == 4


@pytest.mark.parametrize(("head_dim", "unit"), [(60, 4), (100, 4), (24, 8), (64, 1), (33, 1)])
@pytest.mark.parametrize("T", [65, 65_536])
def test_strides_are_counted_in_what_divides_them(T: int, head_dim: int, unit: int) -> None:
    """So the compiler knows how wide it may copy, whatever the head dim; Triton sees only multiples of 16."""
    q = torch.empty(1, T, 3, head_dim, dtype=torch.bfloat16, device="meta")
    launches, _ = plan_retention_fwd(
        q, q, q, torch.empty(3, device="meta"), None, 0.125, target=Target("sm_90", 132)
    )
    counted = [launch.arguments for launch in launches if "UNIT" in launch.arguments]
    assert len(counted) == (1 if T == 65 else 2)
    for arguments in counted:
        assert arguments["UNIT"] == unit
        first = "q" if "p_q" in arguments else "k"  # the others' strides equal the first's, and are None
        assert [unit * arguments[f"stride_{first}_{dim}"] for dim in "bth"] == [*q.stride()[:3]]


def test_a_key_dim_that_no_program_holds() -> None:
    q = torch.empty(1, 3, 2, 257, device="meta")
    with pytest.raises(ValueError, match=r"retention_fwd\(\): Dk is 257; the kernel takes at most 256"):
        plan_retention_fwd(q, q, q, torch.empty(2, device="meta"), None, 1.0)


def test_the_default_is_the_chosen_schedule() -> None:
    q = torch.empty(1, 65_536, 4, 64, dtype=torch.bfloat16, device="meta")
    log_decay = torch.empty(4, device="meta")
    for target in (Target("sm_80", 108), Target("sm_90", 132), Target("gfx942", 304)):
        launches, _ = plan_retention_fwd(q, q, q, log_decay, None, 0.125, target=target)
        assert len(launches) == 3
        short, _ = plan_retention_fwd(*(q[:, :650],) * 3, log_decay, None, 0.125, target=target)
        assert len(short) == 1
        assert short[0].grid == (4 * (64 // short[0].arguments["COLS_V"]),)
