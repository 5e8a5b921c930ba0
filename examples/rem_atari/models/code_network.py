"""Networks that read what codes look like, where a table has a row for each code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ReadCodes:
    """The tokenizer's codes as a world model reads them with the weights that it has.

    Attributes:
        embeddings: of tokens, (V, width) or more rows.
        head_weights: a part of the token head's weights, besides those of its own, (V, width); None: no part.
        num_codes: V.
    """

    embeddings: Tensor
    head_weights: Tensor | None
    num_codes: int

    def __len__(self) -> int:
        return self.num_codes


Codes = Tensor | ReadCodes
"""The tokenizer's codes (V, E), or what a world model has made of them."""

PART_UNITS = 32
"""Units that say what a part of a code shows."""


class CodeNetwork(nn.Module):
    """Small networks over the tokenizer's codes: one embeds tokens, one is a part of what predicts them.

    A table has a row for each code, and what is learned about one says nothing about another, though the two
    may differ in one detail. Here codes that look alike are treated alike, so that a rare one is understood
    before it was seen often. No gradient flows into the codes.

    Args:
        code_dim: E, dimension of the codes.
        parts: P, the number of parts of equal size that a code consists of, see `BaseTokenizer.code_parts`.
        hidden: units of a hidden layer.
        width: of the world model.
    """

    def __init__(self, code_dim: int, parts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.parts = parts
        self.embed = _Reader(code_dim // parts, parts, hidden, width)
        # About as far apart as the rows of a new table.
        nn.init.normal_(self.embed.each.weight, std=4 / (parts * PART_UNITS) ** 0.5)
        self.weigh = _Reader(code_dim // parts, parts, hidden, width)

    def forward(self, codebook: Tensor) -> ReadCodes:
        """What it makes of codes (V, E)."""
        parts = self._parts_of(codebook)
        return ReadCodes(self.embed(parts), self.weigh(parts), len(codebook))

    def _parts_of(self, codebook: Tensor) -> Tensor:
        """The parts of codes (V, E), each number with mean 0 and variance 1 over all of them: (V, P, E / P).

        Colours differ little beside what they have in common.
        """
        parts = rearrange(codebook.detach(), "v (p e) -> v p e", p=self.parts)
        variance, mean = torch.var_mean(parts, dim=(0, 1), correction=0)
        return (parts - mean) * (variance + 1e-6).rsqrt()


class _Reader(nn.Module):
    """Says what each part shows, by one layer for all, and what they show together.

    One linear layer takes each part for itself, so what is known of a thing in one part holds whatever is
    beside it; a network adds what depends on several.
    """

    def __init__(self, part_dim: int, parts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(part_dim, PART_UNITS), nn.ReLU())
        self.each = nn.Linear(parts * PART_UNITS, width)
        self.whole = nn.Sequential(nn.Linear(parts * PART_UNITS, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, parts: Tensor) -> Tensor:
        """Parts (V, P, E / P) to (V, width)."""
        shown = self.part(parts).flatten(1)
        return self.each(shown) + self.whole(shown)
