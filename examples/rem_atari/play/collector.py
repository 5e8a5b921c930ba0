"""The collection of experience: the agent or a random policy plays the real game."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rem_atari.envs.vector import GameReturn
from rem_atari.models.controller import Carry, Controller, entropy
from rem_atari.play.exploration import Exploration
from rem_atari.play.real_env import RealEnv
from rem_atari.play.rollout import rollout
from rem_atari.replay.buffer import Replay
from rem_atari.replay.recorded import RecordedEpisode


@dataclass
class RewardSizes:
    """The range of absolute rewards; rewards of 0 do not count.

    Attributes:
        smallest, largest: of those seen so far; 0 before the first one.
    """

    smallest: float = 0.0
    largest: float = 0.0

    def see(self, rewards: np.ndarray) -> None:
        """Take in rewards of any shape."""
        sizes = np.abs(rewards[rewards != 0])
        if len(sizes) > 0:
            self.smallest = min(self.smallest or math.inf, float(sizes.min()))
            self.largest = max(self.largest, float(sizes.max()))

    @property
    def are_signs(self) -> bool:
        """Whether every reward was -1, 0 or 1."""
        return self.largest == 0 or (self.smallest, self.largest) == (1.0, 1.0)


@dataclass
class Collection:
    """A collection so far; an interrupted one continues from here.

    Attributes:
        carry: the controller's memory, carried over from earlier collections; None: blank.
        steps: environment steps, all environments together.
        episodes: episodes that ended, as they are stored (for Atari: lives).
        games: whole games that ended.
        total_entropy: sum over the steps of the policy's entropy in nats.
        seconds: wall time.
        sizes: the range of its rewards.
        exploration: the current random actions.
    """

    carry: Carry | None = None
    steps: int = 0
    episodes: int = 0
    games: list[GameReturn] = field(default_factory=list)
    total_entropy: float = 0.0
    seconds: float = 0.0
    sizes: RewardSizes = field(default_factory=RewardSizes)
    exploration: Exploration = field(default_factory=Exploration)

    def metrics(self) -> dict[str, float]:
        """The collection's line of metrics; no mean_game_return where no game ended, no sizes of
        rewards where there was none."""
        metrics = {
            "steps": float(self.steps),
            "episodes": float(self.episodes),
            "entropy": self.total_entropy / max(self.steps, 1),
            "phase_seconds": self.seconds,
            "rate": self.steps / max(self.seconds, 1e-9),
        }
        if self.games:
            metrics["mean_game_return"] = sum(game.raw_return for game in self.games) / len(self.games)
        if self.sizes.largest > 0:
            metrics["smallest_reward"] = self.sizes.smallest
            metrics["largest_reward"] = self.sizes.largest
        return metrics

    def take_recorded(
        self, episodes: Iterable[RecordedEpisode], replay: Replay, after_episode: Callable[[int], None]
    ) -> None:
        """Store recorded episodes as if they had been played, and count them.

        Args:
            episodes: whose steps the replay has room for.
            replay: where they go.
            after_episode: called after each with the number of its steps.

        Raises:
            ReplayFullError: it has no room.
        """
        started = time.monotonic()
        for episode in episodes:
            last = len(episode.actions) - 1
            for step, (frame, action, reward) in enumerate(
                zip(episode.frames, episode.actions, episode.rewards, strict=True)
            ):
                ended = step == last and episode.terminated
                cut = step == last and not episode.terminated
                replay.append(0, frame, int(action), float(reward), ended, cut)
            self.sizes.see(episode.rewards)
            self.steps += last + 1
            self.episodes += 1
            self.games.append(GameReturn(0, float(episode.rewards.sum()), last + 1))
            self.seconds = time.monotonic() - started
            after_episode(last + 1)

    def state(self) -> dict[str, Any]:
        """Everything but the memory, plain JSON data."""
        return {
            "steps": self.steps,
            "episodes": self.episodes,
            "games": [asdict(game) for game in self.games],
            "total_entropy": self.total_entropy,
            "seconds": self.seconds,
            "sizes": asdict(self.sizes),
            "exploration": self.exploration.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], carry: Carry | None) -> Collection:
        """The collection of a `state`, with the controller's memory."""
        games = [GameReturn(**game) for game in state["games"]]
        # Checkpoints of earlier versions have neither.
        sizes = RewardSizes(**state.get("sizes", {}))
        exploration = Exploration.from_state(state.get("exploration", Exploration().state()))
        kept = {"games": games, "sizes": sizes, "exploration": exploration}
        return cls(carry=carry, **{**state, **kept})


