"""Hosts of an environment: `LocalHost`, in this process; `process.ProcessHost`, in one of its own.

`start` asks a host and never waits; `finish` returns its answer. Callers start all E hosts before they wait
for the first, so the hosts work side by side. An exception, a crash or a hang of an environment raises
`EnvironmentDiedError`, and the host cannot be used again. An invalid answer (`answers`) raises
`EnvironmentAnswerError`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np

from rem_atari.envs.answers import check_observation, check_reset, check_step, name_of
from rem_atari.envs.atari import LifeLossEndsEpisode
from rem_atari.envs.env_state import layers_of, load_env, save_env
from rem_atari.envs.gym_pixels import what_is_seen
from rem_atari.errors import EnvironmentAnswerError, EnvironmentDiedError, RunWarning, explain


@dataclass(frozen=True)
class EnvStep:
    """One environment's answer to an action; it has already restarted if its episode ended.

    Attributes:
        frame: the frame to act on next, (S, S, 3) uint8; the new episode's where one ended.
        reward: raw reward.
        terminated: the episode ended of itself.
        truncated: the episode was cut short.
        game_over: the whole game ended with this step, not just a life.
        restart_reward: raw reward on the way to the new episode (see `atari.LifeLossEndsEpisode`).
        restart_game_over: the game ended on the way to the new episode.
        last_frame: the final frame of an episode that ended, on which no action follows; else None.
    """

    frame: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    game_over: bool
    restart_reward: float
    restart_game_over: bool
    last_frame: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class EnvDescription:
    """The properties of an environment that an agent is built for.

    Attributes:
        num_actions: A.
        action_names: the game's names of its actions in lower case, or "action 0" and so on.
        sees: what its frames show, in a few words for the user.
    """

    num_actions: int
    action_names: list[str]
    sees: str


class SingleEnv:
    """One environment that restarts when its episode ends; a host runs its public methods on request.

    Args:
        env: the environment with its wrappers.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        self._env = env
        self._name = name_of(env)
        lives = (layer for layer in layers_of(env) if isinstance(layer, LifeLossEndsEpisode))
        self._lives: LifeLossEndsEpisode | None = next(lives, None)
        self._told_of_state = False

    def reset(self, seed: int | None) -> np.ndarray:
        """Start anew and return the frame to act on."""
        frame, _ = check_reset(self._env.reset(seed=seed), self._name)
        return self._take(frame)

    def step(self, action: int) -> EnvStep:
        """Take one action."""
        frame, reward, terminated, truncated, _ = check_step(self._env.step(action), self._name)
        frame = self._take(frame)
        game_over = self._lives.game_over if self._lives is not None else terminated
        restart_reward, restart_game_over = 0.0, False
        last_frame = None
        if terminated or truncated:
            last_frame, frame = frame, self.reset(None)
            if self._lives is not None:
                restart_reward, restart_game_over = self._lives.reset_reward, self._lives.game_over
        return EnvStep(
            frame=frame,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            game_over=game_over or truncated,
            restart_reward=restart_reward,
            restart_game_over=restart_game_over,
            last_frame=last_frame,
        )

    def _take(self, frame: Any) -> np.ndarray:
        """The frame, checked, as an array of its own: an environment may draw the next one into the same."""
        return check_observation(frame, self._env.observation_space, self._name).copy()

    def describe(self) -> EnvDescription:
        """The actions, and what the agent sees."""
        num_actions = int(self._env.action_space.n)
        meanings = getattr(self._env.unwrapped, "get_action_meanings", list)
        try:
            names = [str(meaning).lower() for meaning in meanings()]
        except Exception as error:
            raise EnvironmentAnswerError(
                f"{self._name}: get_action_meanings() does not give names: {explain(error)}; wanted a list of"
                f" {num_actions} texts"
            ) from error
        if len(names) != num_actions:
            names = number_actions(num_actions)
        return EnvDescription(num_actions=num_actions, action_names=names, sees=what_is_seen(self._env))

    def save(self) -> dict[str, Any] | None:
        """The environment's state, plain JSON data; None if it cannot be saved.

        That an environment fails to tell its state is said once, and no reason to save nothing of the run.
        """
        try:
            state = save_env(self._env)
            json.dumps(state)
        except Exception as error:
            if not self._told_of_state:
                self._told_of_state = True
                warnings.warn(
                    f"{self._name}: get_resume_state() gives no JSON data: {explain(error)}; a resumed run"
                    " starts its open game anew",
                    RunWarning,
                    stacklevel=2,
                )
            return None
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a `save`, in place of the first `reset`."""
        load_env(self._env, state)

    def close(self) -> None:
        """Close the environment; a failure is only a warning, because its work is over."""
        try:
            self._env.close()
        except (Exception, SystemExit) as error:
            warnings.warn(
                f"{self._name} cannot be closed: {describe_exception(error)}", RunWarning, stacklevel=2
            )


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
            EnvironmentAnswerError: it gave an invalid answer.
        """
        ...

    def begin_close(self) -> None:
        """Tell it to close without waiting; `close` must follow."""
        ...

    def close(self) -> None:
        """Close it, by force if necessary."""
        ...

    def discard(self) -> None:
        """Discard it at once after an `EnvironmentDiedError`, closed or not."""
        ...


class LocalHost:
    """An environment in this process: fastest, but a crash or hang takes the program with it.

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
            raise self._death  # its state is undefined after an exception
        method, arguments = self._asked
        try:
            return getattr(self._env, method)(*arguments)
        except EnvironmentAnswerError:
            raise
        except (Exception, SystemExit) as error:
            self._death = EnvironmentDiedError(describe_exception(error))
            raise self._death from error

    def begin_close(self) -> None:
        """As `EnvHost.begin_close`: nothing, there is only one process to close it in."""

    def close(self) -> None:
        """As `EnvHost.close`."""
        self._env.close()

    def discard(self) -> None:
        """As `EnvHost.discard`."""
        # It raised before and may raise again; that error is of no use.
        with warnings.catch_warnings(action="ignore"):
            self._env.close()


def describe_exception(error: BaseException) -> str:
    """An environment's exception in one line."""
    return f"it raised {explain(error)}"
