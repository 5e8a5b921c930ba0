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
    PRED_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """For each boundary n: dk and dv of block n from E_(n+1), those of prediction n-offset from 0, and E_n.

    One tile a step, formulas above. Results without a pointer are not computed: without dk and its twin only
    dv, in slices of Dv; without dv too only E. L = 0: predictions alone. A token stride of None equals
    another one (`launch.token_strides`). PRED_TILES: 1 or 2 tiles hold a prediction, whose own E is then 0 or
    a product of two tiles; 0: any number, and the blocks' E is kept elsewhere meanwhile. SPLIT: one boundary,
    from its own E.
    """
    stride_q_t = tiles.token_stride(stride_q_t, 0, UNIT)
    stride_k_t = tiles.token_stride(stride_k_t, stride_q_t, UNIT)
    stride_v_t = tiles.token_stride(stride_v_t, stride_k_t, UNIT)
    stride_g_t = tiles.token_stride(stride_g_t, stride_q_t, UNIT)
    stride_dk_t = tiles.token_stride(stride_dk_t, stride_g_t, UNIT)
    stride_dv_t = tiles.token_stride(stride_dv_t, stride_dk_t, UNIT)
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
        b_grad = tiles.load_state(
            p_after, (stride_after_k, stride_after_v), first_col, COLS_K, COLS_V, DK, DV
        )
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
    if PRED_TILES == 2:
        TYPE: tl.constexpr = p_k.dtype.element_ty  # q or g may be wider
        later = (tl.zeros((TILE, COLS_K), TYPE), tl.zeros((TILE, COLS_V), TYPE), 1.0)
    for _ in range(num_steps * tiles_each):
        is_pred = t >= tiles_main
        if PRED_TILES == 0:
            b_main = tl.where(t == tiles_main, b_grad, b_main)
            b_grad = tl.where(t == tiles_main, 0.0, b_grad)
        i_p = n - offset
        o_p = i_p.to(tl.int64)
        pointers = (
            tl.where(is_pred, p_q_pred + o_p * stride_q_pred_p * UNIT, p_q),
            tl.where(is_pred, p_k_pred + o_p * stride_k_pred_p * UNIT, p_k) if WITH_DV else None,
            tl.where(is_pred, p_v_pred + o_p * stride_v_pred_p * UNIT, p_v) if WITH_DK else None,
            tl.where(is_pred, p_g_pred + o_p * stride_g_pred_p * UNIT, p_g),
            tiles.chosen(is_pred, p_dk, p_dk_pred, o_p * stride_dk_pred_p * UNIT) if WITH_DK else None,
            tiles.chosen(is_pred, p_dv, p_dv_pred, o_p * stride_dv_pred_p * UNIT) if WITH_DV else None,
        )
        strides = (
            tl.where(is_pred, tiles.token_stride(stride_q_pred_t, stride_q_t, UNIT), stride_q_t),
            tl.where(is_pred, tiles.token_stride(stride_k_pred_t, stride_k_t, UNIT), stride_k_t),
            tl.where(is_pred, tiles.token_stride(stride_v_pred_t, stride_v_t, UNIT), stride_v_t),
            tl.where(is_pred, tiles.token_stride(stride_g_pred_t, stride_g_t, UNIT), stride_g_t),
            tl.where(is_pred, tiles.token_stride(stride_dk_pred_t, stride_dk_t, UNIT), stride_dk_t),
            tl.where(is_pred, tiles.token_stride(stride_dv_pred_t, stride_dv_t, UNIT), stride_dv_t),
        )
        first_row = tl.where(is_pred, (tiles_each - 1 - t) * TILE, n * L + (tiles_main - 1 - t) * TILE)
        end_pred = tl.where((i_p >= 0) & (i_p < P), M, 0)
        end_row = tl.where(is_pred, end_pred, tl.minimum(n * L + L, N * L))
        length = tl.maximum(tl.minimum(end_row - first_row, TILE), 0)
        whole, rest = tiles.decay_across(log_decay, length)
        b_seen = b_grad
        if PRED_TILES > 0:
            # A prediction starts from E = 0 and adds to the block's, which is carried on undecayed.
            b_seen = tl.where(is_pred, 0.0, b_grad)
            whole = tl.where(is_pred, 1.0, whole)
            rest = tl.where(is_pred, 0.0, rest)
        place = (
            first_row,
            end_row,
            tiles.end_of(is_pred, end_row, p_dk, p_dk_pred),
            tiles.end_of(is_pred, end_row, p_dv, p_dv_pred),
            first_col,
        )
        powers = (tiles.decay_to_end(log_decay, length, TILE), b_within, b_from_start, whole, rest)
        if PRED_TILES == 2:
            is_first = t == tiles_main + 1  # of a prediction's two tiles
            later = (tl.where(is_first, later[0], 0.0), tl.where(is_first, later[1], 0.0), later[2])
            b_grad, later = tiles.pull_tile(
                pointers,
                strides,
                place,
                b_grad,
                b_seen,
                powers,
                TILE,
                COLUMNS,
                PRECISION,
                SCALE_V,
                later,
                tl.where(is_pred, tl.exp(log_decay * first_row), 1.0),
            )
        else:
            b_grad = tiles.pull_tile(
                pointers, strides, place, b_grad, b_seen, powers, TILE, COLUMNS, PRECISION, SCALE_V
            )
        t += 1
        is_last = t == tiles_each
        if PRED_TILES == 0:
            b_grad = tl.where(is_last, b_grad + b_main, b_grad)
        if p_reset is not None:
            starts = tl.load(p_reset, mask=is_last & (n < N), other=0)
            b_grad = tl.where(starts != 0, 0.0, b_grad)
            p_reset -= tl.where(is_last, stride_reset_n, 0)
        n -= is_last.to(tl.int32)
        t = tl.where(is_last, 0, t)
    if p_before is not None:
        tiles.store_state(
            p_before, b_grad, (stride_before_k, stride_before_v), first_col, COLS_K, COLS_V, DK, DV
        )
