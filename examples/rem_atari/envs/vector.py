"""Several environments side by side, stepped one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np


@dataclass(frozen=True)
class GameReturn:
    """A whole game that ended: over, or cut short by its bound.

    Attributes:
        env_index: which environment played it.
        raw_return: the sum of its raw rewards, over all its lives.
        length: the agent's steps in it.
    """

    env_index: int
    raw_return: float
    length: int


@dataclass(frozen=True)
class VectorStep:
    """What E environments answer to one action each.

    Attributes:
        frames: the frames to act on next, (E, S, S, 3) uint8; already the new episode's where one ended.
        rewards: raw rewards, (E,) float32.
        terminated: the episode ended of itself (for Atari in training: also with a life), (E,) bool.
        truncated: the episode was cut short, (E,) bool.
        game_returns: the games that ended in this step; a life loss ends none.
    """

    frames: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    game_returns: list[GameReturn]


def number_actions(num_actions: int) -> list[str]:
    """Names of actions that have none: "action 0" and so on."""
    return [f"action {index}" for index in range(num_actions)]


class VectorEnv:
    """E environments of one kind, stepped serially; an ended episode restarts at once.

    A game's return counts all its lives: it is reported when the environment's ``info["game_over"]`` says so
    (see `atari.LifeLossEndsEpisode`), or, where there is no such entry, when the episode ends. A truncation
    always ends the game.

    Args:
        make: builds one environment.
        num_envs: E.
        seed: what the environments' own seeds, all different, are derived from; used by the first `reset`.

    Raises:
        ValueError: `num_envs` is below 1.
    """

    def __init__(self, make: Callable[[], gymnasium.Env], num_envs: int, *, seed: int) -> None:
        if num_envs < 1:
            raise ValueError(f"VectorEnv: num_envs is {num_envs}; it must be at least 1.")
        self._envs = [make() for _ in range(num_envs)]
        self._seeds: list[int | None] = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
        self._returns = [0.0] * num_envs
        self._lengths = [0] * num_envs
        self._is_started = False

    @property
    def num_envs(self) -> int:
        """Number of environments E."""
        return len(self._envs)

    @property
    def num_actions(self) -> int:
        """Number of actions A; an action is an integer in [0, A)."""
        return int(self._envs[0].action_space.n)

    @property
    def action_names(self) -> list[str]:
        """The game's names of its actions in lower case, or "action 0" and so on where it has none."""
        meanings = getattr(self._envs[0].unwrapped, "get_action_meanings", list)
        names = [str(meaning).lower() for meaning in meanings()]
        return names if len(names) == self.num_actions else number_actions(self.num_actions)

    def reset(self) -> np.ndarray:
        """Start every environment anew and return the frames to act on, (E, S, S, 3) uint8.

        The first call seeds the environments; later ones go on with their random numbers. Games that were
        under way are given up and not reported.
        """
        frames = [env.reset(seed=seed)[0] for env, seed in zip(self._envs, self._seeds, strict=True)]
        self._seeds = [None] * self.num_envs
        self._returns = [0.0] * self.num_envs
        self._lengths = [0] * self.num_envs
        self._is_started = True
        return np.stack(frames)

    def step(self, actions: Sequence[int] | np.ndarray) -> VectorStep:
        """Take one action in every environment; `actions` (E,) integers.

        Raises:
            RuntimeError: `reset` was not called yet.
            ValueError: the number of actions is not E.
        """
        if not self._is_started:
            raise RuntimeError("VectorEnv.step() before the first reset().")
        if len(actions) != self.num_envs:
            raise ValueError(f"VectorEnv.step(): {len(actions)} actions for {self.num_envs} environments.")
        game_returns: list[GameReturn] = []
        steps = [self._step_one(index, int(action), game_returns) for index, action in enumerate(actions)]
        frames, rewards, terminated, truncated = zip(*steps, strict=True)
        return VectorStep(
            frames=np.stack(frames),
            rewards=np.array(rewards, dtype=np.float32),
            terminated=np.array(terminated, dtype=bool),
            truncated=np.array(truncated, dtype=bool),
            game_returns=game_returns,
        )

    def open_games(self) -> list[GameReturn]:
        """The games under way, one an environment, as they stand."""
        counts = zip(self._returns, self._lengths, strict=True)
        return [GameReturn(index, total, length) for index, (total, length) in enumerate(counts)]

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()

    def _step_one(
        self, index: int, action: int, game_returns: list[GameReturn]
    ) -> tuple[np.ndarray, float, bool, bool]:
        """Step one environment, restart it if its episode ended; ended games are added to `game_returns`."""
        env = self._envs[index]
        frame, reward, terminated, truncated, info = env.step(action)
        self._returns[index] += float(reward)
        self._lengths[index] += 1
        if info.get("game_over", terminated) or truncated:
            game_returns.append(self._end_game(index))
        if terminated or truncated:
            frame, info = env.reset()
            self._count_reset(index, info, game_returns)
        return frame, float(reward), bool(terminated), bool(truncated)

    def _count_reset(self, index: int, info: dict[str, Any], game_returns: list[GameReturn]) -> None:
        """Count what happened on the way from one life to the next."""
        self._returns[index] += info.get("reset_reward", 0.0)
        if info.get("game_over", False):
            game_returns.append(self._end_game(index))

    def _end_game(self, index: int) -> GameReturn:
        game = GameReturn(index, self._returns[index], self._lengths[index])
        self._returns[index], self._lengths[index] = 0.0, 0
        return game
