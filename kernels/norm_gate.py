"""Norm of each head's output, times its gate: one pass over memory.

    y = silu(gate) · (norm(x) · weight + bias),    silu(g) = g / (1 + exp(-g))

with norm "groupnorm", (x - mean) / sqrt(variance + eps), or "rmsnorm", x / sqrt(mean square + eps), both over
the Dv features of a head. Statistics and products are float32; y is rounded once.

Grid: one dimension. A program owns PAIRS (token, head) pairs, each a row of Dv features held whole in
registers, so that every element of x and gate is read once and every element of y written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import row_config
from .launch import Launch, run, with_contiguous_rows


@triton.jit(do_not_specialize=["num_pairs"])
def norm_gate_fwd_kernel(
    p_x,
    p_gate,
    p_weight,
    p_bias,
    p_y,
    num_pairs,
    stride_x_t,
    stride_x_h,
    stride_gate_t,
    stride_gate_h,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    PAIRS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """y = silu(gate) · (norm(x) · weight + bias), PAIRS (token, head) pairs a program."""
    i_pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    i_token, i_head = i_pair // H, i_pair % H
    o_d = tl.arange(0, COLS)
    m_d = o_d < D
    mask = (i_pair < num_pairs)[:, None] & m_d[None, :]

    o_x = i_token * stride_x_t + i_head * stride_x_h
    o_gate = i_token * stride_gate_t + i_head * stride_gate_h
    b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_gate[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)

    if CENTRED:
        b_mean = tl.sum(b_x, axis=1) / D
        b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_y = b_x / tl.sqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]

    o_affine = i_head[:, None] * D + o_d[None, :]
    if p_weight is not None:
        b_y *= tl.load(p_weight + o_affine, mask=mask, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_affine, mask=mask, other=0.0).to(tl.float32)
    b_y *= b_gate / (1.0 + tl.exp(-b_gate))
    tl.store(p_y + i_pair[:, None] * D + o_d[None, :], b_y.to(p_y.dtype.element_ty), mask=mask)


def norm_gate_fwd(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    """The norm of each head of ``x`` times silu of its gate.

    Args:
        x: retention's output, (..., H, Dv), in the gate's dtype or in float32.
        gate: before its activation, (..., H, Dv) or (..., H·Dv).
        weight, bias: (H, Dv), or None.
        kind: "groupnorm" or "rmsnorm".
        eps: added to the variance or to the mean square.

    Returns:
        y, in the shape of ``x`` and the gate's dtype, contiguous.
    """
    launches, y = plan_norm_gate_fwd(x, gate, weight, bias, kind, eps)
    run(launches, x.device)
    return y


def plan_norm_gate_fwd(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[list[Launch], Tensor]:
    """The launch of `norm_gate_fwd`, and the tensor it writes."""
    heads, dim = x.shape[-2:]
    y = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    if y.numel() == 0:
        return [], y
    # A view wherever the leading dimensions lie evenly in memory, as those of a projection's slice do.
    x, gate = x.reshape(-1, heads, dim), gate.reshape(-1, heads, dim)
    x, gate = with_contiguous_rows(x), with_contiguous_rows(gate)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    num_pairs = x.shape[0] * heads
    config = row_config(dim)
    arguments = {
        "p_x": x,
        "p_gate": gate,
        "p_weight": weight,
        "p_bias": bias,
        "p_y": y,
        "num_pairs": num_pairs,
        "stride_x_t": x.stride(0),
        "stride_x_h": x.stride(1),
        "stride_gate_t": gate.stride(0),
        "stride_gate_h": gate.stride(1),
        "eps": eps,
        "H": heads,
        "D": dim,
        "COLS": config.cols,
        "PAIRS": config.rows,
        "CENTRED": kind == "groupnorm",
    }
    grid = (triton.cdiv(num_pairs, config.rows),)
    launch = Launch(
        kernel=norm_gate_fwd_kernel, grid=grid, arguments=arguments, num_warps=config.num_warps, num_stages=1
    )
    return [launch], y
