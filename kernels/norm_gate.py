"""Norm of each head's output, times its gate: one pass over memory forwards, one backwards.

    y = silu(gate) · (norm(x) · weight + bias),    silu(g) = g / (1 + exp(-g))

with norm "groupnorm", (x - mean) / sqrt(variance + eps), or "rmsnorm", x / sqrt(mean square + eps), both over
the Dv features of a head. With n = norm(x), a = n · weight + bias, g the gate, σ = 1 / (1 + exp(-g)), d the
gradient of y, and means over the Dv features of a head:

    dgate = d a σ (1 + g (1 - σ))
    da    = d g σ,    dweight = Σ da n,    dbias = Σ da,    dn = da · weight
    dx    = (dn - mean(dn) - n mean(dn n)) / deviation         "rmsnorm": without mean(dn)

The backward recomputes the statistics from x: keeping them would save no read, because n is needed anyway.
Everything is float32, and each result is rounded once.

Forward grid: (tiles of (token, head) pairs,). A program holds its rows of Dv features whole in registers, so
every element of x and gate is read once and every element of y written once.

Backward grid: (runs of tokens · H,), heads next to each other, since their rows are. A program owns one head
of a run, tile by tile. A run is one tile, unless sums over tokens are needed. Then there are as many runs
as keep the GPU busy, each writes its sums, and a second kernel adds them up in order. There are no atomic
additions, so the bits are the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import row_config, row_runs
from .launch import Launch, Target, launched, named_strides, target_of, with_contiguous_rows, zero

Gradients = list[Tensor | None]


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


@triton.jit(do_not_specialize=["num_tokens", "run_length"])
def norm_gate_bwd_kernel(
    p_x,
    p_gate,
    p_weight,
    p_bias,
    p_dy,
    p_dx,
    p_dgate,
    p_weight_sums,
    p_bias_sums,
    num_tokens,
    run_length,
    stride_x_t: tl.int64,
    stride_x_h,
    stride_gate_t: tl.int64,
    stride_gate_h,
    stride_dy_t: tl.int64,
    stride_dy_h,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """dx, dgate and the sums of da n and da, of one head of a run (formulas above); None: not wanted."""
    i_head = (tl.program_id(0) % H).to(tl.int64)
    i_run = tl.program_id(0) // H
    first = i_run.to(tl.int64) * run_length
    o_d = tl.arange(0, COLS)[None, :]
    m_d = o_d < D
    p_x += i_head * stride_x_h
    p_gate += i_head * stride_gate_h
    p_dy += i_head * stride_dy_h
    o_affine = i_head * D + o_d
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_affine, mask=m_d, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_affine, mask=m_d, other=0.0).to(tl.float32)
    b_weight_sums = tl.zeros((TOKENS, COLS), tl.float32)
    b_bias_sums = tl.zeros((TOKENS, COLS), tl.float32)

    for i in range(0, run_length, TOKENS):
        i_token = first + i + tl.arange(0, TOKENS)[:, None]
        mask = (i_token < num_tokens) & m_d
        b_x = tl.load(p_x + i_token * stride_x_t + o_d, mask=mask, other=0.0).to(tl.float32)
        b_gate = tl.load(p_gate + i_token * stride_gate_t + o_d, mask=mask, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + i_token * stride_dy_t + o_d, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            b_x = tl.where(m_d, b_x - tl.sum(b_x, axis=1, keep_dims=True) / D, 0.0)
        b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1, keep_dims=True) / D + eps)
        b_normed = b_x * b_inverse
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
        o_out = (i_token * H + i_head) * D + o_d
        if p_dgate is not None:
            b_a = b_normed
            if p_weight is not None:
                b_a *= b_weight
            if p_bias is not None:
                b_a += b_bias
            b_dgate = b_dy * b_a * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
            tl.store(p_dgate + o_out, b_dgate.to(p_dgate.dtype.element_ty), mask=mask)
        b_da = b_dy * b_gate * b_sigmoid
        if p_weight_sums is not None:
            b_weight_sums += tl.where(mask, b_da * b_normed, 0.0)  # without eps a row of zeros is NaN
        if p_bias_sums is not None:
            b_bias_sums += b_da
        if p_dx is not None:
            if p_weight is not None:
                b_da *= b_weight
            b_dx = b_da - b_normed * (tl.sum(b_da * b_normed, axis=1, keep_dims=True) / D)
            if CENTRED:
                b_dx -= tl.sum(b_da, axis=1, keep_dims=True) / D
            tl.store(p_dx + o_out, (b_dx * b_inverse).to(p_dx.dtype.element_ty), mask=mask)

    o_sums = (i_run.to(tl.int64) * H + i_head) * D + tl.arange(0, COLS)
    m_sums = tl.arange(0, COLS) < D
    if p_weight_sums is not None:
        tl.store(p_weight_sums + o_sums, tl.sum(b_weight_sums, axis=0), mask=m_sums)
    if p_bias_sums is not None:
        tl.store(p_bias_sums + o_sums, tl.sum(b_bias_sums, axis=0), mask=m_sums)


@triton.jit(do_not_specialize=["num_runs"])
def add_runs_kernel(p_sums, p_total, num_runs, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The total over runs of their sums, (runs, WIDTH). Grid: (slices of WIDTH,)."""
    o_col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < WIDTH
    b_total = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(0, num_runs, ROWS):
        i_run = (i + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (i_run < num_runs) & m_col[None, :]
        b_total += tl.load(p_sums + i_run * WIDTH + o_col[None, :], mask=mask, other=0.0)
    b_total = tl.sum(b_total, axis=0)
    tl.store(p_total + o_col, b_total.to(p_total.dtype.element_ty), mask=m_col)


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
    y: Tensor = launched(plan_norm_gate_fwd, x, gate, weight, bias, kind, eps)
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
    launch = Launch(
        kernel=norm_gate_fwd_kernel,
        grid=(triton.cdiv(num_pairs, config.rows),),
        arguments={
            **{"p_x": x, "p_gate": gate, "p_weight": weight, "p_bias": bias, "p_y": y},
            **{"num_pairs": num_pairs, **named_strides("x", x, "th"), **named_strides("gate", gate, "th")},
            **{"eps": eps, "H": heads, "D": dim, "COLS": config.cols, "PAIRS": config.rows},
            "CENTRED": kind == "groupnorm",
        },
        num_warps=config.num_warps,
        num_stages=1,
    )
    return [launch], y


def norm_gate_bwd(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    kind: str,
    eps: float,
    needs: Sequence[bool] = (True, True, True, True),
) -> Gradients:
    """Gradients of `norm_gate_fwd`.

    Args:
        x, gate, weight, bias, kind, eps: as in `norm_gate_fwd`.
        grad: of y, (..., H, Dv), any strides.
        needs: which gradients to find: of x, gate, weight, bias.

    Returns:
        One gradient for each of `needs`, new, contiguous, in the shape and dtype of what it belongs to; None
        where it is not needed, and for a weight or bias of None.
    """
    arguments = (x, gate, weight, bias, grad, kind, eps, tuple(needs))
    grads: Gradients = launched(plan_norm_gate_bwd, *arguments, target=target_of(x.device))
    return grads


def plan_norm_gate_bwd(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    kind: str,
    eps: float,
    needs: Sequence[bool] = (True, True, True, True),
    *,
    target: Target | None = None,
) -> tuple[list[Launch], Gradients]:
    """The launches of `norm_gate_bwd`, and the tensors that they fill."""
    heads, dim = x.shape[-2:]
    grads: Gradients = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else None
        for t, need in zip((x, gate, weight, bias), needs, strict=True)
    ]
    d_x, d_gate, d_weight, d_bias = grads
    if x.numel() == 0 or all(t is None for t in grads):
        zero(*grads)
        return [], grads
    # Views wherever the leading dimensions lie evenly in memory, as those of a projection's slice do.
    x, gate, grad = (with_contiguous_rows(t.reshape(-1, heads, dim)) for t in (x, gate, grad))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    config = row_config(dim)
    with_sums = d_weight is not None or d_bias is not None
    target = target or target_of(x.device)
    num_runs, run_length = row_runs(x.shape[0], heads, config, target.multiprocessors, long=with_sums)
    sums = [
        None if t is None else torch.empty((num_runs, heads, dim), dtype=torch.float32, device=x.device)
        for t in (d_weight, d_bias)
    ]
    arguments = {
        **{"p_x": x, "p_gate": gate, "p_weight": weight, "p_bias": bias, "p_dy": grad},
        **{"p_dx": d_x, "p_dgate": d_gate, "p_weight_sums": sums[0], "p_bias_sums": sums[1]},
        **{"num_tokens": x.shape[0], "run_length": run_length},
        **named_strides("x", x, "th"),
        **named_strides("gate", gate, "th"),
        **named_strides("dy", grad, "th"),
        **{"eps": eps, "H": heads, "D": dim, "COLS": config.cols, "TOKENS": config.rows},
        "CENTRED": kind == "groupnorm",
    }
    launches = [
        Launch(
            kernel=norm_gate_bwd_kernel,
            grid=(num_runs * heads,),
            arguments=arguments,
            num_warps=config.num_warps,
            num_stages=1,
        )
    ]
    for t, total in zip(sums, (d_weight, d_bias), strict=True):
        if t is not None and total is not None:
            launches.append(_add_runs(t, total))
    return launches, grads


def _add_runs(sums: Tensor, total: Tensor) -> Launch:
    rows, cols = 64, 16
    return Launch(
        kernel=add_runs_kernel,
        grid=(triton.cdiv(total.numel(), cols),),
        arguments={
            **{"p_sums": sums, "p_total": total, "num_runs": sums.shape[0], "WIDTH": total.numel()},
            **{"ROWS": rows, "COLS": cols},
        },
        num_warps=4,
        num_stages=1,
    )
