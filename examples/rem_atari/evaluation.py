"""Evaluation: a given number of whole games, played by the agent or at random."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.envs import make_env
from rem_atari.envs.vector import GameReturn, VectorEnv, VectorStep
from rem_atari.errors import RunError, RunWarning
from rem_atari.models.controller import Carry, reset_carry
from rem_atari.play.evaluation_state import Evaluation, Pause
from rem_atari.play.real_env import RealEnv
from rem_atari.play.rollout import rollout
from rem_atari.replay.buffer import Replay
from rem_atari.training.seeding import derive_seed

PATIENCE_SECONDS = 60.0
"""Seconds without a finished game after which a warning is due: a game may never end."""


@dataclass(frozen=True)
class EvaluationResult:
    """The games of one evaluation.

    Attributes:
        games: the games, finished ones in the order in which they ended.
        unfinished: how many of them, the last ones, were still open at the time limit.
        seconds: wall time.
    """

    games: tuple[GameReturn, ...]
    unfinished: int
    seconds: float

    @property
    def returns(self) -> list[float]:
        """Raw return of each game."""
        return [game.raw_return for game in self.games]

    @property
    def lengths(self) -> list[int]:
        """Length of each game in the agent's steps."""
        return [game.length for game in self.games]

    @property
    def mean(self) -> float:
        """Mean return; there must be a game."""
        return statistics.fmean(self.returns)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean return; None with fewer than two games or a non-finite return."""
        return standard_error(self.returns)

    def metrics(self) -> dict[str, float | list[float]]:
        """The evaluation as metrics, without statistics if no game was played."""
        metrics: dict[str, float | list[float]] = {
            "episodes": len(self.games),
            "unfinished": self.unfinished,
            "returns": self.returns,
            "phase_seconds": self.seconds,
            "rate": len(self.games) / max(self.seconds, 1e-9),
        }
        if self.games:
            metrics["mean_return"] = self.mean
            metrics["median_return"] = statistics.median(self.returns)
            metrics["min_return"] = min(self.returns)
            metrics["max_return"] = max(self.returns)
            metrics["mean_length"] = statistics.fmean(self.lengths)
        if self.standard_error is not None:
            metrics["standard_error"] = self.standard_error
        return metrics


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of `values`; None with fewer than two or one that is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def describe_mean(mean: float, error: float | None = None) -> str:
    """A mean return, and its standard error if it has one: with two decimals where these say something."""
    scale = max(abs(mean), error or 0.0)
    form = ".2f" if scale == 0 or 0.1 <= scale < 1e12 else ".3g"
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form}}"


def playing_conditions(
    config: Config, *, temperature: float | None = None, num_envs: int | None = None
) -> Config:
    """A run's configuration for whole games of its agent, without limits on steps or time.

    Args:
        config: the run's.
        temperature: of the actions; None: the run's own for evaluations.
        num_envs: environments side by side; None: as in the run's own evaluations.
    """
    evaluation = replace(
        config.evaluation,
        temperature=config.evaluation.temperature if temperature is None else temperature,
        num_envs=config.evaluation.num_envs if num_envs is None else num_envs,
        max_steps=None,
        max_seconds=None,
    )
    # The perceptual loss is for training: its weights are not needed here.
    return replace(config, evaluation=evaluation, tokenizer=replace(config.tokenizer, perceptual_weight=0.0))


class GameWatcher(Protocol):
    """An observer of the games of an evaluation while they are played."""

    def see(self, frames: np.ndarray, step: VectorStep) -> None:
        """A step: the frames that were acted on, (E, S, S, 3) uint8, and what the environments answered."""
        ...

    def count(self, game: GameReturn) -> None:
        """A game that ended in the step seen last, and that counts."""
        ...


def evaluate(
    agent: Agent,
    config: Config,
    *,
    episodes: int,
    seed: int,
    heldout: Replay | None = None,
    watcher: GameWatcher | None = None,
    after_step: Callable[[int], None],
    evaluation: Evaluation | None = None,
) -> EvaluationResult:
    """Let the agent play whole games, with the preprocessing and the temperature of the evaluation.

    Args:
        agent: in eval mode, on `config.device`.
        config: the game, and how it is evaluated. Temperature 0: always the most likely action.
        episodes: games to play, at least 1.
        seed: seed of the environments and of the actions.
        heldout: an empty replay, records the games' steps until it is full; None: nothing is recorded.
        watcher: sees every step and every counted game, if given.
        after_step: called after each step with the number of games that ended in it; may raise to stop.
        evaluation: the part done so far, empty or interrupted; it grows with every step, and after a RunError
            it holds what is needed to continue.
    """
    env = _WatchedEnv(
        make_test_envs(config, episodes, seed),
        agent.tokenizer,
        heldout,
        device=config.device,
        show=agent.show,
        stop_recording_when_full=True,
    )
    env.watcher = watcher
    player = _AgentPlayer(agent, config, seed)
    return _play(env, player, config, episodes, seed, heldout, after_step, evaluation, watcher)


def evaluate_random(
    agent: Agent,
    config: Config,
    *,
    episodes: int,
    seed: int,
    after_step: Callable[[int], None],
    heldout: Replay | None = None,
    evaluation: Evaluation | None = None,
) -> EvaluationResult:
    """Play whole games at random, under the conditions of :func:`evaluate`; arguments as there."""
    env = RealEnv(
        make_test_envs(config, episodes, seed),
        agent.tokenizer,
        heldout,
        device=config.device,
        stop_recording_when_full=True,
    )
    return _play(env, _RandomPlayer(seed), config, episodes, seed, heldout, after_step, evaluation)


class _RandomPlayer:
    """Takes uniformly random actions."""

    carry: Carry | None = None

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, env: RealEnv, carry: Carry | None, restarted: Sequence[int]) -> None:
        """Do nothing: random play has no memory."""

    def step(self, env: RealEnv) -> None:
        """Take a step in every environment."""
        env.play(torch.randint(env.num_actions, (env.num_envs,), generator=self.generator).numpy())


class _AgentPlayer:
    """Acts as the agent does, without gradient."""

    def __init__(self, agent: Agent, config: Config, seed: int) -> None:
        self.generator = torch.Generator(config.device).manual_seed(seed)
        self.carry: Carry | None = None
        self._controller = agent.controller
        self._temperature = config.evaluation.temperature
        self._observation: Tensor | None = None

    def begin(self, env: RealEnv, carry: Carry | None, restarted: Sequence[int]) -> None:
        """Start with a blank memory, or continue with one, blanked for environments that start anew."""
        blank = self._controller.initial_carry(env.num_envs)
        self.carry = blank
        if carry is not None:
            is_new = torch.zeros(env.num_envs, dtype=torch.bool, device=blank[0].device)
            is_new[list(restarted)] = True
            saved = tuple(part.to(like) for part, like in zip(carry, blank, strict=True))
            self.carry = reset_carry(saved, is_new)
        self._observation = env.observe()

    @torch.no_grad()
    def step(self, env: RealEnv) -> None:
        """Take a step in every environment."""
        assert self.carry is not None  # begin() comes first
        assert self._observation is not None
        _, self.carry, self._observation = rollout(
            env,
            self._controller,
            self.carry,
            self._observation,
            1,
            temperature=self._temperature,
            generator=self.generator,
        )


class _WatchedEnv(RealEnv):
    """A RealEnv that shows its steps to a watcher, if there is one."""

    watcher: GameWatcher | None = None

    def play(self, actions: np.ndarray) -> VectorStep:
        acted_on = self.frames
        step = super().play(actions)
        if self.watcher is not None:
            self.watcher.see(acted_on, step)
        return step


def share_episodes(episodes: int, num_envs: int) -> list[int]:
    """How many games each environment plays; they differ by one at most."""
    each, rest = divmod(episodes, num_envs)
    return [each + (index < rest) for index in range(num_envs)]


def _play(
    env: RealEnv,
    player: _AgentPlayer | _RandomPlayer,
    config: Config,
    episodes: int,
    seed: int,
    heldout: Replay | None,
    after_step: Callable[[int], None],
    evaluation: Evaluation | None,
    watcher: GameWatcher | None = None,
) -> EvaluationResult:
    """Start or continue, play, close the environments; an interruption leaves a `Pause` in `evaluation`."""
    evaluation = Evaluation() if evaluation is None else evaluation
    count = _Count(evaluation, share_episodes(episodes, env.num_envs), watcher)
    with closing(env):
        _begin(env, player, evaluation.pause, heldout, derive_seed(seed, "again", evaluation.steps))
        try:
            _step_until_played(env, player, config, evaluation, count, after_step)
        except RunError:
            rows = {} if heldout is None else heldout.columns()
            state = player.generator.get_state()
            evaluation.pause = Pause(env.resume_states(), env.frames, state, player.carry, rows)
            raise
        unfinished = sum(count.take(game) for game in env.open_games() if game.length > 0)
    return EvaluationResult(tuple(evaluation.games), unfinished, evaluation.seconds)


def _begin(
    env: RealEnv,
    player: _AgentPlayer | _RandomPlayer,
    pause: Pause | None,
    heldout: Replay | None,
    seed: int,
) -> None:
    """Start the games, or restore the state of a pause; `seed` is for games that start anew."""
    if pause is None:
        env.reset()
        player.begin(env, None, ())
        return
    if heldout is not None and pause.heldout:
        heldout.extend(pause.heldout)
    restarted = env.resume(pause.environments, pause.frames, seed=seed)
    player.generator.set_state(pause.generator)
    player.begin(env, pause.carry, restarted)


def _step_until_played(
    env: RealEnv,
    player: _AgentPlayer | _RandomPlayer,
    config: Config,
    evaluation: Evaluation,
    count: _Count,
    after_step: Callable[[int], None],
) -> None:
    """Step until all games are played or the time limit is reached."""
    most = config.evaluation.max_seconds
    started = time.monotonic() - evaluation.seconds
    waits_since: float | None = time.monotonic()
    while count.is_open and (most is None or time.monotonic() - started < most):
        player.step(env)
        ended = sum(count.take(game) for game in env.take_finished_games())
        evaluation.steps += env.num_envs
        now = time.monotonic()
        evaluation.seconds = now - started
        if ended:
            waits_since = now
        elif waits_since is not None and now - waits_since >= PATIENCE_SECONDS:
            waits_since = None  # once is enough
            _warn_of_endless_games(env, config)
        after_step(ended)
    evaluation.seconds = time.monotonic() - started


class _Count:
    """Counts games: each environment plays a fixed share of them to the end.

    Counting the games that end first would count short games too often.
    """

    def __init__(self, evaluation: Evaluation, shares: list[int], watcher: GameWatcher | None) -> None:
        self._games, self._wanted, self._watcher = evaluation.games, shares, watcher
        for game in evaluation.games:
            self._wanted[game.env_index] -= 1

    @property
    def is_open(self) -> bool:
        """Whether more games are needed."""
        return any(self._wanted)

    def take(self, game: GameReturn) -> bool:
        """Count a game if its environment's share is not full."""
        if self._wanted[game.env_index] == 0:
            return False
        self._wanted[game.env_index] -= 1
        self._games.append(game)
        if self._watcher is not None:
            self._watcher.count(game)
        return True


def _warn_of_endless_games(env: RealEnv, config: Config) -> None:
    longest = max(game.length for game in env.open_games())
    warnings.warn(
        f"no game has ended for {PATIENCE_SECONDS:g} seconds, and the longest has {longest} steps; a game is"
        f" cut short after env.eval_max_raw_frames = {config.env.eval_max_raw_frames}, which can be set"
        " lower, and evaluation.max_steps and evaluation.max_seconds are bounds too",
        RunWarning,
        stacklevel=2,
    )


def make_test_envs(config: Config, episodes: int, seed: int) -> VectorEnv:
    """Environments with the preprocessing of an evaluation, at most `episodes` of them."""
    return VectorEnv(
        partial(_make_env, config),
        min(config.evaluation.num_envs, episodes),
        seed=seed,
        processes=config.env.processes,
        timeout=config.env.timeout_seconds,
    )


def _make_env(config: Config) -> gymnasium.Env:
    env = make_env(config.env, training=False)
    steps = config.evaluation.max_steps
    return env if steps is None else TimeLimit(env, steps)
