"""POP, backward: the reverse sweep that finds the gradients of keys, values and the first state.

With E the gradient of the state after a chunk of n tokens, g_i that of output o_i, and c the scale:

    dv_j = γ^(n-1-j) k_j E  + Σ_{i>=j} c γ^(i-j) (k_j·q_i) g_i
    dk_j = γ^(n-1-j) v_j Eᵀ + Σ_{i>=j} c γ^(i-j) (v_j·g_i) q_i
    E'   = γ^n E + Σ_i c γ^(i+1) q_iᵀ g_i                          the gradient of the state before the chunk

These are the forward's formulas with other powers of γ, so `tiles.chunk_output` and `tiles.chunk_state`
compute them. At boundary n, from the last to the first, come block n; then the predictions that start from
B_n, whose E is 0 after their last token and in the end is added to the block's; then E := 0 where block n
starts an episode.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles
from .pop_fwd_steps import chosen, end_of, token_stride


@triton.jit
def load_state(p_state, strides, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, DK, DV):
    """A state of DK rows and DV columns, from column first_col on; strides are those of rows and columns."""
    o_row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    o_col = (first_col + tl.arange(0, COLS))[None, :].to(tl.int64)
    m_state = (o_row < DK) & (o_col < DV)
    return tl.load(p_state + o_row * strides[0] + o_col * strides[1], mask=m_state, other=0.0)


@triton.jit
def store_state(p_state, b_state, strides, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, DK, DV):
    """Write what `load_state` would read."""
    o_row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    o_col = (first_col + tl.arange(0, COLS))[None, :].to(tl.int64)
    m_state = (o_row < DK) & (o_col < DV)
    tl.store(p_state + o_row * strides[0] + o_col * strides[1], b_state, mask=m_state)


@triton.jit
def pull_tile(
    pointers,
    strides,
    place,
    b_grad,
    b_seen,
    powers,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
):
    """Write dk and dv (where their pointers are) of one tile; return the gradient of the state before it.

    The outputs' gradient may be wider than the other tokens, or where they have changed places q.

    Args:
        pointers, strides: of q, k, v, the outputs' gradient, dk and dv; strides are those of tokens.
        place: first row; ends of the rows that exist, and of those with dk and with dv; first column of the
            slice of Dv.
        b_grad, b_seen: E, which is carried on, and E as dk and dv see it.
        powers: to_end, within (transposed), from_start, whole, rest.
        COLUMNS: COLS_K, COLS_V, DK, DV.
    """
    p_q, p_k, p_v, p_g, p_dk, p_dv = pointers
    stride_q, stride_k, stride_v, stride_g, stride_dk, stride_dv = strides
    first_row, end_row, end_dk, end_dv, first_col = place
    b_to_end, b_within, b_from_start, whole, rest = powers
    COLS_K: tl.constexpr = COLUMNS[0]
    COLS_V: tl.constexpr = COLUMNS[1]
    DK: tl.constexpr = COLUMNS[2]
    DV: tl.constexpr = COLUMNS[3]
    TYPE_Q: tl.constexpr = p_q.dtype.element_ty
    TYPE_G: tl.constexpr = p_g.dtype.element_ty
    TYPE: tl.constexpr = TYPE_G if TYPE_G.primitive_bitwidth < TYPE_Q.primitive_bitwidth else TYPE_Q
    b_operand, grow = tiles.as_operand(b_seen, TYPE)
    b_q = tiles.load_tile(p_q, stride_q, end_row, 0, ROWS, COLS_K, DK, first_row)
    b_g = tiles.load_tile(p_g, stride_g, end_row, first_col, ROWS, COLS_V, DV, first_row)
    b_q, grow_q = tiles.as_operand(b_q, TYPE, tiles.LARGEST_TOKEN)
    b_g, grow_g = tiles.as_operand(b_g, TYPE, tiles.LARGEST_TOKEN)
    grow_g = grow_q * grow_g  # each sum below has a factor of both
    grow = grow / grow_g
    if p_dv is not None:
        b_k = tiles.load_tile(p_k, stride_k, end_dv, 0, ROWS, COLS_K, DK, first_row)
        b_dv = tiles.chunk_output(b_k, b_q, b_g, b_operand, grow, b_to_end, b_within, PRECISION)
        tiles.store_tile(p_dv, b_dv * grow_g, stride_dv, end_dv, first_col, ROWS, COLS_V, DV, first_row)
    if p_dk is not None:
        b_v = tiles.load_tile(p_v, stride_v, end_dk, first_col, ROWS, COLS_V, DV, first_row)
        b_dk = tiles.chunk_output(b_v, b_g, b_q, tl.trans(b_operand), grow, b_to_end, b_within, PRECISION)
        tiles.store_tile(p_dk, b_dk * grow_g, stride_dk, end_dk, 0, ROWS, COLS_K, DK, first_row)
    return tiles.chunk_state(b_grad, b_q, b_g, b_from_start, whole, rest, PRECISION, SCALE_V, grow_g)


@triton.jit(do_not_specialize=["N", "P", "L", "M", "offset", "num_boundaries"])
def pop_bwd_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_dk,
    p_dv,
    p_q_pred,
    p_k_pred,
    p_v_pred,
    p_g_pred,
    p_dk_pred,
    p_dv_pred,
    p_log_decay,
    p_after,
    p_reset,
    p_before,
    scale,
    N,
    L,
    P,
    M,
    offset,
    num_boundaries,
    stride_q_b: tl.int64,
    stride_q_t,
    stride_q_h,
    stride_k_b: tl.int64,
    stride_k_t,
    stride_k_h,
    stride_v_b: tl.int64,
    stride_v_t,
    stride_v_h,
    stride_g_b: tl.int64,
    stride_g_t,
    stride_g_h,
    stride_dk_b: tl.int64,
    stride_dk_t,
    stride_dk_h,
    stride_dv_b: tl.int64,
    stride_dv_t,
    stride_dv_h,
    stride_q_pred_b: tl.int64,
    stride_q_pred_p: tl.int64,
    stride_q_pred_t,
    stride_q_pred_h,
    stride_k_pred_b: tl.int64,
    stride_k_pred_p: tl.int64,
    stride_k_pred_t,
    stride_k_pred_h,
    stride_v_pred_b: tl.int64,
    stride_v_pred_p: tl.int64,
    stride_v_pred_t,
    stride_v_pred_h,
    stride_g_pred_b: tl.int64,
    stride_g_pred_p: tl.int64,
    stride_g_pred_t,
    stride_g_pred_h,
    stride_dk_pred_b: tl.int64,
    stride_dk_pred_p: tl.int64,
    stride_dk_pred_t,
    stride_dk_pred_h,
    stride_dv_pred_b: tl.int64,
    stride_dv_pred_p: tl.int64,
    stride_dv_pred_t,
    stride_dv_pred_h,
    stride_after_b: tl.int64,
    stride_after_n: tl.int64,
    stride_after_h,
    stride_after_k,
    stride_after_v,
    stride_before_b: tl.int64,
    stride_before_n: tl.int64,
    stride_before_h,
    stride_before_k,
    stride_before_v,
    stride_reset_b: tl.int64,
    stride_reset_n: tl.int64,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_V: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """For each boundary n: dk and dv of block n from E_(n+1), those of prediction n-offset from 0, and E_n.

    One tile a step, formulas above. What has no pointer is not found: without dk and its twin dv comes alone,
    in slices of Dv, without dv too only E. L = 0: predictions alone.
    Token strides of None are another's (`pop_bwd._LIKE`), of predictions the main tokens'. ONE_TILE: one fits
    into one tile, so E need not be kept elsewhere meanwhile. SPLIT: one boundary, from its own E.
    """
    stride_q_t = token_stride(stride_q_t, 0, UNIT)
    stride_k_t = token_stride(stride_k_t, stride_q_t, UNIT)
    stride_v_t = token_stride(stride_v_t, stride_k_t, UNIT)
    stride_g_t = token_stride(stride_g_t, stride_q_t, UNIT)
    stride_dk_t = token_stride(stride_dk_t, stride_g_t, UNIT)
    stride_dv_t = token_stride(stride_dv_t, stride_dk_t, UNIT)
    COLUMNS: tl.constexpr = (COLS_K, COLS_V, DK, DV)
    WITH_DK: tl.constexpr = p_dk is not None or p_dk_pred is not None
    WITH_DV: tl.constexpr = p_dv is not None or p_dv_pred is not None

    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_bh = tl.program_id(0) // SLICES
    i_b = i_bh // H
    i_h = (i_bh % H).to(tl.int64)
    n = num_boundaries - 1
    num_steps = num_boundaries
    if SPLIT:
        n = i_b % num_boundaries
        i_b = i_b // num_boundaries
        num_steps = 1
    i_b = i_b.to(tl.int64)
    p_q += (i_b * stride_q_b + i_h * stride_q_h) * UNIT
    p_g += (i_b * stride_g_b + i_h * stride_g_h) * UNIT
    p_q_pred += (i_b * stride_q_pred_b + i_h * stride_q_pred_h) * UNIT
    p_g_pred += (i_b * stride_g_pred_b + i_h * stride_g_pred_h) * UNIT
    if p_dv is not None:
        p_k += (i_b * stride_k_b + i_h * stride_k_h) * UNIT
        p_dv += (i_b * stride_dv_b + i_h * stride_dv_h) * UNIT
    if p_dv_pred is not None:
        p_k_pred += (i_b * stride_k_pred_b + i_h * stride_k_pred_h) * UNIT
        p_dv_pred += (i_b * stride_dv_pred_b + i_h * stride_dv_pred_h) * UNIT
    if p_dk is not None:
        p_v += (i_b * stride_v_b + i_h * stride_v_h) * UNIT
        p_dk += (i_b * stride_dk_b + i_h * stride_dk_h) * UNIT
    if p_dk_pred is not None:
        p_v_pred += (i_b * stride_v_pred_b + i_h * stride_v_pred_h) * UNIT
        p_dk_pred += (i_b * stride_dk_pred_b + i_h * stride_dk_pred_h) * UNIT

    if p_after is None:
        b_grad = tl.zeros((COLS_K, COLS_V), tl.float32)
    else:
        p_after += i_b * stride_after_b + n * stride_after_n + i_h * stride_after_h
        b_grad = load_state(p_after, (stride_after_k, stride_after_v), first_col, COLS_K, COLS_V, DK, DV)
    if p_before is not None:
        p_before += i_b * stride_before_b + n * stride_before_n + i_h * stride_before_h
    if p_reset is not None:
        p_reset += i_b * stride_reset_b + n * stride_reset_n

    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    b_from_start = tiles.decay_from_start(log_decay, scale, TILE)
    b_within = tl.trans(tiles.decay_within(log_decay, scale, TILE))
    tiles_main = tl.cdiv(L, TILE)
    tiles_each = tiles_main + tl.cdiv(M, TILE)
    t = 0
    b_main = b_grad
    for _ in range(num_steps * tiles_each):
        is_pred = t >= tiles_main
        if not ONE_TILE:
            b_main = tl.where(t == tiles_main, b_grad, b_main)
            b_grad = tl.where(t == tiles_main, 0.0, b_grad)
        i_p = n - offset
        o_p = i_p.to(tl.int64)
        pointers = (
            tl.where(is_pred, p_q_pred + o_p * stride_q_pred_p * UNIT, p_q),
            tl.where(is_pred, p_k_pred + o_p * stride_k_pred_p * UNIT, p_k) if WITH_DV else None,
            tl.where(is_pred, p_v_pred + o_p * stride_v_pred_p * UNIT, p_v) if WITH_DK else None,
            tl.where(is_pred, p_g_pred + o_p * stride_g_pred_p * UNIT, p_g),
            chosen(is_pred, p_dk, p_dk_pred, o_p * stride_dk_pred_p * UNIT) if WITH_DK else None,
            chosen(is_pred, p_dv, p_dv_pred, o_p * stride_dv_pred_p * UNIT) if WITH_DV else None,
        )
        strides = (
            tl.where(is_pred, token_stride(stride_q_pred_t, stride_q_t, UNIT), stride_q_t),
            tl.where(is_pred, token_stride(stride_k_pred_t, stride_k_t, UNIT), stride_k_t),
            tl.where(is_pred, token_stride(stride_v_pred_t, stride_v_t, UNIT), stride_v_t),
            tl.where(is_pred, token_stride(stride_g_pred_t, stride_g_t, UNIT), stride_g_t),
            tl.where(is_pred, token_stride(stride_dk_pred_t, stride_dk_t, UNIT), stride_dk_t),
            tl.where(is_pred, token_stride(stride_dv_pred_t, stride_dv_t, UNIT), stride_dv_t),
        )
        first_row = tl.where(is_pred, (tiles_each - 1 - t) * TILE, n * L + (tiles_main - 1 - t) * TILE)
        end_pred = tl.where((i_p >= 0) & (i_p < P), M, 0)
        end_row = tl.where(is_pred, end_pred, tl.minimum(n * L + L, N * L))
        length = tl.maximum(tl.minimum(end_row - first_row, TILE), 0)
        whole, rest = tiles.decay_across(log_decay, length)
        b_seen = b_grad
        if ONE_TILE:
            # A prediction starts from E = 0 and adds to the block's, which is carried on undecayed.
            b_seen = tl.where(is_pred, 0.0, b_grad)
            whole = tl.where(is_pred, 1.0, whole)
            rest = tl.where(is_pred, 0.0, rest)
        b_grad = pull_tile(
            pointers,
            strides,
            (
                first_row,
                end_row,
                end_of(is_pred, end_row, p_dk, p_dk_pred),
                end_of(is_pred, end_row, p_dv, p_dv_pred),
                first_col,
            ),
            b_grad,
            b_seen,
            (tiles.decay_to_end(log_decay, length, TILE), b_within, b_from_start, whole, rest),
            TILE,
            COLUMNS,
            PRECISION,
            SCALE_V,
        )
        t += 1
        is_last = t == tiles_each
        if not ONE_TILE:
            b_grad = tl.where(is_last, b_grad + b_main, b_grad)
        if p_reset is not None:
            starts = tl.load(p_reset, mask=is_last & (n < N), other=0)
            b_grad = tl.where(starts != 0, 0.0, b_grad)
            p_reset -= tl.where(is_last, stride_reset_n, 0)
        n -= is_last.to(tl.int32)
        t = tl.where(is_last, 0, t)
    if p_before is not None:
        store_state(p_before, b_grad, (stride_before_k, stride_before_v), first_col, COLS_K, COLS_V, DK, DV)


@triton.jit(do_not_specialize=["N", "L", "num_boundaries"])
def scan_back_kernel(
    p_added,
    p_log_decay,
    p_after,
    p_reset,
    p_ends,
    p_before,
    N,
    L,
    num_boundaries,
    stride_after_b: tl.int64,
    stride_after_h,
    stride_after_k,
    stride_after_v,
    stride_reset_b: tl.int64,
    stride_reset_n: tl.int64,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """E after every boundary's block, into p_ends (B, num_boundaries, H, DK, DV), and E_0 into p_before.

        E_n = γ^L E_(n+1) + A_n, without a block n E_(n+1) + A_n; then 0 where block n starts an episode

    A_n, in p_added, is what boundary n's own tokens give. Grid: (B · H · slices of DV, slices of DK).
    """
    SLICES: tl.constexpr = (DV + COLS - 1) // COLS
    first_col = (tl.program_id(0) % SLICES) * COLS
    first_row = tl.program_id(1) * ROWS
    i_bh = tl.program_id(0) // SLICES
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    n = num_boundaries - 1
    if p_after is None:
        b_grad = tl.zeros((ROWS, COLS), tl.float32)
    else:
        p_after += i_b * stride_after_b + i_h * stride_after_h + first_row.to(tl.int64) * stride_after_k
        strides = (stride_after_k, stride_after_v)
        b_grad = load_state(p_after, strides, first_col, ROWS, COLS, DK - first_row, DV)
    across, less = tiles.decay_across(tiles.load_log_decay(p_log_decay, i_h), L)
    o_last = ((i_b * num_boundaries + n) * H + i_h) * (DK * DV)
    p_added += o_last
    p_ends += o_last
    if p_reset is not None:
        p_reset += i_b * stride_reset_b + n * stride_reset_n
    for _ in range(num_boundaries):
        tiles.store_tile(p_ends, b_grad, DV, DK, first_col, ROWS, COLS, DV, first_row)
        b_added = tiles.load_tile(p_added, DV, DK, first_col, ROWS, COLS, DV, first_row)
        whole = tl.where(n < N, across, 1.0)
        rest = tl.where(n < N, less, 0.0)
        b_grad = tiles.advance(b_grad, whole, rest, b_added)
        if p_reset is not None:
            starts = tl.load(p_reset, mask=n < N, other=0)
            b_grad = tl.where(starts != 0, 0.0, b_grad)
            p_reset -= stride_reset_n
        p_added -= H * DK * DV
        p_ends -= H * DK * DV
        n -= 1
    if p_before is not None:
        p_before += i_bh.to(tl.int64) * (DK * DV)
        tiles.store_tile(p_before, b_grad, DV, DK, first_col, ROWS, COLS, DV, first_row)
