"""The world model's target for a reward: its sign or its size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rem_atari.models.sampling import sample_categorical
from rem_atari.models.two_hot import TwoHot

REWARD_CLASSES = 3
"""The signs of a reward: class 0 is -1, class 1 is 0, class 2 is +1."""


class RewardCode(nn.Module):
    """Rewards as classes of the world model's reward head.

    Signs are classes -1, 0 and +1, drawn from their distribution in imagination. Sizes are weights on
    symlog-spaced bins, and imagination gives their mean.

    Args:
        bins: number of bins for sizes, odd; 0: signs.

    Raises:
        ValueError: the number of bins is even or below 3.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.signs_only = bins == 0
        signs = TwoHot(torch.tensor([-1.0, 0.0, 1.0]))
        self.two_hot = signs if self.signs_only else TwoHot.symlog(bins, "world_model.reward_bins")
        self.num_classes = len(self.two_hot.values)

    def draw(self, logits: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> Tensor:
        """A reward for each row of logits (B, C): (B,) float32. The temperature is that of signs."""
        if self.signs_only:
            return (sample_categorical(logits, generator, temperature=temperature) - 1).float()
        return self.mean(logits)

    def mean(self, logits: Tensor) -> Tensor:
        """The mean of the distribution of rewards (B, C), (B,) float32; of signs P(+1) - P(-1)."""
        return self.two_hot.mean(logits)

    def sign_logits(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the signs -1, 0, +1: (..., C) to (..., 3)."""
        log_probabilities, middle = logits.float().log_softmax(dim=-1), self.num_classes // 2
        parts = log_probabilities.split((middle, 1, middle), dim=-1)
        return torch.stack([part.logsumexp(dim=-1) for part in parts], dim=-1)

    def loss(self, logits: Tensor, rewards: Tensor) -> Tensor:
        """Divergence in nats of logits (..., C) from raw rewards (...); of signs the cross-entropy."""
        return self.two_hot.divergence(logits, self._learned(rewards))

    def base_rate(self, rewards: Tensor, weights: Tensor) -> Tensor:
        """The least weighted mean loss that one fixed distribution reaches on the rewards (...); a scalar."""
        targets = self.two_hot.encode(self._learned(rewards)).flatten(0, -2)
        shares = weights.flatten() / weights.sum().clamp(min=TINY)
        own = (torch.special.entr(targets).sum(dim=-1) * shares).sum()
        return torch.special.entr(shares @ targets).sum() - own

    def _learned(self, rewards: Tensor) -> Tensor:
        return rewards.sign() if self.signs_only else rewards


TINY = 1e-8
"""Stands in for a sum of weights that is 0."""


def reward_classes(rewards: Tensor) -> Tensor:
    """The classes (int64) of raw rewards: their sign plus one."""
    return rewards.sign().long() + 1
