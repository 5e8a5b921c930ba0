"""The world model's turn: predict what the game did."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from rem_atari.config import WorldModelConfig
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.world_model import WorldModel
from rem_atari.replay.buffer import Replay
from rem_atari.replay.sequence_sampler import SequenceSampler
from rem_atari.training.component import Component
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.updates import Metrics


class WeightedSequences(NamedTuple):
    """Sequences, and how much each counts, (B,); None: all the same."""

    sequences: SequenceTokens
    weights: torch.Tensor | None


class WorldModelPhase(TrainingPhase[WeightedSequences]):
    """Trains the world model on sequences drawn from the replay.

    Args:
        world_model: the world model that `component` trains.
        component: its optimiser.
        replay: where sequences come from.
        tokens: what makes tokens of their frames.
        config: length of a sequence and of its context, and which are drawn.
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
        self._sampler = SequenceSampler(
            replay, config.sequence_blocks, skip=config.context_blocks, event_share=config.event_share
        )

    def prepare(self, epoch: int) -> bool:
        """Whether the replay holds an episode long enough."""
        if not self.has_episode(self._replay, self._sampler.min_real):
            return False
        self.go_on()
        return True

    def go_on(self) -> None:
        """Look for the events in what was collected."""
        self._sampler.refresh()

    def changed_on_the_way(self) -> list[torch.Tensor]:
        """Which rows have tokens."""
        return [self._tokens.known]

    def draw(self) -> WeightedSequences:
        """Sequences as tokens."""
        batch, weights = self._sampler.draw(self._config.optim.batch_size)
        sequences = self._tokens.tokenize(batch)
        return WeightedSequences(sequences, None if weights is None else weights.to(sequences.tokens.device))

    def loss(self, batch: WeightedSequences) -> tuple[torch.Tensor, Metrics]:
        """See `BaseWorldModel.loss`."""
        return self._world_model.loss(batch.sequences, self._tokens.tokenizer.codes, batch.weights)
