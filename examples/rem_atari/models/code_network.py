"""Codes read by what they look like, besides tables with a row for each."""

from __future__ import annotations

from torch import Tensor, nn


class CodeNetwork(nn.Module):
    """A small network over the tokenizer's codes: it embeds tokens, and is a part of what predicts them.

    A table has a row for each code, and what is learned about one says nothing about another, though the two
    may differ in one detail. Here codes that look alike are treated alike, so that a rare one is understood
    before it was seen often. No gradient flows into the codes.

    Args:
        code_dim: E, dimension of the codes.
        hidden: units of its hidden layer.
        width: of the world model.
    """

    def __init__(self, code_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(code_dim, hidden), nn.ReLU())
        # As far apart as the rows of a new table.
        self.embed = nn.Sequential(nn.Linear(hidden, width), nn.LayerNorm(width))
        self.weigh = nn.Linear(hidden, width)

    def embeddings(self, codebook: Tensor) -> Tensor:
        """The embeddings of codes (V, E): (V, width)."""
        return self.embed(self.read(codebook.detach()))

    def head_weights(self, codebook: Tensor) -> Tensor:
        """A part of the token head's weights for codes (V, E), besides those of its own: (V, width)."""
        return self.weigh(self.read(codebook.detach()))
