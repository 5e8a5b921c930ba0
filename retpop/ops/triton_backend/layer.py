"""A layer's operations on single tokens by kernels: `norm_gate_fwd` and `rotary_fwd`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retpop import position
from retpop._torch import check
from retpop.arguments import state_dtype
from retpop.ops.rows import PopSpec
from retpop.ops.torch_backend import gated_norm as plain_gated_norm
from retpop.ops.triton_backend.custom import (
    Gradient,
    add_gradient,
    kernel_op,
    kernels,
    own,
    refuse_transforms,
)
from retpop.position import Rotation

Pair = tuple[Tensor, Tensor]


def rotation(positions: Tensor, frequencies: Tensor, kind: str, num_heads: int) -> Rotation:
    """The rotation of tokens at ``positions``, for `rotate`; one for all heads."""
    return position.rotation_at(positions, frequencies, kind)


def rotate(q: Tensor, k: Tensor, rotation: Rotation, kind: str, spec: PopSpec | None = None) -> Pair:
    """`retpop.position.rotate` of both; with ``spec`` of rows, and a short q becomes a full one."""
    refuse_transforms(q, k)
    q = q if spec is None else spec.all_tokens(q)
    return rotary_fwd(q, k, rotation.cos, rotation.sin, kind, False)


def gated_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float,
    activation: str,
) -> Tensor:
    """`retpop.ops.torch_backend.gated_norm`; in one pass for "silu", in torch operations for the others."""
    if activation != "silu":
        return plain_gated_norm(x, gate, weight, bias, kind=kind, eps=eps, activation=activation)
    refuse_transforms(x, gate, weight, bias)
    return norm_gate_fwd(x, gate, weight, bias, kind, eps)


def _launch_norm_gate(*arguments: Any) -> Tensor:
    return kernels("norm_gate").norm_gate_fwd(*arguments)


def _compute_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    wide = state_dtype(x.dtype)
    affine = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    y = plain_gated_norm(x.to(wide), gate.to(wide), *affine, kind=kind, eps=eps, activation="silu")
    return own(y.to(gate.dtype))


def _fake_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    check(kind in ("groupnorm", "rmsnorm"), lambda: f"kind is {kind!r}")
    check(x.shape == gate.shape, lambda: f"x is {tuple(x.shape)} but its gate {tuple(gate.shape)}")
    for parameter in (weight, bias):
        check(
            parameter is None or parameter.shape == x.shape[-2:],
            lambda: f"weight and bias must be {tuple(x.shape[-2:])}",
        )
    return gate.new_empty(gate.shape)


norm_gate_fwd = kernel_op(
    "norm_gate_fwd",
    "(Tensor x, Tensor gate, Tensor? weight, Tensor? bias, str kind, float eps) -> Tensor",
    launch=_launch_norm_gate,
    compute=_compute_norm_gate,
    fake=_fake_norm_gate,
)


def _launch_norm_gate_gradients(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grads: Sequence[Tensor],
    kind: str,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    return kernels("norm_gate").norm_gate_bwd(x, gate, weight, bias, *grads, kind, eps, needs)


def _compute_norm_gate_gradients(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grads: Sequence[Tensor],
    kind: str,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """With n = norm(x), a = n · weight + bias, g the gate and σ its sigmoid, d the gradient of y.

    dgate   = d a σ (1 + g (1 - σ))
    da      = d g σ,   dweight = Σ da n,   dbias = Σ da,   dn = da · weight
    dx      = (dn - mean(dn) - n mean(dn n)) / deviation      ("rmsnorm": without mean(dn))
    """
    wide = state_dtype(x.dtype)
    centred = x.to(wide)
    if kind == "groupnorm":
        centred = centred - centred.mean(dim=-1, keepdim=True)
    inverse = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    n, g, d = centred * inverse, gate.to(wide), grads[0].to(wide)
    a = n if weight is None else n * weight.to(wide)
    a = a if bias is None else a + bias.to(wide)
    sigmoid = g.sigmoid()
    da = d * g * sigmoid
    dn = da if weight is None else da * weight.to(wide)
    dx = dn - n * (dn * n).mean(dim=-1, keepdim=True)
    if kind == "groupnorm":
        dx = dx - dn.mean(dim=-1, keepdim=True)
    dgate = d * a * sigmoid * (1 + g * (1 - sigmoid))
    found = dx * inverse, dgate, *(y.flatten(0, -3).sum(0) for y in (da * n, da))
    inputs = zip(found, (x, gate, weight, bias), needs, strict=True)
    return [y.to(like.dtype) if need and like is not None else None for y, like, need in inputs]


add_gradient(
    norm_gate_fwd,
    "norm_gate_bwd",
    "(Tensor x, Tensor gate, Tensor? weight, Tensor? bias, Tensor?[] grads, str kind, float eps, "
    "bool[] needs) -> Tensor[]",
    launch=_launch_norm_gate_gradients,
    compute=_compute_norm_gate_gradients,
    num_tensors=4,
)


def _launch_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, inverse: bool) -> Pair:
    launch = kernels("rotary").rotary_fwd
    return launch(q, k, cos, sin, kind, inverse=inverse)


def _compute_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, inverse: bool) -> Pair:
    rotation = Rotation(cos, -sin if inverse else sin)
    return own(position.rotate(q, rotation, kind)), own(position.rotate(k, rotation, kind))


def _fake_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, inverse: bool) -> Pair:
    check(kind in ("retnet", "rope"), lambda: f"kind is {kind!r}")
    check(q.shape == k.shape, lambda: f"q is {tuple(q.shape)} but k {tuple(k.shape)}")
    check(
        cos.shape == sin.shape and cos.shape[1:] == (q.shape[1], 1, q.shape[3]),
        lambda: f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; q is {tuple(q.shape)}",
    )
    check(cos.shape[0] in (1, q.shape[0]), lambda: f"cos has {cos.shape[0]} rows; it must have 1 or B")
    return q.new_empty(q.shape), k.new_empty(k.shape)


rotary_fwd = kernel_op(
    "rotary_fwd",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, str kind, bool inverse) -> (Tensor, Tensor)",
    launch=_launch_rotary,
    compute=_compute_rotary,
    fake=_fake_rotary,
)


def _rotary_gradients(
    rotate: Callable[..., Pair],
    q: None,
    k: None,
    cos: Tensor,
    sin: Tensor,
    grads: Sequence[Tensor | None],
    kind: str,
    inverse: bool,
    needs: Sequence[bool],
) -> Pair:
    """A rotation's transpose is its inverse."""
    like = next(x for x in grads if x is not None)
    grad_q, grad_k = (torch.zeros_like(like) if x is None else x for x in grads)
    return rotate(grad_q, grad_k, cos, sin, kind, not inverse)


rotary_fwd.differentiate_by(
    Gradient(
        launch=partial(_rotary_gradients, _launch_rotary),
        by_ops=partial(_rotary_gradients, rotary_fwd),
        num_tensors=4,
        unsaved=2,
    )
)
