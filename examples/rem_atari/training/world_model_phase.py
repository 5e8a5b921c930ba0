"""The world model's turn: predict what the game did."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rem_atari.config import WorldModelConfig
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.world_model import WorldModel
from rem_atari.replay.buffer import Replay
from rem_atari.training.component import Component
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.updates import Metrics


class WorldModelPhase(TrainingPhase[SequenceTokens]):
    """Trains the world model on sequences drawn from the replay.

    Args:
        world_model: the world model that `component` trains.
        component: its optimiser.
        replay: where sequences come from.
        tokens: what makes tokens of their frames.
        config: length of a sequence and of its context.
        warn: told when there is nothing to train on yet.
    """

    def __init__(
        self,
        world_model: WorldModel,
        component: Component,
        replay: Replay,
        tokens: TokenCache,
        config: WorldModelConfig,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(component, warn)
        self._world_model = world_model
        self._replay = replay
        self._tokens = tokens
        self._config = config
        # One block more than the context: a sequence without a loss teaches nothing.
        self._min_real = config.context_blocks + 1

    def prepare(self, epoch: int) -> bool:
        """Whether the replay holds an episode long enough."""
        return self.has_episode(self._replay, self._min_real)

    def changed_on_the_way(self) -> list[torch.Tensor]:
        """Which rows have tokens."""
        return [self._tokens.known]

    def draw(self) -> SequenceTokens:
        """Sequences as tokens."""
        batch = self._replay.sample_sequences(
            self._config.optim.batch_size, self._config.sequence_blocks, min_real=self._min_real
        )
        return self._tokens.tokenize(batch)

    def loss(self, batch: SequenceTokens) -> tuple[torch.Tensor, Metrics]:
        """See `BaseWorldModel.loss`."""
        return self._world_model.loss(batch, self._tokens.tokenizer.codes)
