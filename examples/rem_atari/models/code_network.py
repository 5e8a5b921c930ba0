"""What codes look like, as a part of how the world model embeds and predicts them."""

from __future__ import annotations

from torch import Tensor, nn


class CodeNetwork(nn.Module):
    """A small network over the tokenizer's codes.

    A table has a row for each code, and what is learned about one says nothing about another, though the two
    may differ in one detail. Here codes that look alike get similar rows, so that a rare one is understood
    before it was seen often.

    Args:
        code_dim: E, dimension of the codes.
        hidden: units of its hidden layer.
        width: of the world model.
    """

    def __init__(self, code_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(code_dim, hidden), nn.ReLU())
        self.embed = nn.Linear(hidden, width)
        self.weigh = nn.Linear(hidden, width)

    def embeddings(self, codebook: Tensor) -> Tensor:
        """A part of the embeddings of codes (V, E): (V, width). No gradient flows into the codes."""
        return self.embed(self.read(codebook.detach()))

    def head_weights(self, codebook: Tensor) -> Tensor:
        """A part of what the token head weighs outputs by to predict codes (V, E): (V, width)."""
        return self.weigh(self.read(codebook.detach()))
