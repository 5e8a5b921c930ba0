"""Evaluation: exactly the games asked for, short and long ones alike, and a sample of them kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rem_atari import evaluation
from rem_atari.agent import Agent
from rem_atari.config import Config, EnvConfig
from rem_atari.config.presets import PRESETS
from rem_atari.envs.vector import GameReturn, VectorStep
from rem_atari.errors import EnvironmentDiedError, RunWarning, StoppedError
from rem_atari.evaluation import EvaluationResult, evaluate, evaluate_random, share_episodes
from rem_atari.play.evaluation_state import Evaluation
from rem_atari.replay.buffer import Replay

SIZE = 24


class Marathon(gymnasium.Env[np.ndarray, int]):
    """Games of 1, 2, 4, ... steps in turn, reward 1 a step."""

    observation_space = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = Discrete(3)

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self._lengths = lengths
        self._game = -1
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._game += 1
        self._steps = 0
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        over = self._steps == self._lengths[self._game % len(self._lengths)]
        return self._frame(), 1.0, over, False, {}

    def _frame(self) -> np.ndarray:
        return np.full((SIZE, SIZE, 3), self._steps % 256, dtype=np.uint8)


@pytest.fixture(scope="module")
def agent() -> Agent:
    torch.manual_seed(0)
    return Agent.from_config(PRESETS["debug"], num_actions=3).eval()


def config_with(**changes: Any) -> Config:
    config = PRESETS["debug"]
    return replace(config, evaluation=replace(config.evaluation, **changes))


def nothing(finished_games: int) -> None:
    """An `after_step` that lets the evaluation go on."""


@pytest.fixture
def marathon(monkeypatch: pytest.MonkeyPatch) -> None:
    """One environment's games last 1 step each, the next one's 1 and 50 in turn, and so on."""
    lengths = iter([(1,), (1, 50), (7, 3, 20)] * 2)

    def make(config: EnvConfig, *, training: bool) -> gymnasium.Env:
        assert not training
        return Marathon(next(lengths))

    monkeypatch.setattr(evaluation, "make_env", make)


@pytest.mark.usefixtures("marathon")
def test_every_environment_plays_its_share_however_long_it_takes(agent: Agent) -> None:
    result = evaluate(agent, config_with(num_envs=3), episodes=8, seed=0, after_step=nothing)
    by_env = {index: [game.length for game in result.games if game.env_index == index] for index in range(3)}
    assert by_env == {0: [1, 1, 1], 1: [1, 50, 1], 2: [7, 3]}
    assert result.returns == [float(length) for length in result.lengths]
    assert result.unfinished == 0
    metrics = result.metrics()
    assert metrics["episodes"] == 8
    assert metrics["mean_return"] == pytest.approx(sum(result.returns) / 8)
    assert (metrics["min_return"], metrics["median_return"], metrics["max_return"]) == (1.0, 1.0, 50.0)


@pytest.mark.parametrize(
    ("episodes", "num_envs", "shares"), [(8, 3, [3, 3, 2]), (4, 4, [1] * 4), (5, 1, [5])]
)
def test_shares_add_up(episodes: int, num_envs: int, shares: list[int]) -> None:
    assert share_episodes(episodes, num_envs) == shares


@pytest.mark.usefixtures("marathon")
def test_no_more_environments_than_games(agent: Agent) -> None:
    result = evaluate(agent, config_with(num_envs=3), episodes=2, seed=0, after_step=nothing)
    assert [game.env_index for game in result.games] == [0, 1]


@pytest.mark.usefixtures("marathon")
def test_games_open_when_the_time_is_up_count_as_they_stand(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock moves a second a step; the bound is four."""
    ticks = 0

    def tick(finished_games: int) -> None:
        nonlocal ticks
        ticks += 1

    monkeypatch.setattr(evaluation.time, "monotonic", lambda: float(ticks))
    result = evaluate(agent, config_with(num_envs=3, max_seconds=4.0), episodes=6, seed=0, after_step=tick)
    played = {index: [game.length for game in result.games if game.env_index == index] for index in range(3)}
    assert played == {0: [1, 1], 1: [1, 3], 2: [4]}
    assert result.unfinished == 2
    assert result.seconds == 4.0


@pytest.mark.usefixtures("marathon")
def test_a_game_is_cut_at_the_step_bound(agent: Agent) -> None:
    result = evaluate(agent, config_with(num_envs=3, max_steps=5), episodes=6, seed=0, after_step=nothing)
    assert max(result.lengths) == 5
    assert result.unfinished == 0
    assert len(result.games) == 6


def test_no_game_played_gives_no_mean(agent: Agent) -> None:
    result = evaluate(agent, config_with(max_seconds=0.0), episodes=3, seed=0, after_step=nothing)
    assert result.metrics()["episodes"] == 0
    assert "mean_return" not in result.metrics()


def test_heldout_steps_are_recorded_until_the_replay_is_full(agent: Agent, tmp_path: Path) -> None:
    heldout = Replay((SIZE, SIZE, 3), 13, folder=tmp_path, seed=0)
    evaluate(agent, config_with(num_envs=2), episodes=6, seed=0, heldout=heldout, after_step=nothing)
    assert heldout.num_steps == 12, "two environments a step: the thirteenth row stays free"
    heldout.flush()
    assert Replay.load(tmp_path).num_steps == 12


