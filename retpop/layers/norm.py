"""Normalisations: of the residual stream, and of each head's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retpop.config import RetNetConfig
from retpop.ops.torch_backend import head_norm


def residual_norm(
    cfg: RetNetConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The normalisation of the residual stream, over its last dimension E."""
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.embed_dim, eps=cfg.norm_eps, device=device, dtype=dtype)
    return nn.LayerNorm(cfg.embed_dim, eps=cfg.norm_eps, bias=cfg.bias, device=device, dtype=dtype)


class HeadNorm(nn.Module):
    """Normalises each head's output over its Dv features; statistics in float32 or wider.

    "groupnorm" removes mean and variance, "rmsnorm" the root mean square. With ``head_norm_affine`` every
    value feature of every head has a weight (and, for "groupnorm", a bias).

    Source: RetNet, arXiv 2307.08621, equation 8 (GroupNorm, one group a head).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        cfg: RetNetConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.eps = cfg.head_norm, cfg.head_norm_eps
        shape = (cfg.num_heads, cfg.head_value_dim)
        weight = bias = None
        if cfg.head_norm_affine:
            weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
            if self.kind == "groupnorm":
                bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def reset_parameters(self) -> None:
        """Weights of one, biases of zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., H, Dv) over the last dimension."""
        return head_norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps)

    def extra_repr(self) -> str:
        """The kind and epsilon, for ``print(model)``."""
        return f"{self.kind}, eps={self.eps}, affine={self.weight is not None}"
