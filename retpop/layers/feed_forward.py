"""The feed-forward half of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retpop.config import RetNetConfig
from retpop.layers.dropout import dropout
from retpop.ops.torch_backend import ACTIVATIONS


class FeedForward(nn.Module):
    """Linear, activation, linear ("mlp"); or, with a gate, activation(x W_g) times x W_u, linear ("glu").

    Weights start Glorot-uniform and biases at zero (Glorot and Bengio 2010).
    """

    def __init__(
        self,
        cfg: RetNetConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.dropout = cfg.ffn, cfg.dropout
        self.activation_name = cfg.activation
        hidden = cfg.ffn_dim * (2 if cfg.ffn == "glu" else 1)
        self.in_proj = nn.Linear(cfg.embed_dim, hidden, bias=cfg.bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(cfg.ffn_dim, cfg.embed_dim, bias=cfg.bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: Glorot-uniform, separately for the gate's half; biases zero."""
        for weight in (*self.in_proj.weight.chunk(2 if self.kind == "glu" else 1), self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., E) to (..., E)."""
        activation = ACTIVATIONS[self.activation_name]
        hidden = self.in_proj(x)
        if self.kind == "glu":
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        if self.dropout:
            hidden = dropout(hidden, self.dropout, self.training)
        return self.out_proj(hidden)

    def extra_repr(self) -> str:
        """The kind and activation, for ``print(model)``."""
        return f"{self.kind}, {self.activation_name}, dropout={self.dropout}"
