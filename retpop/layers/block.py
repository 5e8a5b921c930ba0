"""One layer of a decoder: retention and feed-forward, each with its norm and its residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retpop.config import RetNetConfig
from retpop.layers.calls import Call
from retpop.layers.dropout import dropout
from retpop.layers.feed_forward import FeedForward
from retpop.layers.norm import residual_norm
from retpop.layers.retention import MultiScaleRetention


class RetNetBlock(nn.Module):
    """x + f(norm(x)) for retention, then for the feed-forward; x + norm(f(x)) with ``norm_first=False``.

    Source: RetNet, arXiv 2307.08621, section 2.3; norm_first=False as in yet-another-retnet.
    """

    def __init__(
        self,
        cfg: RetNetConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm_first, self.dropout = cfg.norm_first, cfg.dropout
        self.retention = MultiScaleRetention(cfg, device, dtype)
        self.retention_norm = residual_norm(cfg, device, dtype)
        self.feed_forward = FeedForward(cfg, device, dtype)
        self.feed_forward_norm = residual_norm(cfg, device, dtype)

    def forward(self, x: Tensor, kv: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """Map (B, T, E) and the layer's state (B, H, Dk, Dv) to the same two, in a call that was prepared.

        What comes out is of the call's readers.
        """
        if self.norm_first:
            mixed, kv = self.retention.mix(self.retention_norm(x), kv, call)
            x = call.readers(x) + self._drop(mixed)
            return x + self._drop(self.feed_forward(self.feed_forward_norm(x))), kv
        mixed, kv = self.retention.mix(x, kv, call)
        x = call.readers(x) + self.retention_norm(self._drop(mixed))
        return x + self.feed_forward_norm(self._drop(self.feed_forward(x))), kv

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)
