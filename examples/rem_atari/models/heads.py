"""Heads: small networks from a decoder's outputs to logits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def make_head(width: int, classes: int) -> nn.Sequential:
    """Two linear layers, from outputs (..., width) to logits (..., classes)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def code_logits(
    head: nn.Sequential, outputs: Tensor, num_codes: int, more_weights: Tensor | None = None
) -> Tensor:
    """The logits of the first `num_codes` classes, one for each existing code: (..., num_codes).

    `more_weights` (num_codes, width), if any, are added to those of the last layer.
    """
    last = head[-1]
    weights = last.weight[:num_codes]
    if more_weights is not None:
        weights = weights + more_weights
    return functional.linear(head[:-1](outputs), weights, last.bias[:num_codes])
