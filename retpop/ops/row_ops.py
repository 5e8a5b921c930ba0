"""`retpop::norm_gate_fwd` and `rotary_fwd`: what a layer does to every token besides retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retpop.ops.custom import gradient_op, gradients_like, kernel_op, kernels, selected, spread
from retpop.ops.dtypes import state_dtype
from retpop.position import Rotation, rotate

Pair = tuple[Tensor, Tensor]


def _launch_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    launch = kernels("norm_gate").norm_gate_fwd
    return launch(x, gate, weight, bias, kind, eps)


def _compute_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    wide = state_dtype(x.dtype)
    normed, _ = _normed(x.to(wide), kind, eps)
    return (F.silu(gate.to(wide)) * _affine(normed, weight, bias)).to(x.dtype).contiguous()


def _normed(x: Tensor, kind: str, eps: float) -> Pair:
    """norm(x) and the reciprocal of what it was divided by, (..., H, 1)."""
    if kind == "groupnorm":
        x = x - x.mean(dim=-1, keepdim=True)
    inverse = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return x * inverse, inverse


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normed = normed if weight is None else normed * weight.to(normed.dtype)
    return normed if bias is None else normed + bias.to(normed.dtype)


def _fake_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    torch._check(kind in ("groupnorm", "rmsnorm"), lambda: f"kind is {kind!r}")
    torch._check(x.shape == gate.shape, lambda: f"x is {tuple(x.shape)} but its gate {tuple(gate.shape)}")
    for parameter in (weight, bias):
        torch._check(
            parameter is None or parameter.shape == x.shape[-2:],
            lambda: f"weight and bias must be {tuple(x.shape[-2:])}",
        )
    return x.new_empty(x.shape)


norm_gate_fwd = kernel_op(
    "norm_gate_fwd",
    "(Tensor x, Tensor gate, Tensor? weight, Tensor? bias, str kind, float eps) -> Tensor",
    launch=_launch_norm_gate,
    compute=_compute_norm_gate,
    fake=_fake_norm_gate,
)


def _compute_norm_gate_gradients(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    kind: str,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """With n = norm(x), a = n · weight + bias, g the gate and σ its sigmoid, d the gradient of y.

    dgate   = d a σ (1 + g (1 - σ))
    da      = d g σ,   dweight = Σ da n,   dbias = Σ da,   dn = da · weight
    dx      = (dn - mean(dn) - n mean(dn n)) / deviation      ("rmsnorm": without mean(dn))
    """
    wide = state_dtype(x.dtype)
    normed, inverse = _normed(x.to(wide), kind, eps)
    g, d = gate.to(wide), grad.to(wide)
    sigmoid = g.sigmoid()
    d_gate = d * _affine(normed, weight, bias) * sigmoid * (1 + g * (1 - sigmoid))
    d_affine = d * g * sigmoid
    d_normed = d_affine if weight is None else d_affine * weight.to(wide)
    d_x = d_normed - normed * (d_normed * normed).mean(dim=-1, keepdim=True)
    if kind == "groupnorm":
        d_x = d_x - d_normed.mean(dim=-1, keepdim=True)
    d_weight = (d_affine * normed).flatten(0, -3).sum(0)
    d_bias = d_affine.flatten(0, -3).sum(0)
    return selected((d_x * inverse, d_gate, d_weight, d_bias), (x, gate, weight, bias), needs)


def _launch_norm_gate_gradients(*arguments: Any) -> list[Tensor]:
    return [grad for grad in kernels("norm_gate").norm_gate_bwd(*arguments) if grad is not None]


def _fake_norm_gate_gradients(*arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:4], arguments[-1])


norm_gate_bwd = gradient_op(
    "norm_gate_bwd",
    "(Tensor x, Tensor gate, Tensor? weight, Tensor? bias, Tensor grad, str kind, float eps, bool[] needs) "
    "-> Tensor[]",
    launch=_launch_norm_gate_gradients,
    compute=_compute_norm_gate_gradients,
    fake=_fake_norm_gate_gradients,
)


def _save_norm_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_norm_gate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    found = norm_gate_bwd(*ctx.saved_tensors, grad, ctx.kind, ctx.eps, needs)
    return *spread(found, needs), None, None


norm_gate_fwd.register_autograd(_differentiate_norm_gate, setup_context=_save_norm_gate)


def _launch_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, inverse: bool) -> Pair:
    launch = kernels("rotary").rotary_fwd
    return launch(q, k, cos, sin, kind, inverse=inverse)


def _compute_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, inverse: bool) -> Pair:
    rotation = Rotation(cos, -sin if inverse else sin)
    return rotate(q, rotation, kind).contiguous(), rotate(k, rotation, kind).contiguous()


def _fake_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, inverse: bool) -> Pair:
    torch._check(kind in ("retnet", "rope"), lambda: f"kind is {kind!r}")
    torch._check(q.shape == k.shape, lambda: f"q is {tuple(q.shape)} but k {tuple(k.shape)}")
    torch._check(
        cos.shape == sin.shape and cos.shape[1:] == (q.shape[1], 1, q.shape[3]),
        lambda: f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; q is {tuple(q.shape)}",
    )
    torch._check(cos.shape[0] in (1, q.shape[0]), lambda: f"cos has {cos.shape[0]} rows; it must have 1 or B")
    return q.new_empty(q.shape), k.new_empty(k.shape)


rotary_fwd = kernel_op(
    "rotary_fwd",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, str kind, bool inverse) -> (Tensor, Tensor)",
    launch=_launch_rotary,
    compute=_compute_rotary,
    fake=_fake_rotary,
)


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    _, _, cos, sin, ctx.kind, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate_rotary(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation's transpose is its inverse."""
    cos, sin = ctx.saved_tensors
    grad_q, grad_k = rotary_fwd(grad_q, grad_k, cos, sin, ctx.kind, not ctx.inverse)
    return grad_q, grad_k, None, None, None, None


rotary_fwd.register_autograd(_differentiate_rotary, setup_context=_save_rotary)
