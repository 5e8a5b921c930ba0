"""The norm of each head's output, and the gate that it is multiplied by, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def head_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, kind: str, eps: float) -> Tensor:
    """Each head of (..., H, Dv) normalised over its features; statistics in float32 or wider.

    Args:
        x: the heads' outputs.
        weight, bias: (H, Dv), or None.
        kind: "groupnorm" (mean and variance) or "rmsnorm" (root mean square).
        eps: added to the variance or to the mean square.

    Source: RetNet, arXiv 2307.08621, equation 8 (GroupNorm, one group a head).
    """
    normalize = F.layer_norm if kind == "groupnorm" else F.rms_norm
    x = normalize(x, x.shape[-1:], eps=eps)
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


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
    """``activation`` of the gate, times `head_norm` of x: all (..., H, Dv); the result in gate's dtype."""
    y = ACTIVATIONS[activation](gate) * head_norm(x, weight, bias, kind=kind, eps=eps)
    return y if y.dtype == gate.dtype else y.to(gate.dtype)
