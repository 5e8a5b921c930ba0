"""Several environments side by side, in this process or in one each, and what happens when one dies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from rem_atari.envs.host import EnvDescription, EnvHost, EnvStep, LocalHost, SingleEnv, describe_exception
from rem_atari.envs.process import ProcessHost
from rem_atari.errors import EnvironmentAnswerError, EnvironmentDiedError, RunWarning

MOST_DEATHS = 3
"""Deaths of one environment allowed within `DEATH_WINDOW` steps; one more stops the run."""

DEATH_WINDOW = 1_000
"""Steps over which an environment's deaths are counted."""


@dataclass(frozen=True)
class GameReturn:
    """A finished game: over, or truncated by its limit.

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
    """The answers of E environments to one action each.

    Attributes:
        frames: the frames to act on next, (E, S, S, 3) uint8; already the new episode's where one ended.
        rewards: raw rewards, (E,) float32.
        terminated: the episode ended of itself (for Atari in training: also with a life), (E,) bool.
        truncated: the episode was cut short, (E,) bool.
        lost: the environment died and a new one has replaced it, (E,) bool. The action's result is unknown:
            the reward is 0, and the episode counts as truncated before it.
        game_returns: the games that ended in this step; a life loss ends none.
        last_frames: the final frame of each episode that ended, by environment.
    """

    frames: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lost: np.ndarray
    game_returns: list[GameReturn]
    last_frames: Mapping[int, np.ndarray] = field(default_factory=dict)


class VectorEnv:
    """E environments of one kind, stepped side by side; an ended episode restarts at once.

    A game's return counts all its lives: it is reported when the game is over, which in Atari's training is
    not each end of an episode (see `atari.LifeLossEndsEpisode`). A truncation always ends the game.

    An environment that raises is replaced by a new one, and the run goes on: see `VectorStep.lost`. Its game
    is dropped and not reported. With `processes` the same holds for one that crashes or does not answer.

    Args:
        make: builds one environment; with `processes` it must be picklable.
        num_envs: E.
        seed: the environments' own seeds, all different, are derived from it; used by the first `reset`.
            The d-th replacement of environment i is seeded from (seed, i, d).
        processes: run each environment in a process of its own.
        timeout: with `processes`: seconds that an environment may take to answer before it counts as dead.

    Raises:
        ValueError: `num_envs` is below 1.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        num_envs: int,
        *,
        seed: int,
        processes: bool = False,
        timeout: float = 5.0,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"VectorEnv: num_envs is {num_envs}; it must be at least 1.")
        if processes:
            # An environment that cannot be built fails here with its own error, not as a death.
            with closing(SingleEnv(make())) as env:
                self._about: EnvDescription = env.describe()
        self._make_host: Callable[[], EnvHost] = (
            partial(ProcessHost, make, timeout=timeout) if processes else partial(LocalHost, make)
        )
        self._hosts: list[EnvHost] = [self._make_host() for _ in range(num_envs)]
        if not processes:
            self._hosts[0].start("describe")
            self._about = self._hosts[0].finish()
        self._seed = seed
        self._seeds: list[int | None] = list(_env_seeds(np.random.SeedSequence(seed), num_envs))
        self._returns = [0.0] * num_envs
        self._lengths = [0] * num_envs
        self._steps = 0
        self._deaths = [0] * num_envs
        self._recent_deaths: list[list[int]] = [[] for _ in range(num_envs)]
        self._is_started = False
        self._is_in_step = False

    @property
    def num_envs(self) -> int:
        """Number of environments E."""
        return len(self._hosts)

    @property
    def num_actions(self) -> int:
        """Number of actions A; an action is an integer in [0, A)."""
        return self._about.num_actions

    @property
    def action_names(self) -> list[str]:
        """The game's names of its actions in lower case, or "action 0" and so on where it has none."""
        return list(self._about.action_names)

    @property
    def sees(self) -> str:
        """What the frames show, in a few words for the user."""
        return self._about.sees

    def reset(self) -> np.ndarray:
        """Start every environment anew and return the frames to act on, (E, S, S, 3) uint8.

        The first call seeds the environments; later ones continue their random numbers. Open games are
        dropped and not reported.

        Raises:
            EnvironmentDiedError: an environment died too often.
            EnvironmentAnswerError: an environment gave an invalid answer.
        """
        for host, seed in zip(self._hosts, self._seeds, strict=True):
            host.start("reset", seed)
        frames, dead = self._finish_all()
        for index, frame in self._replace(dead).items():
            frames[index] = frame
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
            EnvironmentDiedError: an environment died too often.
            EnvironmentAnswerError: an environment gave an invalid answer.
        """
        if not self._is_started:
            raise RuntimeError("VectorEnv.step() before the first reset().")
        if len(actions) != self.num_envs:
            raise ValueError(f"VectorEnv.step(): {len(actions)} actions for {self.num_envs} environments.")
        self._steps += 1
        self._is_in_step = True
        for host, action in zip(self._hosts, actions, strict=True):
            host.start("step", int(action))
        steps, dead = self._finish_all()
        game_returns = [
            game for index, step in enumerate(steps) if step is not None for game in self._count(index, step)
        ]
        for index, frame in self._replace(dead).items():
            steps[index] = _lost_step(frame)
        self._is_in_step = False
        return VectorStep(
            frames=np.stack([step.frame for step in steps]),
            rewards=np.array([step.reward for step in steps], dtype=np.float32),
            terminated=np.array([step.terminated for step in steps], dtype=bool),
            truncated=np.array([step.truncated for step in steps], dtype=bool),
            lost=np.array([index in dead for index in range(self.num_envs)], dtype=bool),
            game_returns=game_returns,
            last_frames={
                index: step.last_frame for index, step in enumerate(steps) if step.last_frame is not None
            },
        )

    def open_games(self) -> list[GameReturn]:
        """The open games, one per environment."""
        counts = zip(self._returns, self._lengths, strict=True)
        return [GameReturn(index, total, length) for index, (total, length) in enumerate(counts)]

    def resume_states(self) -> list[dict[str, Any] | None]:
        """Each environment's state for `resume`, plain JSON data.

        None stands for one that cannot be saved: its kind does not expose its state, or it has died and the
        next `step` replaces it. After a `step` that raised, all are None, because some took an unrecorded
        step.
        """
        if self._is_in_step:
            return [None] * self.num_envs
        for host in self._hosts:
            host.start("save")
        states, _ = self._finish_all()
        counts = zip(states, self._returns, self._lengths, self._deaths, strict=True)
        return [
            None if state is None else {"env": state, "return": total, "length": length, "deaths": deaths}
            for state, total, length, deaths in counts
        ]

    def resume(self, states: Sequence[dict[str, Any] | None], *, seed: int) -> list[np.ndarray | None]:
        """Restore environments of the same kind, in place of the first `reset`.

        Args:
            states: what `resume_states` returned.
            seed: seeds of environments that could not be saved and start anew are derived from it.
        Returns:
            The first frames of those that start anew, (S, S, 3) uint8; None for the others.
        Raises:
            ValueError: the states are those of other environments.
        """
        if len(states) != self.num_envs:
            raise ValueError(f"VectorEnv.resume(): {len(states)} states for {self.num_envs} environments.")
        seeds = _env_seeds(np.random.SeedSequence(seed), self.num_envs)
        for index, (host, state) in enumerate(zip(self._hosts, states, strict=True)):
            if state is None:
                host.start("reset", seeds[index])
                continue
            host.start("load", state["env"])
            self._returns[index], self._lengths[index] = float(state["return"]), int(state["length"])
            self._deaths[index] = int(state["deaths"])
        frames, dead = self._finish_all()
        for index, error in dead.items():
            raise ValueError(f"environment {index} cannot go on from its saved state: {error}")
        self._seeds = [None] * self.num_envs
        self._is_started = True
        return frames

    def close(self) -> None:
        """Close every environment."""
        for host in self._hosts:
            host.begin_close()
        for host in self._hosts:
            host.close()

    def _finish_all(self) -> tuple[list[Any], dict[int, EnvironmentDiedError]]:
        """The answers, or None with the reason.

        Raises:
            EnvironmentAnswerError: one gave an invalid answer; all have answered.
        """
        answers: list[Any] = [None] * self.num_envs
        dead: dict[int, EnvironmentDiedError] = {}
        refused: EnvironmentAnswerError | None = None
        for index, host in enumerate(self._hosts):
            try:
                answers[index] = host.finish()
            except EnvironmentDiedError as error:
                dead[index] = error
            except EnvironmentAnswerError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return answers, dead

    def _replace(self, dead: dict[int, EnvironmentDiedError]) -> dict[int, np.ndarray]:
        """Replace dead environments, repeatedly if needed; their first frames."""
        frames: dict[int, np.ndarray] = {}
        while dead:
            for index, error in dead.items():
                self._note_death(index, error)
            dead = self._start_anew(list(dead), frames)
        return frames

    def _start_anew(
        self, indices: list[int], frames: dict[int, np.ndarray]
    ) -> dict[int, EnvironmentDiedError]:
        """Start new environments side by side, add first frames to `frames`; return those that died."""
        dead: dict[int, EnvironmentDiedError] = {}
        for index in indices:
            self._hosts[index].discard()
            try:
                self._hosts[index] = self._make_host()
            except (Exception, SystemExit) as error:
                dead[index] = EnvironmentDiedError(describe_exception(error))
                continue
            sequence = np.random.SeedSequence(self._seed, spawn_key=(index, self._deaths[index]))
            self._hosts[index].start("reset", _env_seeds(sequence, 1)[0])
        for index in indices:
            if index not in dead:
                try:
                    frames[index] = self._hosts[index].finish()
                except EnvironmentDiedError as error:
                    dead[index] = error
        return dead

    def _note_death(self, index: int, error: EnvironmentDiedError) -> None:
        """Drop an environment's game with a warning; raise if it has died too often."""
        self._returns[index], self._lengths[index] = 0.0, 0
        self._deaths[index] += 1
        recent = [step for step in self._recent_deaths[index] if step > self._steps - DEATH_WINDOW]
        self._recent_deaths[index] = [*recent, self._steps]
        if len(recent) >= MOST_DEATHS:
            raise EnvironmentDiedError(
                f"environment {index} died {len(recent) + 1} times within {DEATH_WINDOW} steps; the last time"
                f" {error}"
            ) from error
        warnings.warn(
            f"environment {index} died: {error}; a new one takes its place, and its open episode ends as"
            f" truncated (death {self._deaths[index]})",
            RunWarning,
            stacklevel=2,
        )

    def _count(self, index: int, step: EnvStep) -> Iterator[GameReturn]:
        """Count one environment's step and its restart; return the games that ended."""
        self._returns[index] += step.reward
        self._lengths[index] += 1
        if step.game_over:
            yield self._end_game(index)
        self._returns[index] += step.restart_reward
        if step.restart_game_over:
            yield self._end_game(index)

    def _end_game(self, index: int) -> GameReturn:
        game = GameReturn(index, self._returns[index], self._lengths[index])
        self._returns[index], self._lengths[index] = 0.0, 0
        return game


def _env_seeds(sequence: np.random.SeedSequence, count: int) -> list[int]:
    """Seeds for environments, in 32 signed bits, because many pass theirs to libraries with that limit."""
    return (sequence.generate_state(count) % 2**31).tolist()


def _lost_step(frame: np.ndarray) -> EnvStep:
    """The answer in place of a dead environment's; `frame` is the first of its replacement."""
    return EnvStep(
        frame=frame,
        reward=0.0,
        terminated=False,
        truncated=True,
        game_over=False,
        restart_reward=0.0,
        restart_game_over=False,
    )
