"""Decoding in place: a few tokens of each row, whose state lies in a pool and is changed there.

    S <- γ S + k_tᵀ v_t,    o_t = c · q_t S    for t = 0 .. T-1

A row of the batch names its place in the pool, or none (-1: it is padding). Outputs are of all T tokens; the
place gets the state after the first `count` of them. So drafts can be verified with a count of 0, and be
taken in up to the last accepted one by a second call.

Each state is read once and written once, whatever T is, so memory sets the time. Arithmetic is float32,
without dot products, as in `retention_step`.

Grid: (B · H · slices of Dv,), the slices of a head next to each other, as in `retention_step`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .configs import StepConfig, step_config
from .launch import Launch, Target, launched, named_strides, target_of, with_contiguous_rows


@triton.jit(do_not_specialize=["H", "T", "places"])
def pooled_retention_kernel(
    p_q,
    p_k,
    p_v,
    p_log_decay,
    p_states,
    p_index,
    p_count,
    p_out,
    scale,
    H,
    T,
    places,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_states_n: tl.int64,
    stride_states_h,
    stride_states_k,
    stride_states_v,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """S <- γ S + k_tᵀ v_t and o_t = c · q_t S for one head and COLS columns of Dv, token by token.

    The state at place p_index[b] is replaced by that after p_count[b] tokens (None: all); where that is 0, it
    is not written. A row whose place is not one of the `places` has outputs of 0.
    """
    SLICES: tl.constexpr = (DV + COLS - 1) // COLS
    first_col = (tl.program_id(0) % SLICES) * COLS
    i_bh = tl.program_id(0) // SLICES
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_k = tl.arange(0, ROWS)
    o_v = first_col + tl.arange(0, COLS)
    m_k = o_k < DK
    m_v = o_v < DV

    i_n = tl.load(p_index + i_b).to(tl.int64)
    is_here = (i_n >= 0) & (i_n < places)
    count = T
    if p_count is not None:
        count = tl.load(p_count + i_b).to(tl.int32)
    p_states += tl.where(is_here, i_n, 0) * stride_states_n + i_h * stride_states_h
    strides = (stride_states_k, stride_states_v)
    rows = tl.where(is_here, DK, 0)
    b_state = tiles.load_state(p_states, strides, first_col, ROWS, COLS, rows, DV)
    whole, rest = tiles.decay_across(tiles.load_log_decay(p_log_decay, i_h), 1)
    p_q += i_b * stride_q_b + i_h * stride_q_h
    p_k += i_b * stride_k_b + i_h * stride_k_h
    p_v += i_b * stride_v_b + i_h * stride_v_h
    p_out += (i_b * T * H + i_h) * DV
    b_kept = b_state
    for t in range(T):
        b_q = tl.load(p_q + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_state = tiles.advance(b_state, whole, rest, b_k[:, None] * b_v[None, :])
        b_kept = tl.where(t < count, b_state, b_kept)
        b_out = tl.where(is_here, scale * tl.sum(b_q[:, None] * b_state, axis=0), 0.0)
        tl.store(p_out + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)
        p_q += stride_q_t
        p_k += stride_k_t
        p_v += stride_v_t
        p_out += H * DV
    rows = tl.where(count > 0, rows, 0)
    tiles.store_state(p_states, b_kept, strides, first_col, ROWS, COLS, rows, DV)


def plan_pooled_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    index: Tensor,
    count: Tensor | None,
    scale: float,
    *,
    config: StepConfig | None = None,
    target: Target | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launch of `pooled_retention`, and the tensor of outputs that it fills."""
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    out = torch.empty((B, T, H, Dv), dtype=v.dtype, device=v.device)
    if B * T == 0:
        return [], out
    if config is None:
        target = target or target_of(q.device)
        config = step_config(B * H, (Dk, Dv), target.multiprocessors)
    q, k, v = (with_contiguous_rows(x) for x in (q, k, v))
    launch = Launch(
        kernel=pooled_retention_kernel,
        grid=(B * H * triton.cdiv(Dv, config.cols),),
        arguments={
            **{"p_q": q, "p_k": k, "p_v": v, "p_log_decay": log_decay.contiguous(), "p_states": states},
            **{"p_index": index.contiguous(), "p_count": None if count is None else count.contiguous()},
            **{"p_out": out, "scale": scale, "H": H, "T": T, "places": states.shape[0]},
            **{"DK": Dk, "DV": Dv, "ROWS": config.rows, "COLS": config.cols},
            **named_strides("q", q, "bth"),
            **named_strides("k", k, "bth"),
            **named_strides("v", v, "bth"),
            **named_strides("states", states, "nhkv"),
        },
        num_warps=config.num_warps,
        num_stages=1,
    )
    return [launch], out


def pooled_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    index: Tensor,
    count: Tensor | None,
    scale: float,
) -> Tensor:
    """Retention of T tokens from states in a pool, which is changed in place.

    Args:
        q, k: (B, T, H, Dk), any strides; float32, float16 or bfloat16, as v.
        v: (B, T, H, Dv).
        log_decay: ln γ, (H,), float32; -inf for γ = 0.
        states: (N, H, Dk, Dv), float32, any strides without overlap.
        index: each row's place in the pool, (B,), int32 or int64, none twice; outside 0 .. N - 1: padding.
        count: how many tokens of each row its state takes in, (B,), int32 or int64; None: all.
        scale: c.

    Returns:
        out (B, T, H, Dv), in v's dtype; zeros for padding.
    """
    out: Tensor = launched(
        plan_pooled_retention, q, k, v, log_decay, states, index, count, scale, target=target_of(q.device)
    )
    return out
