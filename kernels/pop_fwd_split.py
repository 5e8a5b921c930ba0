"""The block states of POP by two kernels: what each block adds, and a scan over the blocks of a row.

    A_n = Σ_j γ^(L-1-j) k_jᵀ v_j
    B_(n+1) = γ^L B_n + A_n,   B_n := 0 where block n starts an episode

For small batches: blocks are programs of their own, so that more of the GPU has work; the outputs then come
from the kernels of pop_fwd.py and pop_fwd_steps.py, one block a program. States move through memory four
times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles


@triton.jit(do_not_specialize=["N", "L"])
def block_states_kernel(
    p_k,
    p_v,
    p_log_decay,
    p_added,
    N,
    L,
    stride_k_b: tl.int64,
    stride_k_t,
    stride_k_h,
    stride_v_b: tl.int64,
    stride_v_t,
    stride_v_h,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_V: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
):
    """A_n of every block, into (B, N, H, DK, DV). Grid: (B · N · H · slices of DV,)."""
    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_bnh = tl.program_id(0) // SLICES
    i_h = (i_bnh % H).to(tl.int64)
    i_b = (i_bnh // H // N).to(tl.int64)
    start = (i_bnh // H % N) * L
    p_k += i_b * stride_k_b + i_h * stride_k_h
    p_v += i_b * stride_v_b + i_h * stride_v_h
    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    b_state = tl.zeros((COLS_K, COLS_V), tl.float32)
    for i_t in range(start, start + L, TILE):
        b_k = tiles.load_tile(p_k, stride_k_t, start + L, 0, TILE, COLS_K, DK, i_t)
        b_v = tiles.load_tile(p_v, stride_v_t, start + L, first_col, TILE, COLS_V, DV, i_t)
        length = tl.minimum(start + L - i_t, TILE)
        whole, rest = tiles.decay_across(log_decay, length)
        b_to_end = tiles.decay_to_end(log_decay, length, TILE)
        b_state = tiles.chunk_state(b_state, b_k, b_v, b_to_end, whole, rest, PRECISION, SCALE_V)
    p_added += i_bnh.to(tl.int64) * (DK * DV)
    tiles.store_tile(p_added, b_state, DV, DK, first_col, COLS_K, COLS_V, DV)


@triton.jit(do_not_specialize=["N", "L", "num_blocks", "stride_reset_b", "stride_reset_n"])
def scan_blocks_kernel(
    p_added,
    p_log_decay,
    p_state,
    p_reset,
    p_starts,
    p_final,
    N,
    L,
    num_blocks,
    stride_state_b: tl.int64,
    stride_state_h,
    stride_state_k,
    stride_reset_b: tl.int64,
    stride_reset_n: tl.int64,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """B_n for n < num_blocks into p_starts (B, num_blocks, H, DK, DV), and B_N into p_final (B, H, DK, DV).

    Grid: (B · H · slices of DV, slices of DK).
    """
    SLICES: tl.constexpr = (DV + COLS - 1) // COLS
    first_col = (tl.program_id(0) % SLICES) * COLS
    first_row = tl.program_id(1) * ROWS
    i_bh = tl.program_id(0) // SLICES
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    if p_state is None:
        b_state = tl.zeros((ROWS, COLS), tl.float32)
    else:
        p_state += i_b * stride_state_b + i_h * stride_state_h
        b_state = tiles.load_tile(p_state, stride_state_k, DK, first_col, ROWS, COLS, DV, first_row)
    whole, rest = tiles.decay_across(tiles.load_log_decay(p_log_decay, i_h), L)
    p_added += (i_b * N * H + i_h) * (DK * DV)
    p_starts += (i_b * num_blocks * H + i_h) * (DK * DV)
    if p_reset is not None:
        p_reset += i_b * stride_reset_b
    for _ in range(N):
        if p_reset is not None:
            b_state = tl.where(tl.load(p_reset) != 0, 0.0, b_state)
            p_reset += stride_reset_n
        b_added = tiles.load_tile(p_added, DV, DK, first_col, ROWS, COLS, DV, first_row)
        tiles.store_tile(p_starts, b_state, DV, DK, first_col, ROWS, COLS, DV, first_row)
        b_state = tiles.advance(b_state, whole, rest, b_added)
        p_added += H * DK * DV
        p_starts += H * DK * DV
    rows = tl.where(num_blocks > N, DK, 0)
    tiles.store_tile(p_starts, b_state, DV, rows, first_col, ROWS, COLS, DV, first_row)
    if p_final is not None:
        p_final += i_bh.to(tl.int64) * (DK * DV)
        tiles.store_tile(p_final, b_state, DV, DK, first_col, ROWS, COLS, DV, first_row)
