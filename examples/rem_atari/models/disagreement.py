"""Curiosity: the disagreement of several heads about the next observation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rem_atari.models.heads import code_logits, make_head


class Disagreement(nn.Module):
    """Heads that learn to predict the same tokens from the same outputs and differ in their initial weights.

    Where the game has shown a situation often, all heads predict the same distribution; elsewhere they keep
    their initial predictions. So they disagree about what is new, and not about what is random.

    Args:
        width: of the decoder's outputs.
        codebook_size: the most codes that there will be.
        heads: number of heads, at least 2.

    Raises:
        ValueError: there are fewer than two heads.

    Source: Simulus, arXiv 2502.11537 (heads on stopped gradients, their divergence as reward); the idea is
    Plan2Explore's, arXiv 2005.05960.
    """

    def __init__(self, width: int, codebook_size: int, heads: int) -> None:
        super().__init__()
        if heads < 2:
            raise ValueError(
                f"world_model.disagreement_heads is {heads}; wanted 0 (none) or at least 2, for one head has"
                " none to disagree with."
            )
        self.heads = nn.ModuleList(make_head(width, codebook_size) for _ in range(heads))

    def forward(self, outputs: Tensor, num_codes: int) -> Tensor:
        """Logits (H, ..., V) of H heads from outputs (..., width), through which no gradient flows."""
        outputs = outputs.detach()
        return torch.stack([code_logits(head, outputs, num_codes) for head in self.heads])


def divergence(logits: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of H heads' distributions, in nats, from 0 to ln H.

    Args:
        logits: (H, ..., V).

    Returns:
        The entropy of the heads' mean less the mean of their entropies, (...), float32.
    """
    chances = logits.float().softmax(dim=-1)
    mean, each = chances.mean(dim=0), torch.special.entr(chances).sum(dim=-1)
    return torch.special.entr(mean).sum(dim=-1) - each.mean(dim=0)
