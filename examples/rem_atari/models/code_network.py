"""Networks that read what codes look like, where a table has a row for each code."""

from __future__ import annotations

from torch import Tensor, nn


class CodeNetwork(nn.Module):
    """Small networks over the tokenizer's codes: one embeds tokens, one is a part of what predicts them.

    A table has a row for each code, and what is learned about one says nothing about another, though the two
    may differ in one detail. Here codes that look alike are treated alike, so that a rare one is understood
    before it was seen often. No gradient flows into the codes.

    Args:
        code_dim: E, dimension of the codes.
        hidden: units of a hidden layer.
        width: of the world model.
    """

    def __init__(self, code_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embed = _layers(code_dim, hidden, width)
        # About as far apart as the rows of a new table.
        nn.init.normal_(self.embed[-1].weight, std=2 / hidden**0.5)
        self.weigh = _layers(code_dim, hidden, width)

    def embeddings(self, codebook: Tensor) -> Tensor:
        """The embeddings of codes (V, E): (V, width)."""
        return self.embed(codebook.detach())

    def head_weights(self, codebook: Tensor) -> Tensor:
        """A part of the token head's weights for codes (V, E), besides those of its own: (V, width)."""
        return self.weigh(codebook.detach())


def _layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
