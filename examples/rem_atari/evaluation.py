"""Evaluation: whole games, by the agent or at random, exactly as many as asked for."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import TimeLimit

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.envs import make_env
from rem_atari.envs.vector import GameReturn, VectorEnv, VectorStep
from rem_atari.play.collector import RealEnv
from rem_atari.play.rollout import rollout
from rem_atari.replay.buffer import Replay


@dataclass(frozen=True)
class EvaluationResult:
    """The games of one evaluation.

    Attributes:
        games: the games, those that ended in the order in which they did.
        unfinished: how many of them, the last ones, were still open when the time was up.
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
        """Of the mean return; None with less than two games."""
        returns = self.returns
        return statistics.stdev(returns) / math.sqrt(len(returns)) if len(returns) > 1 else None

    def metrics(self) -> dict[str, float | list[float]]:
        """The evaluation as metrics; without the statistics where no game was played."""
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


def playing_conditions(
    config: Config, *, temperature: float | None = None, num_envs: int | None = None
) -> Config:
    """A run's configuration for playing whole games with its agent, without a bound on steps or time.

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
    """Sees the games of an evaluation while they are played."""

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
) -> EvaluationResult:
    """Let the agent play whole games, with the preprocessing and the temperature of the evaluation.

    Args:
        agent: in eval mode, on `config.device`.
        config: the game, and how it is evaluated.
        episodes: games to play, at least 1.
        seed: seed of the environments and of the actions.
        heldout: records the games' steps until it is full; None: nothing is recorded.
        watcher: sees every step and every game that counts; None: nobody does.
        after_step: called after each step with the number of games that ended in it; may raise to stop.
    """
    generator = torch.Generator(config.device).manual_seed(seed)
    envs = make_test_envs(config, episodes, seed)
    real_env = _WatchedEnv(
        envs,
        agent.tokenizer,
        heldout,
        device=config.device,
        show=agent.show,
        stop_recording_when_full=True,
    )
    real_env.watcher = watcher
    with closing(real_env) as env:
        observation = env.reset()
        carry = agent.controller.initial_carry(env.num_envs)

        @torch.no_grad()
        def step() -> None:
            nonlocal carry, observation
            temperature = config.evaluation.temperature
            _, carry, observation = rollout(
                env, agent.controller, carry, observation, 1, temperature=temperature, generator=generator
            )

        return _play(env, step, episodes, config.evaluation.max_seconds, after_step, watcher)


def evaluate_random(
    agent: Agent, config: Config, *, episodes: int, seed: int, after_step: Callable[[int], None]
) -> EvaluationResult:
    """Play whole games at random, under the conditions of :func:`evaluate`; arguments as there."""
    generator = torch.Generator().manual_seed(seed)
    envs = make_test_envs(config, episodes, seed)
    with closing(RealEnv(envs, agent.tokenizer, None, device=config.device)) as env:
        env.reset()

        def step() -> None:
            env.play(torch.randint(env.num_actions, (env.num_envs,), generator=generator).numpy())

        return _play(env, step, episodes, config.evaluation.max_seconds, after_step)


class _WatchedEnv(RealEnv):
    """A RealEnv whose steps a watcher sees, if there is one."""

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
    step: Callable[[], None],
    episodes: int,
    max_seconds: float | None,
    after_step: Callable[[int], None],
    watcher: GameWatcher | None = None,
) -> EvaluationResult:
    """Step until the games are played or the time is up.

    Every environment has a share of the games and plays it to the end. To take the first games that end,
    wherever they do, would count short games too often.
    """
    started = time.monotonic()
    wanted = share_episodes(episodes, env.num_envs)
    games: list[GameReturn] = []

    def count(game: GameReturn) -> bool:
        """Take a game if its environment has not had its share."""
        if wanted[game.env_index] == 0:
            return False
        wanted[game.env_index] -= 1
        games.append(game)
        if watcher is not None:
            watcher.count(game)
        return True

    while any(wanted) and (max_seconds is None or time.monotonic() - started < max_seconds):
        step()
        after_step(sum(count(game) for game in env.take_finished_games()))
    unfinished = sum(count(game) for game in env.open_games() if game.length > 0)
    return EvaluationResult(tuple(games), unfinished, time.monotonic() - started)


def make_test_envs(config: Config, episodes: int, seed: int) -> VectorEnv:
    """Environments with the preprocessing of a test; no more of them than `episodes`."""
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
