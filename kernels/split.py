"""Sequences cut into stretches: each program's stretch, what it adds to the state, and a scan over stretches.

A *stretch* is a run of tokens of one sequence that one program walks, chunk by chunk. Where batch x heads x
slices leave much of a GPU idle, sequences are split into several: first what each stretch of n tokens adds to
the state, then a scan over the stretches of a sequence, then each stretch from its own state.

    A_m = Σ_j γ^(n-1-j) k_jᵀ v_j,    S_(m+1) = γ^n S_m + A_m

Backwards E_m = γ^n E_(m+1) + A_m, with A_m from a reverse sweep. POP's blocks are stretches of L tokens, and
a boundary after the last block is one of no tokens.

A head that keeps at most 2^-24 of a state, a rounding error of float32, over half a stretch needs no scan:
its programs start each stretch some tokens early, from zeros. Kernels find such heads on the device, by one
comparison (`forgets`). The limit is the same for 16-bit tokens, because one old token may outweigh thousands
of others. Only what is 2^24 times as large as the rest, or is not finite, makes a difference: it is not seen
past the stretch after its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .configs import MOST_PACKED_IN_A_SPLIT, SCAN_TILE, PopConfig, RetentionConfig, padded
from .launch import Launch, named_strides, token_strides

# Arguments that differ from call to call: none of their values compiles a kernel anew.
RUN_TIME = ["H", "T", "num_sequences", "stretch", "per_sequence"]

FORGOTTEN = tl.constexpr(24 * math.log(2))
"""-ln of what counts as nothing."""


@triton.jit
def forgets(log_decay, stretch):
    """Whether γ^n is at most 2^-24 for half a stretch, so that a program may start it early."""
    return -log_decay * stretch >= 2 * FORGOTTEN


@triton.jit
def early_tokens(log_decay, stretch, ROWS: tl.constexpr):
    """The tokens by which a stretch starts early, whole chunks: γ^n is then at most 2^-24; 0: in time."""
    is_early = forgets(log_decay, stretch)
    exponent = tl.where(is_early, -log_decay, 1.0)
    chunks = (1.0 / exponent * (FORGOTTEN / ROWS)).to(tl.int32) + 1
    return tl.where(is_early, chunks * ROWS, 0)


@triton.jit
def inside(bound, T):
    """A boundary of packed sequences, clamped so that a wrong one cannot lead outside the T tokens."""
    return tl.minimum(tl.maximum(bound, 0), T).to(tl.int32)


@triton.jit
def count_stretches(p_bounds, T, num_sequences, stretch, SEQUENCES: tl.constexpr):
    """The number of stretches of each packed sequence: at least one, and 0 past the last sequence."""
    o_s = tl.arange(0, SEQUENCES)
    m_s = o_s < num_sequences
    b_start = inside(tl.load(p_bounds + o_s, mask=m_s, other=0), T)
    b_end = inside(tl.load(p_bounds + o_s + 1, mask=m_s, other=0), T)
    return tl.where(m_s, tl.maximum(tl.cdiv(b_end - b_start, stretch), 1), 0)


@triton.jit
def find_stretch(i_n, p_bounds, T, num_sequences, stretch, per_sequence, SEQUENCES: tl.constexpr):
    """Stretch i_n: its sequence, the sequence's row in the batch, first token and end; those of the sequence.

    A stretch that is left over has no tokens, and its sequence ends at -1. SEQUENCES is a power of two above
    num_sequences in a split of packed sequences, otherwise 0.
    """
    i_row = 0
    here = i_n >= 0
    if p_bounds is None:
        i_s = i_n // per_sequence
        i_row = i_s
        first = 0
        start = (i_n % per_sequence) * stretch
        last = T
    elif SEQUENCES == 0:
        i_s = i_n
        first = inside(tl.load(p_bounds + i_s), T)
        start = first
        last = inside(tl.load(p_bounds + i_s + 1), T)
    else:
        b_count = count_stretches(p_bounds, T, num_sequences, stretch, SEQUENCES)
        m_before = tl.cumsum(b_count, 0) <= i_n
        i_s = tl.sum(m_before.to(tl.int32), 0)
        here = i_s < num_sequences
        i_s = tl.minimum(i_s, num_sequences - 1)
        i_stretch = i_n - tl.sum(tl.where(m_before, b_count, 0), 0)
        first = inside(tl.load(p_bounds + i_s), T)
        start = first + i_stretch * stretch
        last = inside(tl.load(p_bounds + i_s + 1), T)
    length = tl.where(here, tl.minimum(last - start, stretch), 0)
    return i_s, i_row, start, start + length, first, tl.where(here, last, -1)


@triton.jit
def count_resets(p_reset, start, end):
    """The number of resets among tokens start.. below end."""
    count = 0
    for i_t in range(start, end, 1024):
        o_t = i_t + tl.arange(0, 1024)
        count += tl.sum(tl.load(p_reset + o_t, mask=o_t < end, other=0).to(tl.int32), 0)
    return count


@triton.jit
def is_reset(p_reset, i_t, end):
    """Whether token i_t starts an episode; end is no token."""
    return tl.load(p_reset + i_t, mask=i_t < end, other=0) != 0


@triton.jit
def end_of_chunk(p_reset, i_t, end, ROWS: tl.constexpr):
    """The end of the chunk that token i_t begins: ROWS tokens on, at the next reset, or at end."""
    o_t = i_t + 1 + tl.arange(0, ROWS)
    m_reset = tl.load(p_reset + o_t, mask=o_t < end, other=1) != 0
    return tl.min(tl.where(m_reset, tl.minimum(o_t, end), i_t + ROWS), 0)


@triton.jit
def start_of_chunk(p_reset, start, i_t, ROWS: tl.constexpr):
    """The first token of the chunk that ends before token i_t: ROWS tokens back, the last reset, or start."""
    o_t = i_t - ROWS + tl.arange(0, ROWS)
    m_reset = tl.load(p_reset + o_t, mask=o_t >= start, other=0) != 0
    return tl.max(tl.where(m_reset, o_t, tl.maximum(i_t - ROWS, start)), 0)


@triton.jit
def take_in(
    b_state,
    p_k,
    p_v,
    stride_k,
    stride_v,
    start,
    end,
    first_col,
    log_decay,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The state after tokens start.. below end; WHOLE: chunks of ROWS tokens, to save registers."""
    COLS_K: tl.constexpr = COLUMNS[0]
    COLS_V: tl.constexpr = COLUMNS[1]
    DK: tl.constexpr = COLUMNS[2]
    DV: tl.constexpr = COLUMNS[3]
    b_to_end = tiles.decay_to_end(log_decay, ROWS, ROWS)
    whole, rest = tiles.decay_across(log_decay, ROWS)
    for i_t in range(start, end, ROWS):
        b_k = tiles.load_tile(p_k, stride_k, end, 0, ROWS, COLS_K, DK, i_t)
        b_v = tiles.load_tile(p_v, stride_v, end, first_col, ROWS, COLS_V, DV, i_t)
        if not WHOLE:
            length = tl.minimum(end - i_t, ROWS)
            b_to_end = tiles.decay_to_end(log_decay, length, ROWS)
            whole, rest = tiles.decay_across(log_decay, length)
        b_state = tiles.chunk_state(b_state, b_k, b_v, b_to_end, whole, rest, PRECISION, SCALE_V)
    return b_state


