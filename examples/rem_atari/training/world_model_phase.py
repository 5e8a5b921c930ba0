"""The world model's phase: learn to predict the game."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from rem_atari.config import WorldModelConfig
from rem_atari.models.base_world_model import BaseWorldModel
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.replay.batch import SequenceBatch
from rem_atari.replay.buffer import Replay
from rem_atari.replay.sequence_sampler import SequenceSampler
from rem_atari.training.component import Component
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.updates import Metrics


class WeightedSequences(NamedTuple):
    """Sequences as tokens, their places in the replay, and their weights, (B,); None: equal weights."""

    sequences: SequenceTokens
    drawn: SequenceBatch
    weights: torch.Tensor | None


class WorldModelPhase(TrainingPhase[WeightedSequences]):
    """Trains the world model on sequences drawn from the replay.

    Args:
        world_model: the world model that `component` trains.
        component: its optimiser.
        replay: the source of sequences.
        tokens: the cache of their frames' tokens.
        config: length of a sequence and of its context, and which are drawn.
        warn: called when there is nothing to train on yet.
    """

    def __init__(
        self,
        world_model: BaseWorldModel,
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
        self._to_note: tuple[SequenceBatch, torch.Tensor] | None = None
        self._sampler = SequenceSampler(
            replay,
            config.sequence_blocks,
            skip=config.context_blocks,
            event_share=config.event_share,
            priority_share=config.priority_share,
        )

    def prepare(self, epoch: int) -> bool:
        """Whether the replay holds an episode long enough."""
        if not self.has_episode(self._replay, self._sampler.min_real):
            return False
        self.go_on()
        return True

    def go_on(self) -> None:
        """Find the rewards and ends in what was collected."""
        self._sampler.refresh()

    def changed_on_the_way(self) -> list[torch.Tensor]:
        """Which rows have tokens."""
        return [self._tokens.known]

    def draw(self) -> WeightedSequences:
        """Sequences as tokens."""
        batch, weights = self._sampler.draw(self._config.optim.batch_size)
        sequences = self._tokens.tokenize(batch)
        on_device = None if weights is None else weights.to(sequences.tokens.device)
        return WeightedSequences(sequences, batch, on_device)

    def loss(self, batch: WeightedSequences) -> tuple[torch.Tensor, Metrics]:
        """See `BaseWorldModel.loss`."""
        found = self._world_model.loss(batch.sequences, self._tokens.tokenizer.codes, batch.weights)
        self._to_note = batch.drawn, found.sequences
        return found.total, found.metrics

    def after_update(self, metrics: Metrics) -> None:
        """Store the losses of the sequences, by which some are drawn again."""
        if self._to_note is not None:
            self._sampler.note(*self._to_note)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The losses of the sequences."""
        return self._sampler.tensors()

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from `tensors`; checkpoints of earlier versions have none."""
        if tensors:
            self._sampler.load_tensors(tensors)
