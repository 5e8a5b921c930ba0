"""Numbers as distributions over bins, for classification instead of regression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 10.0
"""The symlog of the largest symlog-spaced bin: it holds numbers up to 22,025."""


class TwoHot(nn.Module):
    """A number as weights on the two bins around it, whose mean it is.

    Logits over the bins stand for the mean of their distribution. Numbers beyond the last bin are clamped to
    it.

    Args:
        values: the bins' numbers, ascending, (n,).

    Source: DreamerV3, arXiv 2301.04104 (critic and reward head).
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)

    @classmethod
    def symlog(cls, bins: int, setting: str) -> TwoHot:
        """Bins evenly spaced in symlog, sign(x) ln(1 + |x|), one of them at 0.

        Args:
            bins: their number.
            setting: the field that it comes from, for the message.

        Raises:
            ValueError: there are fewer than 3 or an even number of them.
        """
        if bins < 3 or bins % 2 == 0:
            raise ValueError(f"{setting} is {bins}; wanted 0 (no bins) or an odd number of at least 3.")
        half = bins // 2
        steps = torch.arange(-half, half + 1) * (LARGEST / half)
        return cls(steps.sign() * steps.abs().expm1())

    def encode(self, numbers: Tensor) -> Tensor:
        """The weights of the bins, (...) to (..., n)."""
        numbers = numbers.clamp(self.values[0], self.values[-1])
        above = torch.searchsorted(self.values, numbers, right=True).clamp(max=len(self.values) - 1)
        low, high = self.values[above - 1], self.values[above]
        share = ((numbers - low) / (high - low))[..., None]
        weights = numbers.new_zeros(*numbers.shape, len(self.values))
        return weights.scatter(-1, above[..., None], share).scatter(-1, above[..., None] - 1, 1 - share)

    def mean(self, logits: Tensor) -> Tensor:
        """The number that logits (..., n) stand for, (...)."""
        return (logits.float().softmax(dim=-1) * self.values).sum(dim=-1)

    def divergence(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Cross-entropy in nats of logits (..., n) and numbers (...), minus its smallest possible value."""
        weights = self.encode(numbers)
        cross_entropy = -(weights * logits.float().log_softmax(dim=-1)).sum(dim=-1)
        return cross_entropy - torch.special.entr(weights).sum(dim=-1)
