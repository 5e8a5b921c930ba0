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
        tokens, drawn = torch.zeros_like(before), codes.embeddings.new_zeros(step.predicted.shape)
        for places in self.neighbours.groups:
            given = step.predicted[:, places] + self.neighbours(drawn, places)
            logits = self._token_logits(given, codes)
            tokens[:, places] = sample_categorical(logits, generator, temperature=temperature)
            drawn[:, places] = self._embed_tokens(tokens[:, places], codes)
        return tokens


class Neighbours(nn.Module):
    """A summary of the tokens around each place that are of an earlier group.

    Args:
        width: of the embeddings.
        num_tokens: K, places of an observation, a square.

    Raises:
        ValueError: K is no square.
    """

    table: Tensor
    """The neighbours of each place, (K, 8) int64; K, which stands for nothing, where one comes later."""
    in_order: Tensor
    """The places in the order in which they are drawn, (K,) int64."""

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        table, group = _neighbours(side_of(num_tokens))
        self.register_buffer("table", table, persistent=False)
        in_order = [(group == n).nonzero().flatten() for n in range(4)]
        self.register_buffer("in_order", torch.cat(in_order), persistent=False)
        self.sizes = [len(places) for places in in_order if len(places) > 0]
        self.layers = nn.Sequential(
            nn.Linear(len(AROUND) * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    @property
    def groups(self) -> tuple[Tensor, ...]:
        """The places of each group, in the order in which they are drawn."""
        return self.in_order.split(self.sizes)

    def forward(self, shown: Tensor, places: Tensor | None = None) -> Tensor:
        """Embedded tokens of observations (..., K, width) to summaries (..., n, width).

        Args:
            shown: the tokens; those of later groups are not read.
            places: the n places of which summaries are wanted; None: all.
        """
        table = self.table if places is None else self.table[places]
        padded = functional.pad(shown, (0, 0, 0, 1))
        around = padded[..., table.flatten(), :].unflatten(-2, table.shape)
        return self.layers(around.flatten(-2))


def _neighbours(grid: int) -> tuple[Tensor, Tensor]:
    """`Neighbours.table` of a square of places, and the group of each place, (K,)."""
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
