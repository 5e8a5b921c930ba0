"""Playing the real game: the environment in the agent's terms, and the collection of experience."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rem_atari.envs.vector import GameReturn, VectorEnv, VectorStep
from rem_atari.models.controller import Carry, Controller, entropy
from rem_atari.models.tokenizer import Tokenizer
from rem_atari.replay import Replay
from rem_atari.rollout import TokenStep, rollout


class RealEnv:
    """The real game as a `TokenEnv`: frames go through the tokenizer, every step into the replay.

    Args:
        env: E environments; `reset` starts them.
        tokenizer: turns frames into codes, as it is at the time.
        replay: where steps are recorded, or None.
        device: where the tokenizer is and codes are wanted.
        stop_recording_when_full: a full replay ends the recording, for a sample of an evaluation's episodes;
            otherwise it is an error, for experience that must not be lost.
    """

    def __init__(
        self,
        env: VectorEnv,
        tokenizer: Tokenizer,
        replay: Replay | None,
        *,
        device: torch.device | str = "cpu",
        stop_recording_when_full: bool = False,
    ) -> None:
        self._env = env
        self._tokenizer = tokenizer
        self._replay = replay
        self._device = torch.device(device)
        self._stop_recording_when_full = stop_recording_when_full
        self._frames: np.ndarray | None = None
        self._finished_games: list[GameReturn] = []

    @property
    def num_envs(self) -> int:
        """Number of environments E."""
        return self._env.num_envs

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self._env.num_actions

    @property
    def frames(self) -> np.ndarray:
        """The frames to act on, (E, S, S, 3) uint8.

        Raises:
            RuntimeError: `reset` was not called yet.
        """
        if self._frames is None:
            raise RuntimeError("RealEnv: reset() comes first.")
        return self._frames

    def reset(self) -> Tensor:
        """Start all environments anew, give up open episodes, and return the codes to act on (E, K, E)."""
        self._frames = self._env.reset()
        if self._replay is not None:
            self._replay.cut()
        return self.observe()

    def observe(self) -> Tensor:
        """The codes of the frames to act on, (E, K, E), as the tokenizer sees them now."""
        frames = torch.from_numpy(self.frames).to(self._device)
        return self._tokenizer.embed(self._tokenizer.encode(frames))

    def step(self, actions: Tensor) -> TokenStep:
        """Take and record one step in every environment; `actions` (E,) int64."""
        step = self.play(actions.cpu().numpy())
        terminated, truncated = torch.from_numpy(step.terminated), torch.from_numpy(step.truncated)
        return TokenStep(
            codes=self.observe(),
            rewards=torch.from_numpy(step.rewards).to(self._device),
            ended=terminated.to(self._device),
            truncated=truncated.to(self._device),
            restarted=(terminated | truncated).to(self._device),
        )

    def play(self, actions: np.ndarray) -> VectorStep:
        """`step` in terms of frames, without the tokenizer; `actions` (E,) integers."""
        acted_on = self.frames
        self._close_full_replay()
        step = self._env.step(actions)
        if self._replay is not None:
            columns = zip(acted_on, actions, step.rewards, step.terminated, step.truncated, strict=True)
            for env_index, (frame, action, reward, terminated, truncated) in enumerate(columns):
                self._replay.append(
                    env_index, frame, int(action), float(reward), bool(terminated), bool(truncated)
                )
        self._frames = step.frames
        self._finished_games.extend(step.game_returns)
        return step

    def take_finished_games(self) -> list[GameReturn]:
        """The games that ended since the last call, oldest first."""
        finished, self._finished_games = self._finished_games, []
        return finished

    def open_games(self) -> list[GameReturn]:
        """The games under way as they stand, one an environment."""
        return self._env.open_games()

    def close(self) -> None:
        """Close the environments."""
        self._env.close()

    def _close_full_replay(self) -> None:
        """Stop recording if the next step would not fit and that is what was asked for."""
        if self._replay is None or not self._stop_recording_when_full:
            return
        if self._replay.room < self.num_envs:
            self._replay.cut()
            self._replay = None


@dataclass(frozen=True)
class CollectStats:
    """What a collection did.

    Attributes:
        steps: environment steps, all environments together.
        episodes: episodes that ended, as they are stored (for Atari: lives).
        games: whole games that ended.
        entropy: the policy's mean entropy in nats.
        seconds: wall time.
    """

    steps: int
    episodes: int
    games: tuple[GameReturn, ...]
    entropy: float
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The collection's line of metrics; no mean_game_return where no game ended."""
        metrics = {
            "steps": float(self.steps),
            "episodes": float(self.episodes),
            "entropy": self.entropy,
            "phase_seconds": self.seconds,
            "rate": self.steps / max(self.seconds, 1e-9),
        }
        if self.games:
            metrics["mean_game_return"] = sum(game.raw_return for game in self.games) / len(self.games)
        return metrics


