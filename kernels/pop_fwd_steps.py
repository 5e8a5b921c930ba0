"""POP, forward, one tile a step: for any lengths and head dims, where the line of pop_fwd.py is too long.

The tiles of each block come before or after those of its prediction, and one loop goes over all of them. A
prediction of up to two tiles leaves the state alone. A longer one overwrites the state's registers; the next
block restores the state at its boundary from a second set of registers. Formulas: pop_fwd.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles

# Arguments that differ from call to call: none of their values compiles a kernel anew.
RUN_TIME = ["N", "P", "L", "M", "offset", "num_blocks", "stride_reset_b", "stride_reset_n"]


@triton.jit(do_not_specialize=RUN_TIME)
def pop_fwd_steps_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_q_pred,
    p_k_pred,
    p_v_pred,
    p_pred,
    p_log_decay,
    p_state,
    p_reset,
    p_final,
    scale,
    N,
    L,
    P,
    M,
    offset,
    num_blocks,
    stride_q_b: tl.int64,
    stride_q_t,
    stride_q_h,
    stride_k_b: tl.int64,
    stride_k_t,
    stride_k_h,
    stride_v_b: tl.int64,
    stride_v_t,
    stride_v_h,
    stride_out_b: tl.int64,
    stride_out_t,
    stride_out_h,
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
    stride_pred_b: tl.int64,
    stride_pred_p: tl.int64,
    stride_pred_t,
    stride_pred_h,
    stride_state_b: tl.int64,
    stride_state_n: tl.int64,
    stride_state_h,
    stride_state_k,
    stride_state_v,
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
    AFTER: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """For each block n: o_(n,i), B_(n+1), and the o_(p,i) that start from B_(n+AFTER) (see pop_fwd.py).

    Strides are as in `pop_fwd_kernel`. PRED_TILES: 1 or 2 tiles hold a prediction, which leaves the state as
    it was: the second tile sees the first as a product of two tiles; 0: any number, and the state is kept
    elsewhere meanwhile. SPLIT: one block a program, from its own state. p_out or p_pred is None: those are
    not computed.
    """
    stride_q_t = tiles.token_stride(stride_q_t, 0, UNIT)
    stride_k_t = tiles.token_stride(stride_k_t, stride_q_t, UNIT)
    stride_v_t = tiles.token_stride(stride_v_t, stride_k_t, UNIT)
    stride_out_t = tiles.token_stride(stride_out_t, stride_q_t, UNIT)
    COLUMNS: tl.constexpr = (COLS_K, COLS_V, DK, DV)

    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_bh = tl.program_id(0) // SLICES
    i_b = i_bh // H
    i_h = (i_bh % H).to(tl.int64)
    first = 0
    last = num_blocks
    if SPLIT:
        first = i_b % num_blocks
        last = first + 1
        i_b = i_b // num_blocks
    i_b = i_b.to(tl.int64)
    p_q += (i_b * stride_q_b + i_h * stride_q_h) * UNIT
    p_k += (i_b * stride_k_b + i_h * stride_k_h) * UNIT
    p_v += (i_b * stride_v_b + i_h * stride_v_h) * UNIT
    if p_out is not None:
        p_out += (i_b * stride_out_b + i_h * stride_out_h) * UNIT
    p_q_pred += (i_b * stride_q_pred_b + i_h * stride_q_pred_h) * UNIT
    p_k_pred += (i_b * stride_k_pred_b + i_h * stride_k_pred_h) * UNIT
    p_v_pred += (i_b * stride_v_pred_b + i_h * stride_v_pred_h) * UNIT
    if p_pred is not None:
        p_pred += (i_b * stride_pred_b + i_h * stride_pred_h) * UNIT

    if p_state is None:
        b_state = tl.zeros((COLS_K, COLS_V), tl.float32)
    else:
        p_state += i_b * stride_state_b + first * stride_state_n + i_h * stride_state_h
        strides_state = (stride_state_k, stride_state_v)
        b_state = tiles.load_state(p_state, strides_state, first_col, COLS_K, COLS_V, DK, DV)
    if p_reset is not None:
        p_reset += i_b * stride_reset_b + first * stride_reset_n
        starts = tl.load(p_reset, mask=first < N, other=0)
        b_state = tl.where(starts != 0, 0.0, b_state)

    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    b_from_start = tiles.decay_from_start(log_decay, scale, TILE)
    b_within = tiles.decay_within(log_decay, scale, TILE)
    tiles_main = tl.cdiv(L, TILE)
    tiles_pred = tl.cdiv(M, TILE)
    first_main = 0 if AFTER else tiles_pred
    first_pred = tiles_main if AFTER else 0
    n = first
    t = 0
    b_boundary = b_state
    if PRED_TILES == 2:
        TYPE: tl.constexpr = p_k.dtype.element_ty
        earlier = (tl.zeros((TILE, COLS_K), TYPE), tl.zeros((TILE, COLS_V), TYPE))
    for _ in range((last - first) * (tiles_main + tiles_pred)):
        if p_reset is not None:
            m_starts = (t == first_pred) & (n + AFTER < N)
            starts = tl.load(p_reset + AFTER * stride_reset_n, mask=m_starts, other=0)
            b_state = tl.where(starts != 0, 0.0, b_state)
        if PRED_TILES == 0:
            b_boundary = tl.where(t == first_pred, b_state, b_boundary)
            b_state = tl.where(t == first_main, b_boundary, b_state)
        t_main = t - first_main
        t_pred = t - first_pred
        is_pred = (t_pred >= 0) & (t_pred < tiles_pred)
        i_p = n + AFTER - offset
        o_p = i_p.to(tl.int64)
        pointers = (
            tl.where(is_pred, p_q_pred + o_p * stride_q_pred_p * UNIT, p_q),
            tl.where(is_pred, p_k_pred + o_p * stride_k_pred_p * UNIT, p_k),
            tl.where(is_pred, p_v_pred + o_p * stride_v_pred_p * UNIT, p_v),
            tiles.chosen(is_pred, p_out, p_pred, o_p * stride_pred_p * UNIT),
        )
        strides = (
            tl.where(is_pred, tiles.token_stride(stride_q_pred_t, stride_q_t, UNIT), stride_q_t),
            tl.where(is_pred, tiles.token_stride(stride_k_pred_t, stride_k_t, UNIT), stride_k_t),
            tl.where(is_pred, tiles.token_stride(stride_v_pred_t, stride_v_t, UNIT), stride_v_t),
            tl.where(is_pred, tiles.token_stride(stride_pred_t, stride_out_t, UNIT), stride_out_t),
        )
        first_row = tl.where(is_pred, t_pred * TILE, n * L + t_main * TILE)
        end_pred = tl.where((i_p >= 0) & (i_p < P), M, 0)
        end_row = tl.where(is_pred, end_pred, tl.minimum(n * L + L, N * L))
        length = tl.maximum(tl.minimum(end_row - first_row, TILE), 0)
        whole, rest = tiles.decay_across(log_decay, length)
        place = (first_row, end_row, tiles.end_of(is_pred, end_row, p_out, p_pred), first_col)
        powers = (b_from_start, b_within, tiles.decay_to_end(log_decay, length, TILE), whole, rest)
        if PRED_TILES == 2:
            is_second = t_pred == 1  # of a prediction's two tiles
            earlier = (tl.where(is_second, earlier[0], 0.0), tl.where(is_second, earlier[1], 0.0))
            b_state, earlier = tiles.pass_tile(
                pointers,
                strides,
                place,
                b_state,
                powers,
                ~is_pred,
                TILE,
                COLUMNS,
                PRECISION,
                SCALE_V,
                True,
                earlier,
                tl.where(is_pred, tl.exp(log_decay * first_row), 1.0),
            )
        else:
            b_next = tiles.pass_tile(
                pointers, strides, place, b_state, powers, True, TILE, COLUMNS, PRECISION, SCALE_V, True
            )
            b_state = tl.where(is_pred, b_state, b_next) if PRED_TILES == 1 else b_next
        t += 1
        is_last = t == tiles_main + tiles_pred
        t = tl.where(is_last, 0, t)
        n += is_last.to(tl.int32)
        if p_reset is not None:
            p_reset += tl.where(is_last, stride_reset_n, 0)
    if AFTER and PRED_TILES == 0:
        b_state = b_boundary
    if p_final is not None:
        p_final += i_bh.to(tl.int64) * (DK * DV)
        tiles.store_tile(p_final, b_state, DV, DK, first_col, COLS_K, COLS_V, DV)
