"""The controller's turn: learn to act in the world model's imagination."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from rem_atari.agent import Agent
from rem_atari.config import ControllerConfig
from rem_atari.controller_loss import controller_loss
from rem_atari.replay import Replay
from rem_atari.training.component import Component
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.updates import Metrics


class ControllerPhase(TrainingPhase):
    """Trains the controller on imagined episodes that begin where segments of the replay end.

    Args:
        agent: whose controller trains; tokenizer and world model, in eval mode, stay as they are.
        component: the controller's optimiser.
        replay: where segments come from.
        tokens: what makes tokens of their frames.
        config: burn-in, horizon, loss.
        generator: source of draws, on the agent's device.
        warn: told when there is nothing to train on yet.
    """

    def __init__(
        self,
        agent: Agent,
        component: Component,
        replay: Replay,
        tokens: TokenCache,
        config: ControllerConfig,
        generator: torch.Generator,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(component, warn)
        self._agent = agent
        self._replay = replay
        self._tokens = tokens
        self._config = config
        self._generator = generator

    def prepare(self, epoch: int) -> bool:
        """Whether the replay holds an episode long enough."""
        return self.has_episode(self._replay, self._config.min_real_frames)

    def changed_on_the_way(self) -> list[torch.Tensor]:
        """Which rows have tokens."""
        return [self._tokens.known]

    def update(self) -> Metrics:
        """One update on a batch of segments."""
        batch = self._replay.sample_segments(
            self._config.optim.batch_size, self._config.burn_in + 1, min_real=self._config.min_real_frames
        )
        segments = self._tokens.tokenize(batch)
        with self.component.autocast():
            loss, metrics = controller_loss(self._agent, segments, self._config, self._generator)
        return self.component.apply(loss, metrics)

    def more_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Imagined frames a second."""
        frames = self._config.optim.batch_size * (self._config.horizon - 1)
        return {"frames_per_second": means["rate"] * frames}
