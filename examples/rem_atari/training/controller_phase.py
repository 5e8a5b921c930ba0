"""The controller's phase: learn to act in the world model's imagination."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from rem_atari.agent import Agent
from rem_atari.config import ControllerConfig
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.replay.buffer import Replay
from rem_atari.replay.segment_sampler import SegmentSampler
from rem_atari.training.actor_critic import Imagination, imagine, learn_from
from rem_atari.training.component import Component
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.updates import Lap, Metrics, untimed
from retpop import capture


class ControllerPhase(TrainingPhase[SequenceTokens]):
    """Trains the controller on imagined episodes that begin where segments of the replay end.

    Args:
        agent: whose controller trains; tokenizer and world model, in eval mode, stay as they are.
        component: the controller's optimiser.
        replay: the source of segments.
        tokens: the cache of their frames' tokens.
        config: burn-in, horizon, loss.
        generator: source of draws, on the agent's device.
        warn: called when there is nothing to train on yet.
        cuda_graph: capture imagination in a CUDA graph; for an agent on a CUDA device.
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
        *,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(component, warn)
        self._agent = agent
        self._replay = replay
        self._tokens = tokens
        self._config = config
        self._sampler = SegmentSampler(
            replay,
            config.burn_in + 1,
            min_real=config.min_real_frames,
            reward_share=config.reward_start_share,
            reward_steps=config.reward_start_steps,
        )
        self._parts: Iterator[Imagination] = iter(())
        # A GPU would be waited for at every step, and a graph holds steps of one size.
        skip_ended = config.mask_after_end and generator.device.type == "cpu" and not cuda_graph
        self._imagine = partial(imagine, agent, cfg=config, generator=generator, skip_ended=skip_ended)
        self._generator = generator
        self._cuda_graph = cuda_graph
        self._graph: Callable[..., Imagination] | None = None
        self._num_codes = 0

    def prepare(self, epoch: int) -> bool:
        """Whether the replay holds an episode long enough."""
        if not self.has_episode(self._replay, self._config.min_real_frames):
            return False
        self.go_on()
        return True

    def go_on(self) -> None:
        """Find the rewards in what was collected; a captured graph is valid for the codes that existed."""
        self._sampler.refresh()
        before, self._num_codes = self._num_codes, len(self._agent.tokenizer.codes)
        if self._cuda_graph and self._num_codes != before:
            self._graph = capture(self._imagine_columns, generators=[self._generator])

    def changed_on_the_way(self) -> list[torch.Tensor]:
        """Which rows have tokens."""
        return [self._tokens.known]

    def draw(self) -> SequenceTokens:
        """Segments as tokens."""
        return self._tokens.tokenize(self._sampler.draw(self._config.optim.batch_size))

    def loss(self, batch: SequenceTokens) -> tuple[torch.Tensor, Metrics]:
        """Imagine, and judge the first part of what is learned from it."""
        self._parts = self._cut(self.imagine(batch))
        return learn_from(next(self._parts), self._agent.controller, self._config)

    def update(self, lap: Lap = untimed) -> Metrics:
        """See `TrainingPhase.update`; then learn from the other parts of the same imagined steps.

        The metrics are the means of the first use. A later part that is not applied leaves those before it.
        """
        found = [super().update(lap)]
        for part in self._parts:
            with self.component.autocast():
                loss, metrics = learn_from(part, self._agent.controller, self._config)
            found.append(self.component.apply(loss, metrics))
        if len(found) > 1:
            lap("later updates")
        return _means(found[: self._config.minibatches])

    def _cut(self, imagination: Imagination) -> Iterator[Imagination]:
        """What each update learns from: in every use all episodes, in `minibatches` random parts."""
        for _ in range(self._config.uses):
            if self._config.minibatches == 1:
                yield imagination
                continue
            rewards = imagination.trajectory.rewards
            order = torch.randperm(len(rewards), generator=self._generator, device=rewards.device)
            for rows in order.tensor_split(self._config.minibatches):
                yield imagination.select(rows)

    def imagine(self, segments: SequenceTokens, lap: Lap = untimed) -> Imagination:
        """Imagine from the segments' last frames, see `actor_critic.imagine`.

        A captured graph has no parts: `lap` is then called once, with "burn-in and steps".
        """
        if self._graph is None:
            return self._imagine(segments, lap=lap)
        imagination = self._graph(**vars(segments))
        lap("burn-in and steps")
        return imagination

    def _imagine_columns(self, **columns: torch.Tensor) -> Imagination:
        return self._imagine(SequenceTokens(**columns))

    def more_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Imagined frames a second, and how many there have been in all for a step of the real game."""
        frames = self._config.optim.batch_size * (self._config.horizon - 1)
        updates = self._config.uses * self._config.minibatches
        imagined = self.component.updates / updates * frames
        return {
            "frames_per_second": means["rate"] * frames,
            "imagined_per_env_step": imagined / max(1, self._replay.num_steps),
        }


def _means(found: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over several updates."""
    if len(found) == 1:
        return found[0]
    return {name: torch.stack([torch.as_tensor(each[name]) for each in found]).mean() for name in found[0]}
