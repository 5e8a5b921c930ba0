"""The recurrent step of decoding: one token for the whole batch in one launch, the state out of place.

    S' = γ S + kᵀ v
    o  = c · q S'

Each state is read once and written once, and everything else is small, so memory sets the time. Arithmetic is
float32, without dot products: nothing is rounded on its way but the output.

Grid: (B · H · slices of Dv,), the slices of a head next to each other. `configs.step_config` makes the slices
narrow where the batch is too small to fill the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .configs import StepConfig, step_config
from .launch import Launch, Target, launched, named_strides, target_of, with_contiguous_rows


@triton.jit(do_not_specialize=["H"])
def retention_step_kernel(
    p_q,
    p_k,
    p_v,
    p_log_decay,
    p_state,
    p_out,
    p_new_state,
    scale,
    H,
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    stride_state_b,
    stride_state_h,
    stride_state_k,
    stride_state_v,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """S' = γ S + kᵀ v and o = c · q S' for one head and COLS columns of Dv.

    Without p_state S is 0; without p_new_state S' is not stored.
    """
    SLICES: tl.constexpr = (DV + COLS - 1) // COLS
    i_v = tl.program_id(0) % SLICES
    i_bh = (tl.program_id(0) // SLICES).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_k = tl.arange(0, ROWS)
    o_v = i_v * COLS + tl.arange(0, COLS)
    m_k = o_k < DK
    m_v = o_v < DV

    b_q = tl.load(p_q + i_b * stride_q_b + i_h * stride_q_h + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_b * stride_k_b + i_h * stride_k_h + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_b * stride_v_b + i_h * stride_v_h + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_state = b_k[:, None] * b_v[None, :]
    if p_state is not None:
        p_old = p_state + i_b * stride_state_b + i_h * stride_state_h
        b_old = tiles.load_state(p_old, (stride_state_k, stride_state_v), i_v * COLS, ROWS, COLS, DK, DV)
        whole, rest = tiles.decay_across(tiles.load_log_decay(p_log_decay, i_h), 1)
        b_state = tiles.advance(b_old, whole, rest, b_state)
    if p_new_state is not None:
        tiles.store_tile(p_new_state + i_bh * (DK * DV), b_state, DV, DK, i_v * COLS, ROWS, COLS, DV)
    b_out = scale * tl.sum(b_q[:, None] * b_state, axis=0)
    tl.store(p_out + i_bh * DV + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)


def plan_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    *,
    out_dtype: torch.dtype | None = None,
    with_final: bool = True,
    config: StepConfig | None = None,
    target: Target | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launch of `retention_step`, and the tensors that it fills; the state is one only `with_final`."""
    B, H, Dk = q.shape
    Dv = v.shape[-1]
    out = torch.empty((B, H, Dv), dtype=out_dtype or v.dtype, device=v.device)
    new_state = torch.empty((B, H, Dk, Dv), dtype=torch.float32, device=v.device)
    if B == 0:
        return [], (out, new_state)
    if config is None:
        target = target or target_of(q.device)
        config = step_config(B * H, (Dk, Dv), target.multiprocessors)
    q, k, v = (with_contiguous_rows(x) for x in (q, k, v))
    launch = Launch(
        kernel=retention_step_kernel,
        grid=(B * H * triton.cdiv(Dv, config.cols),),
        arguments={
            **{"p_q": q, "p_k": k, "p_v": v, "p_state": state, "p_log_decay": log_decay.contiguous()},
            **{"p_out": out, "p_new_state": new_state if with_final else None, "scale": scale, "H": H},
            **{"DK": Dk, "DV": Dv, "ROWS": config.rows, "COLS": config.cols},
            **named_strides("q", q, "bh"),
            **named_strides("k", k, "bh"),
            **named_strides("v", v, "bh"),
            **named_strides("state", state, "bhkv"),
        },
        num_warps=config.num_warps,
        num_stages=1,
    )
    return [launch], (out, new_state)


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: q, k (B, H, Dk), v (B, H, Dv), state (B, H, Dk, Dv) float32 or None for zeros.

    Returns:
        out (B, H, Dv) in out_dtype (None: v's), and the state after the token, float32. Both are new.
    """
    arguments = (q, k, v, log_decay, state, scale)
    outputs: tuple[Tensor, Tensor] = launched(
        plan_retention_step, *arguments, target=target_of(q.device), out_dtype=out_dtype
    )
    return outputs
