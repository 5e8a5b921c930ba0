"""Cross-entropy that never holds the logits of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24
"""Logits held at a time: 64 MiB in float32."""

IGNORED = -100
"""The target of a token that has none, as in `torch.nn.functional.cross_entropy`."""


def chunked_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The mean cross-entropy of ``head(hidden)``, computed some tokens at a time.

    Tokens that fit into one piece are computed directly. Otherwise each piece's logits are dropped after the
    forward pass and recomputed in the backward pass. This costs one more product with the head's weight, and
    memory does not grow with the number of tokens.

    `torch.nn.functional.linear_cross_entropy` (torch 2.13) needs no second product, but it takes a weight and
    not a module, so adapters, quantised heads and hooks would have no effect.

    Args:
        head: maps (N, E) to logits (N, V).
        hidden: (N, E).
        targets: (N,), int64; -100 for tokens that do not count.
        vocab_size: V.

    Returns:
        a scalar, float32 (float64 for float64 inputs); NaN if no token counts, as in torch.
    """
    at_once = max(1, LOGITS_AT_ONCE // vocab_size)
    if len(hidden) <= at_once:
        total = _summed_loss(head, hidden, targets)
    else:
        pieces = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        losses = [checkpoint(_summed_loss, head, *piece, use_reentrant=False) for piece in pieces]
        total = torch.stack(losses).sum()
    return total / (targets != IGNORED).sum()


def _summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