def test_same_seed_same_games_another_seed_others(agent: Agent) -> None:
    config = config_with(num_envs=2, temperature=1.0)
    results = [
        evaluate(agent, config, episodes=20, seed=seed, after_step=nothing).games for seed in (3, 3, 4)
    ]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_random_play_on_catch_catches_one_ball_in_six(agent: Agent) -> None:
    result = evaluate_random(agent, config_with(num_envs=8), episodes=400, seed=0, after_step=nothing)
    assert set(result.lengths) == {5}
    assert result.metrics()["mean_return"] == pytest.approx(2 / 6 - 1, abs=0.12)


@pytest.mark.parametrize("play", [evaluate, evaluate_random])
def test_games_are_closed_even_if_they_do_not_start(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, play: Callable[..., object]
) -> None:
    built: list[int] = []
    closed: list[int] = []

    class Broken(Marathon):
        def __init__(self) -> None:
            super().__init__((1,))
            built.append(1)

        def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
            raise RuntimeError("no ROM")

        def close(self) -> None:
            closed.append(1)

    monkeypatch.setattr(evaluation, "make_env", lambda config, *, training: Broken())
    with pytest.warns(RunWarning), pytest.raises(EnvironmentDiedError, match="no ROM"):
        play(agent, config_with(num_envs=2), episodes=2, seed=0, after_step=nothing)
    assert len(closed) == len(built) >= 2


@pytest.mark.usefixtures("marathon")
def test_a_watcher_sees_every_step_and_the_games_that_count(agent: Agent) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.lengths: list[int] = []
            self.steps = [0, 0, 0]
            self.newest: list[GameReturn] = []

        def see(self, frames: np.ndarray, step: VectorStep) -> None:
            # Marathon draws the number of the step within its game.
            for index, frame in enumerate(frames):
                assert (frame == self.steps[index]).all()
                self.steps[index] += 1
            for game in step.game_returns:
                assert self.steps[game.env_index] == game.length
                self.steps[game.env_index] = 0
            self.newest = step.game_returns

        def count(self, game: GameReturn) -> None:
            assert game in self.newest
            self.lengths.append(game.length)

    watcher = Watcher()
    config = config_with(num_envs=3)
    result = evaluate(agent, config, episodes=8, seed=0, watcher=watcher, after_step=nothing)
    assert watcher.lengths == result.lengths
    assert len(watcher.lengths) == 8


def test_an_evaluation_can_be_stopped(agent: Agent) -> None:
    def stop(finished_games: int) -> None:
        raise StoppedError("enough")

    with pytest.raises(StoppedError):
        evaluate(agent, config_with(), episodes=3, seed=0, after_step=stop)


@pytest.mark.parametrize("play", [evaluate, evaluate_random])
def test_an_evaluation_in_slices_of_one_step_is_the_whole_one(agent: Agent, play: Callable[..., Any]) -> None:
    """Games, their order, what is recorded and the actions; through JSON and tensors as in a checkpoint."""
    config = config_with(num_envs=2, temperature=1.0)

    def part(evaluation: Evaluation, after_step: Callable[[int], None]) -> tuple[EvaluationResult, Replay]:
        heldout = Replay((SIZE, SIZE, 3), 13, seed=0)
        more = {"heldout": heldout} if play is evaluate else {}
        common = {"episodes": 5, "seed": 3, "after_step": after_step, "evaluation": evaluation}
        return play(agent, config, **common, **more), heldout

    def stop(ended: int) -> None:
        raise StoppedError("enough")

    whole, recorded = part(Evaluation(), nothing)
    evaluation, slices, result = Evaluation(), 0, None
    while result is None:
        try:
            result, heldout = part(evaluation, stop)
        except StoppedError:
            slices += 1
            state, tensors = json.loads(json.dumps(evaluation.state())), evaluation.tensors()
            evaluation = Evaluation.from_state(state, tensors)
    assert result.games == whole.games
    assert slices == 15 == evaluation.steps / 2, "three games of five steps in one of the two environments"
    assert all((heldout.columns()[name] == rows).all() for name, rows in recorded.columns().items())


@pytest.mark.usefixtures("marathon")
def test_games_that_cannot_be_saved_are_played_anew(agent: Agent) -> None:
    evaluation, steps = Evaluation(), 0

    def stop(ended: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise StoppedError("enough")

    config = config_with(num_envs=2)
    with pytest.raises(StoppedError):
        evaluate(agent, config, episodes=6, seed=0, after_step=stop, evaluation=evaluation)
    assert [game.length for game in evaluation.games] == [1, 1, 1]
    result = evaluate(agent, config, episodes=6, seed=0, after_step=nothing, evaluation=evaluation)
    assert [game.env_index for game in result.games].count(0) == 3
    assert len(result.games) == 6


@pytest.mark.usefixtures("marathon")
def test_games_that_do_not_end_are_told_of_once(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock moves ten seconds a step; the second game has 50 steps."""
    ticks = itertools.count()
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: 5.0 * next(ticks))
    with pytest.warns(
        RunWarning, match="no game has ended for 60 seconds.*env.eval_max_raw_frames = 108000"
    ) as said:
        evaluate(agent, config_with(num_envs=2), episodes=4, seed=0, after_step=nothing)
    assert len(said) == 1


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_returns_that_are_not_finite_have_no_standard_error(reward: float) -> None:
    """No environment's are, but a result can be made of anything."""
    result = EvaluationResult((GameReturn(0, reward, 5), GameReturn(0, 1.0, 5)), 0, 1.0)
    assert "standard_error" not in result.metrics()
    assert not np.isfinite(result.metrics()["mean_return"])