def collect(
    env: RealEnv,
    controller: Controller,
    collection: Collection,
    *,
    steps: int,
    temperature: float,
    epsilon: float,
    repeat: int = 1,
    generator: torch.Generator,
    after_step: Callable[[int], None],
    max_seconds: float | None = None,
) -> None:
    """Let the controller play the real game, without gradient; the environment's replay records it.

    Args:
        env: the environment; reset before the first collection, then as the last collection left it.
        controller: the playing controller; the caller sets its mode (train or eval).
        collection: empty, or an interrupted part; extended with every step.
        steps: environment steps, all environments together, those of an interrupted part included; rounded up
            to whole steps of all of them.
        temperature: temperature of the actions.
        epsilon: probability that a random action begins, drawn for each environment.
        repeat: steps that a random action lasts at most, see `Exploration`.
        generator: source of the actions' randomness, on the controller's device.
        after_step: called after each step of all environments with their number; may raise to stop, and the
            collection holds all that was done.
        max_seconds: no further step begins after so long; None: no bound.
    """
    if collection.carry is None:
        collection.carry = controller.initial_carry(env.num_envs)
    # The tokenizer may have changed since the last collection, and with it the codes of the frames.
    observation = env.observe()

    def explore(actions: Tensor) -> Tensor:
        return collection.exploration(actions, env.num_actions, generator, epsilon=epsilon, repeat=repeat)

    @torch.no_grad()
    def step() -> tuple[int, np.ndarray]:
        nonlocal observation
        trajectory, collection.carry, observation = rollout(
            env,
            controller,
            collection.carry,
            observation,
            1,
            temperature=temperature,
            explore=explore if epsilon > 0 else None,
            generator=generator,
        )
        collection.total_entropy += float(entropy(trajectory.logits).sum())
        ended = int((trajectory.ended | trajectory.truncated).sum())
        return ended, trajectory.rewards.cpu().numpy()

    _step_until(env, collection, step, steps, after_step, max_seconds)


def collect_random(
    env: RealEnv,
    collection: Collection,
    *,
    steps: int,
    repeat: int = 1,
    generator: torch.Generator,
    after_step: Callable[[int], None],
    max_seconds: float | None = None,
) -> None:
    """Play uniformly random actions, recorded as `collect` records; no network runs.

    Args:
        env: the environment, reset before.
        collection: as for `collect`; the controller's memory stays as it is.
        steps, repeat: as for `collect`.
        generator: source of the actions, on the CPU.
        after_step: as for `collect`.
        max_seconds: no further step begins after so long; None: no bound.
    """

    def step() -> tuple[int, np.ndarray]:
        nothing = torch.zeros(env.num_envs, dtype=torch.int64)
        actions = collection.exploration(nothing, env.num_actions, generator, epsilon=1.0, repeat=repeat)
        answer = env.play(actions.numpy())
        collection.total_entropy += env.num_envs * math.log(env.num_actions)
        return int((answer.terminated | answer.truncated).sum()), answer.rewards

    _step_until(env, collection, step, steps, after_step, max_seconds)


def _step_until(
    env: RealEnv,
    collection: Collection,
    step: Callable[[], tuple[int, np.ndarray]],
    steps: int,
    after_step: Callable[[int], None],
    max_seconds: float | None,
) -> None:
    """Take steps until there are enough or the time is up; `step` returns the number of ended episodes and
    the rewards."""
    env.take_finished_games()
    started = time.monotonic() - collection.seconds
    while collection.steps < steps:
        episodes, rewards = step()
        collection.sizes.see(rewards)
        collection.steps += env.num_envs
        collection.episodes += episodes
        collection.games.extend(env.take_finished_games())
        collection.seconds = time.monotonic() - started
        after_step(env.num_envs)
        if max_seconds is not None and time.monotonic() - started >= max_seconds:
            break