@triton.jit(do_not_specialize=RUN_TIME)
def added_states_kernel(
    p_k,
    p_v,
    p_log_decay,
    p_bounds,
    p_added,
    H,
    T,
    num_sequences,
    stretch,
    per_sequence,
    stride_k_b: tl.int64,
    stride_k_t,
    stride_k_h,
    stride_v_b: tl.int64,
    stride_v_t,
    stride_v_h,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_V: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A_m = Σ_j γ^(n-1-j) k_jᵀ v_j, what stretch m of n tokens adds to the state.

    Strides are counted in UNIT elements; that of v's tokens is k's where it is None. EARLY: n is a multiple
    of ROWS, and nothing is found for a sequence's last stretch nor for a head that starts stretches early.

    Grid: (stretches · H · slices of DV,).
    """
    stride_k_t = tiles.token_stride(stride_k_t, None, UNIT)
    stride_v_t = tiles.token_stride(stride_v_t, stride_k_t, UNIT)
    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_nh = tl.program_id(0) // SLICES
    i_n = i_nh // H
    i_h = (i_nh % H).to(tl.int64)
    _, i_row, start, end, _, last = find_stretch(
        i_n, p_bounds, T, num_sequences, stretch, per_sequence, SEQUENCES
    )
    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    if EARLY:
        end = tl.where((end == last) | forgets(log_decay, stretch), start, end)
    p_k += (i_row.to(tl.int64) * stride_k_b + i_h * stride_k_h) * UNIT
    p_v += (i_row.to(tl.int64) * stride_v_b + i_h * stride_v_h) * UNIT
    b_state = take_in(
        tl.zeros((COLS_K, COLS_V), tl.float32),
        p_k,
        p_v,
        stride_k_t,
        stride_v_t,
        start,
        end,
        first_col,
        log_decay,
        ROWS,
        (COLS_K, COLS_V, DK, DV),
        PRECISION,
        SCALE_V,
        EARLY,
    )
    p_added += i_nh.to(tl.int64) * (DK * DV)
    tiles.store_tile(p_added, b_state, DV, tl.where(start < end, DK, 0), first_col, COLS_K, COLS_V, DV)


@triton.jit(do_not_specialize=[*RUN_TIME, "stride_reset_b", "stride_reset_n"])
def scan_states_kernel(
    p_added,
    p_log_decay,
    p_bounds,
    p_reset,
    p_given,
    p_states,
    p_result,
    H,
    T,
    num_sequences,
    stretch,
    per_sequence,
    stride_given_b: tl.int64,
    stride_given_h,
    stride_given_k,
    stride_given_v,
    stride_reset_b: tl.int64,
    stride_reset_n: tl.int64,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    REVERSE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """S_(m+1) = γ^n S_m + A_m over the stretches of a sequence, of n tokens each, fewer or none at its end.

    S_0 is in p_given (None: zeros), every S_m goes to p_states, and the last to p_result (None: nowhere).
    Where p_reset is set, S_m is 0. REVERSE: E_m = γ^n E_(m+1) + A_m from the last E in p_given to the first;
    every E_(m+1) goes to p_states, and where p_reset is set, E_m is 0. EARLY: a head that starts stretches
    early has the state given in p_states, and the result is what its last stretch adds.

    Grid: (sequences · H · slices of DV, slices of DK).
    """
    SLICES: tl.constexpr = (DV + COLS - 1) // COLS
    first_col = (tl.program_id(0) % SLICES) * COLS
    first_row = tl.program_id(1) * ROWS
    i_sh = tl.program_id(0) // SLICES
    i_s = i_sh // H
    i_h = (i_sh % H).to(tl.int64)
    if p_bounds is None:
        first = i_s * per_sequence
        count = per_sequence
        tokens = T
    else:
        b_count = count_stretches(p_bounds, T, num_sequences, stretch, SEQUENCES)
        o_s = tl.arange(0, SEQUENCES)
        first = tl.sum(tl.where(o_s < i_s, b_count, 0), 0)
        count = tl.sum(tl.where(o_s == i_s, b_count, 0), 0)
        # Wrong bounds, which are not checked on a GPU, could ask for more stretches than there is room for.
        count = tl.minimum(count, T // stretch + num_sequences - first)
        tokens = inside(tl.load(p_bounds + i_s + 1), T) - inside(tl.load(p_bounds + i_s), T)
    if p_given is None:
        b_state = tl.zeros((ROWS, COLS), tl.float32)
    else:
        p_given += i_s.to(tl.int64) * stride_given_b + i_h * stride_given_h
        strides = (stride_given_k, stride_given_v)
        b_state = tiles.load_state(p_given, strides, first_col, ROWS, COLS, DK, DV, first_row)
    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    p_added += i_h * (DK * DV)
    p_states += i_h * (DK * DV)
    if p_reset is not None:
        p_reset += i_s.to(tl.int64) * stride_reset_b
    stride = H.to(tl.int64) * (DK * DV)
    is_early = False
    steps = count
    if EARLY:
        is_early = forgets(log_decay, stretch)
        steps = tl.where(is_early, tl.minimum(count, 2), count)  # the first stretch, and the last
    for i in tl.range(steps, num_stages=4):
        i_m = tl.where(is_early & (i > 0), count - 1, i)
        i_m = count - 1 - i_m if REVERSE else i_m
        place = (first + i_m) * stride
        length = tl.maximum(tl.minimum(tokens - i_m * stretch, stretch), 0)
        starts = 0
        if p_reset is not None:
            starts = tl.load(p_reset + i_m * stride_reset_n, mask=length > 0, other=0).to(tl.int32)
            if not REVERSE:
                b_state = tl.where(starts != 0, 0.0, b_state)
        rows = DK
        if not REVERSE:  # a block of no tokens adds nothing; backwards, the predictions at its boundary do
            rows = tl.where(length > 0, DK, 0)
        if p_result is None:
            rows = tl.where(i < steps - 1, rows, 0)
        if EARLY:
            rows = tl.where(is_early & (i < steps - 1), 0, rows)
        b_added = tiles.load_tile(p_added + place, DV, rows, first_col, ROWS, COLS, DV, first_row)
        kept = tl.where(is_early & (i > 0), 0, DK)
        tiles.store_tile(p_states + place, b_state, DV, kept, first_col, ROWS, COLS, DV, first_row)
        whole, rest = tiles.decay_across(log_decay, length)
        b_state = tiles.advance(b_state, whole, rest, b_added)
        if REVERSE and p_reset is not None:
            b_state = tl.where(starts != 0, 0.0, b_state)
    if p_result is not None:
        p_result += i_sh.to(tl.int64) * (DK * DV)
        tiles.store_tile(p_result, b_state, DV, DK, first_col, ROWS, COLS, DV, first_row)


def cut(T: int, sequences: int, stretch: int | None, *, packed: bool) -> tuple[int, dict[str, int]]:
    """The number of stretches there is room for, and the kernels' arguments about it; None: no split."""
    if stretch is None:
        return sequences, {"stretch": T, "per_sequence": 1, "SEQUENCES": 0, "EARLY": False}
    per_sequence = triton.cdiv(T, stretch)
    # Each packed sequence may end in a stretch that is not full.
    stretches = T // stretch + sequences if packed else sequences * per_sequence
    places = MOST_PACKED_IN_A_SPLIT + 1 if packed else 0
    shared = {"stretch": stretch, "per_sequence": per_sequence, "SEQUENCES": places, "EARLY": True}
    return stretches, shared


SHARED = ("p_log_decay", "p_bounds", *RUN_TIME, "SEQUENCES", "EARLY")
"""The arguments shared by the kernels here and those that walk stretches."""


def plan_states(
    k: Tensor,
    v: Tensor,
    given: Tensor | None,
    result: Tensor | None,
    shared: Mapping[str, Any],
    config: PopConfig | RetentionConfig,
    *,
    stretches: int,
    rows: int,
    precision: str,
    reset: Tensor | None = None,
) -> tuple[list[Launch], Tensor]:
    """The two launches that find the state before each stretch, and the tensor for it, (stretches, H, Dk,
    Dv).

    Args:
        k, v: (B, T, H, D), with contiguous rows.
        given, result, shared, reset: as in `plan_scan`.
        config, precision: of the kernel that then walks the stretches.
        stretches: their number.
        rows: tokens of a chunk.
    """
    cols_v = config.cols_v
    H, Dk, Dv = k.shape[2], k.shape[-1], v.shape[-1]
    added = torch.empty((stretches, H, Dk, Dv), dtype=torch.float32, device=k.device)
    launch = Launch(
        kernel=added_states_kernel,
        grid=(stretches * H * triton.cdiv(Dv, cols_v),),
        arguments={
            **{name: shared[name] for name in SHARED},
            **{"p_k": k, "p_v": v, "p_added": added, "DK": Dk, "DV": Dv, "ROWS": rows, "COLS_K": padded(Dk)},
            **{"COLS_V": cols_v, "PRECISION": precision, "SCALE_V": config.scale_v},
            **token_strides({"k": k, "v": v}),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    scan, states = plan_scan(added, given, result, shared, reset=reset)
    return [launch, scan], states


def plan_scan(
    added: Tensor,
    given: Tensor | None,
    result: Tensor | None,
    shared: Mapping[str, Any],
    *,
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Launch, Tensor]:
    """The scan over stretches, and the tensor for each one's state: as `added`, (stretches, H, Dk, Dv).

    Args:
        added: what each stretch adds.
        given: the first state, or in reverse the last, (sequences, H, Dk, Dv); None for zeros.
        result: where the state at the other end goes, contiguous, or None.
        shared: the arguments named in `SHARED`.
        reset: stretches that start an episode, (sequences, stretches of each), bool, or None.
        reverse: from the last stretch to the first.
    """
    Dk, Dv = added.shape[-2:]
    rows, cols = SCAN_TILE
    states = torch.empty_like(added)
    launch = Launch(
        kernel=scan_states_kernel,
        grid=(shared["num_sequences"] * shared["H"] * triton.cdiv(Dv, cols), triton.cdiv(Dk, rows)),
        arguments={
            **{name: shared[name] for name in SHARED},
            **{"p_added": added, "p_reset": reset, "p_given": given, "p_states": states},
            **{"p_result": result, "DK": Dk, "DV": Dv, "ROWS": rows, "COLS": cols, "REVERSE": reverse},
            **named_strides("given", given, "bhkv"),
            **named_strides("reset", reset, "bn"),
        },
        num_warps=4,
        num_stages=2,
    )
    return launch, states
