"""Where an environment lives: `LocalHost`, in this process; `process.ProcessHost`, in one of its own.

A host is asked by `start`, which never waits, and answers by `finish`: E hosts that are all asked before the
first answer is waited for work side by side. Whatever goes wrong with an environment, an exception, a crash
or a hang, is one error for those who ask: `EnvironmentDiedError`, and the host is of no use any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np

from rem_atari.envs.env_state import load_env, save_env
from rem_atari.errors import EnvironmentDiedError


@dataclass(frozen=True)
class EnvStep:
    """What one environment answers to an action; it has restarted where its episode ended.

    Attributes:
        frame: the frame to act on next, (S, S, 3) uint8; the new episode's where one ended.
        reward: raw reward.
        terminated: the episode ended of itself.
        truncated: the episode was cut short.
        game_over: the whole game ended with this step, not just a life.
        restart_reward: raw reward on the way to the new episode (see `atari.LifeLossEndsEpisode`).
        restart_game_over: the game ended on the way to the new episode.
    """

    frame: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    game_over: bool
    restart_reward: float
    restart_game_over: bool


class SingleEnv:
    """One environment that restarts when its episode ends; its public methods are what a host can be asked.

    Args:
        env: the environment with its wrappers.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        self._env = env

    def reset(self, seed: int | None) -> np.ndarray:
        """Start anew and return the frame to act on."""
        return self._env.reset(seed=seed)[0]

    def step(self, action: int) -> EnvStep:
        """Take one action."""
        frame, reward, terminated, truncated, info = self._env.step(action)
        restarted: dict[str, Any] = {}
        if terminated or truncated:
            frame, restarted = self._env.reset()
        return EnvStep(
            frame=frame,
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            game_over=bool(info.get("game_over", terminated) or truncated),
            restart_reward=float(restarted.get("reset_reward", 0.0)),
            restart_game_over=bool(restarted.get("game_over", False)),
        )

    def describe(self) -> tuple[int, list[str]]:
        """The number of actions A, and the game's names of them in lower case or "action 0" and so on."""
        num_actions = int(self._env.action_space.n)
        meanings = getattr(self._env.unwrapped, "get_action_meanings", list)
        names = [str(meaning).lower() for meaning in meanings()]
        return num_actions, names if len(names) == num_actions else number_actions(num_actions)

    def save(self) -> dict[str, Any] | None:
        """The environment's state, plain JSON data; None if it cannot be saved."""
        return save_env(self._env)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `save`, in place of the first `reset`."""
        load_env(self._env, state)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def number_actions(num_actions: int) -> list[str]:
    """Names of actions that have none: "action 0" and so on."""
    return [f"action {index}" for index in range(num_actions)]


class EnvHost(Protocol):
    """One environment, wherever it lives."""

    def start(self, method: str, *arguments: Any) -> None:
        """Ask for a method of `SingleEnv`; never waits and never fails. One question at a time."""
        ...

    def finish(self) -> Any:
        """The answer to what was asked.

        Raises:
            EnvironmentDiedError: the environment raised, died or did not answer in time.
        """
        ...

    def begin_close(self) -> None:
        """Tell it to close, without waiting for that; `close` must follow."""
        ...

    def close(self) -> None:
        """Close it, and be done with it in any case."""
        ...

    def discard(self) -> None:
        """Be rid of it at once after an `EnvironmentDiedError`, closed or not."""
        ...


class LocalHost:
    """An environment in this process: nothing is faster, but if it crashes or hangs, so does all else.

    Args:
        make: builds the environment.
    """

    def __init__(self, make: Callable[[], gymnasium.Env]) -> None:
        self._env = SingleEnv(make())
        self._asked: tuple[str, tuple[Any, ...]] = ("describe", ())
        self._death: EnvironmentDiedError | None = None

    def start(self, method: str, *arguments: Any) -> None:
        """As `EnvHost.start`."""
        self._asked = (method, arguments)

    def finish(self) -> Any:
        """As `EnvHost.finish`."""
        if self._death is not None:
            raise self._death  # what it would answer now is worth nothing
        method, arguments = self._asked
        try:
            return getattr(self._env, method)(*arguments)
        except Exception as error:
            self._death = EnvironmentDiedError(describe_exception(error))
            raise self._death from error

    def begin_close(self) -> None:
        """As `EnvHost.begin_close`: nothing, there is only one process to close it in."""

    def close(self) -> None:
        """As `EnvHost.close`."""
        self._env.close()

    def discard(self) -> None:
        """As `EnvHost.discard`."""
        # It raised before, so it may raise again, and nobody waits for what it has to say.
        with contextlib.suppress(Exception):
            self._env.close()


def describe_exception(error: Exception) -> str:
    """An environment's exception in one line."""
    return " ".join(f"it raised {type(error).__name__}: {error}".split())
