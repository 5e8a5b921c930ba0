"""Evaluation: whole games, by the agent or at random, exactly as many as asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import gymnasium
import torch
from gymnasium.wrappers import TimeLimit

from rem_atari.agent import Agent
from rem_atari.collector import RealEnv
from rem_atari.config import Config
from rem_atari.envs import make_env
from rem_atari.envs.vector import GameReturn, VectorEnv
from rem_atari.replay import Replay
from rem_atari.rollout import rollout


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
            metrics["mean_return"] = statistics.fmean(self.returns)
            metrics["median_return"] = statistics.median(self.returns)
            metrics["min_return"] = min(self.returns)
            metrics["max_return"] = max(self.returns)
            metrics["mean_length"] = statistics.fmean(self.lengths)
        return metrics


def evaluate(
    agent: Agent,
    config: Config,
    *,
    episodes: int,
    seed: int,
    heldout: Replay | None = None,
    after_step: Callable[[int], None],
) -> EvaluationResult:
    """Let the agent play whole games, with the preprocessing and the temperature of the evaluation.

    Args:
        agent: in eval mode, on `config.device`.
        config: the game, and how it is evaluated.
        episodes: games to play, at least 1.
        seed: seed of the environments and of the actions.
        heldout: records the games' steps until it is full; None: nothing is recorded.
        after_step: called after each step with the number of games that ended in it; may raise to stop.
    """
    generator = torch.Generator(config.device).manual_seed(seed)
    envs = _make_envs(config, episodes, seed)
    real_env = RealEnv(envs, agent.tokenizer, heldout, device=config.device, stop_recording_when_full=True)
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

        return _play(env, step, episodes, config.evaluation.max_seconds, after_step)


def evaluate_random(
    agent: Agent, config: Config, *, episodes: int, seed: int, after_step: Callable[[int], None]
) -> EvaluationResult:
    """Play whole games at random, under the conditions of :func:`evaluate`; arguments as there."""
    generator = torch.Generator().manual_seed(seed)
    envs = _make_envs(config, episodes, seed)
    with closing(RealEnv(envs, agent.tokenizer, None, device=config.device)) as env:
        env.reset()

        def step() -> None:
            env.play(torch.randint(env.num_actions, (env.num_envs,), generator=generator).numpy())

        return _play(env, step, episodes, config.evaluation.max_seconds, after_step)


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
        return True

    while any(wanted) and (max_seconds is None or time.monotonic() - started < max_seconds):
        step()
        after_step(sum(count(game) for game in env.take_finished_games()))
    unfinished = sum(count(game) for game in env.open_games() if game.length > 0)
    return EvaluationResult(tuple(games), unfinished, time.monotonic() - started)


def _make_envs(config: Config, episodes: int, seed: int) -> VectorEnv:
    def make() -> gymnasium.Env:
        env = make_env(config.env, training=False)
        steps = config.evaluation.max_steps
        return env if steps is None else TimeLimit(env, steps)

    return VectorEnv(make, min(config.evaluation.num_envs, episodes), seed=seed)
