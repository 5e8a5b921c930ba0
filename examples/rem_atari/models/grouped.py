"""The world model that draws an observation in four groups of places, each given its neighbours before it."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.config import WorldModelConfig
from rem_atari.models.code_network import ReadCodes
from rem_atari.models.grid import side_of
from rem_atari.models.sampling import sample_categorical
from rem_atari.models.world_model import WorldModel, WorldModelStep

ORDER = ((0, 2), (3, 1))
"""The group of a place by the parities of its row and its column: no two neighbours are of one group."""

AROUND = tuple(offset for offset in product((-1, 0, 1), repeat=2) if offset != (0, 0))


class GroupedWorldModel(WorldModel):
    """Predicts each token given those of its neighbours that are of an earlier group.

    Places are of four groups, by the parities of row and column. Tokens of a group are drawn together, then
    those of the next group given them, so neighbours agree: what leaves one place arrives in the next. Only
    the token head runs for each group, for its own places; the decoder runs once. Training predicts all
    groups at once, because the true tokens are known. The loss is the negative log-likelihood of the whole
    observation, as far as tokens of a group are independent of each other given those before.

    Args:
        cfg, num_tokens, code_dim, codebook_size, num_actions, code_parts: as `WorldModel`.

    Source: the groups of arXiv 1703.03664 (parallel multiscale autoregressive density estimation).
    """

    def __init__(self, cfg: WorldModelConfig, **sizes: int) -> None:
        super().__init__(cfg, **sizes)
        self.neighbours = Neighbours(cfg.embed_dim, self.num_tokens)

    def hidden_layers(self) -> list[nn.Module]:
        """See `BaseWorldModel.hidden_layers`."""
        return [*super().hidden_layers(), self.neighbours]

    def _given_neighbours(self, predicted: Tensor, observations: Tensor) -> Tensor:
        return predicted + self.neighbours(observations)

    def _draw_tokens(
        self,
        step: WorldModelStep,
        before: Tensor,
        codes: ReadCodes,
        generator: torch.Generator,
        temperature: float,
    ) -> Tensor:
        tokens = torch.zeros_like(before)
        drawn = self.neighbours.with_nothing(codes.embeddings.new_zeros(step.predicted.shape))
        for group in self.neighbours.groups:
            places = group.places
            given = step.predicted[:, places] + self.neighbours.of_group(group, drawn)
            logits = self._token_logits(given, codes)
            tokens[:, places] = sample_categorical(logits, generator, temperature=temperature)
            drawn[:, places] = self._embed_tokens(tokens[:, places], codes)
        return tokens


class Group(nn.Module):
    """Places whose tokens are drawn together, and the neighbours of theirs that are drawn before them.

    Args:
        places: n places, (n,) int64.
        table: the neighbours of each place, (K, 8), as in `_neighbours`.
    """

    places: Tensor
    """The places, (n,) int64."""
    sides: Tensor
    """The directions, indices of `AROUND`, in which a place of the group has such a neighbour, (k,) int64."""
    near: Tensor
    """The neighbours in these directions, (n, k) int64; at a rim K, which stands for nothing."""

    def __init__(self, places: Tensor, table: Tensor) -> None:
        super().__init__()
        near = table[places]
        sides = (near < len(table)).any(dim=0).nonzero().flatten()
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("sides", sides, persistent=False)
        self.register_buffer("near", near[:, sides], persistent=False)


class Neighbours(nn.Module):
    """A summary of the tokens around each place that are of an earlier group.

    The first group has no such neighbours and the next two have four, so half of the products of the first
    layer, those with nothing, are left out.

    Args:
        width: of the embeddings.
        num_tokens: K, places of an observation, a square.

    Raises:
        ValueError: K is no square.
    """

    back: Tensor
    """Where each place stands in the order in which places are drawn, (K,) int64."""

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        table, group = _neighbours(side_of(num_tokens))
        by_group = [(group == n).nonzero().flatten() for n in range(int(group.max()) + 1)]
        self.groups = nn.ModuleList(Group(places, table) for places in by_group)
        self.register_buffer("back", torch.cat(by_group).argsort(), persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(len(AROUND) * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, shown: Tensor) -> Tensor:
        """Embedded tokens of observations (..., K, width) to the summaries of all places (..., K, width)."""
        shown = self.with_nothing(shown)
        summaries = torch.cat([self.of_group(group, shown) for group in self.groups], dim=-2)
        return summaries.index_select(-2, self.back)

    def of_group(self, group: Group, shown: Tensor) -> Tensor:
        """The summaries (..., n, width) of a group's places.

        Args:
            group: one of `groups`.
            shown: as `with_nothing` gives it; the tokens of later groups are not read.
        """
        around = shown.index_select(-2, group.near.flatten()).unflatten(-2, group.near.shape).flatten(-2)
        first, *rest = self.layers
        weight = first.weight.unflatten(1, (len(AROUND), -1)).index_select(1, group.sides).flatten(1)
        summaries = functional.linear(around, weight, first.bias)
        for layer in rest:
            summaries = layer(summaries)
        return summaries

    def with_nothing(self, shown: Tensor) -> Tensor:
        """Embedded tokens (..., K, width), and after them the zeros that stand for nothing."""
        return functional.pad(shown, (0, 0, 0, 1))


def _neighbours(grid: int) -> tuple[Tensor, Tensor]:
    """The neighbours of each place that are of an earlier group, and the group of each place, (K,).

    Neighbours are (K, 8) int64, by the directions of `AROUND`: places, or K where there is none.
    """
    places = list(product(range(grid), repeat=2))
    group = {(row, column): ORDER[row % 2][column % 2] for row, column in places}
    nothing = grid**2
    rows = []
    for row, column in places:
        around = [(row + down, column + right) for down, right in AROUND]
        rows.append(
            [
                at[0] * grid + at[1] if at in group and group[at] < group[row, column] else nothing
                for at in around
            ]
        )
    return torch.tensor(rows), torch.tensor([group[place] for place in places])