def collect(
    env: RealEnv,
    controller: Controller,
    carry: Carry | None,
    *,
    steps: int,
    temperature: float,
    epsilon: float,
    generator: torch.Generator,
    after_step: Callable[[int], None],
    max_seconds: float | None = None,
) -> tuple[CollectStats, Carry]:
    """Let the controller play the real game, without gradient; the environment's replay records it.

    Args:
        env: the environment, reset before the first collection and then left as the last one ended.
        controller: who plays; its mode (train or eval) is the caller's.
        carry: the controller's memory from the last collection, or None for a blank one.
        steps: environment steps, all environments together; rounded up to whole steps of all of them.
        temperature: temperature of the actions.
        epsilon: chance of a random action, drawn for each environment.
        generator: source of the actions' randomness, on the controller's device.
        after_step: called after each step of all environments with their number; may raise to stop.
        max_seconds: no further step begins after so long; None: no bound.

    Returns:
        What was done, and the controller's memory for the next collection.
    """
    start = time.monotonic()
    carry = controller.initial_carry(env.num_envs) if carry is None else carry
    env.take_finished_games()
    taken, episodes, total_entropy = 0, 0, 0.0
    with torch.no_grad():
        # The tokenizer may have learned since the last collection: its codes of the frames are new.
        observation = env.observe()
        while taken < steps:
            trajectory, carry, observation = rollout(
                env,
                controller,
                carry,
                observation,
                1,
                temperature=temperature,
                epsilon=epsilon,
                generator=generator,
            )
            taken += env.num_envs
            episodes += int((trajectory.ended | trajectory.truncated).sum())
            total_entropy += float(entropy(trajectory.logits).sum())
            after_step(env.num_envs)
            if max_seconds is not None and time.monotonic() - start >= max_seconds:
                break
    games = tuple(env.take_finished_games())
    stats = CollectStats(taken, episodes, games, total_entropy / max(taken, 1), time.monotonic() - start)
    return stats, carry


def collect_random(
    env: RealEnv,
    *,
    steps: int,
    generator: torch.Generator,
    after_step: Callable[[int], None],
    max_seconds: float | None = None,
) -> CollectStats:
    """Play uniformly random actions, recorded as `collect` records; no network runs.

    Args:
        env: the environment, reset before.
        steps: environment steps, all environments together; rounded up to whole steps of all of them.
        generator: source of the actions, on the CPU.
        after_step: as for `collect`.
        max_seconds: no further step begins after so long; None: no bound.
    """
    start = time.monotonic()
    env.take_finished_games()
    taken, episodes = 0, 0
    while taken < steps:
        actions = torch.randint(env.num_actions, (env.num_envs,), generator=generator)
        step = env.play(actions.numpy())
        taken += env.num_envs
        episodes += int((step.terminated | step.truncated).sum())
        after_step(env.num_envs)
        if max_seconds is not None and time.monotonic() - start >= max_seconds:
            break
    games = tuple(env.take_finished_games())
    return CollectStats(taken, episodes, games, math.log(env.num_actions), time.monotonic() - start)
