"""MinAtar in pixels: what is drawn, the seeds, its two oddities, and games that go on elsewhere."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rem_atari.config import EnvConfig, MinAtarConfig
from rem_atari.config.presets import PRESETS
from rem_atari.envs import MissingExtraError, UnknownGameError, env_name, make_env
from rem_atari.envs.env_state import load_env, save_env
from rem_atari.envs.minatar import COLOURS, GAMES, MinAtar
from rem_atari.runs.folder import create_run_folder
from rem_atari.runs.metrics import read_metrics
from rem_atari.runs.progress import make_progress
from rem_atari.training.setup import prepare_training
from rem_atari.training.signals import StopRequest
from rem_atari.training.trainer import Trainer

pytest.importorskip("minatar", reason="minatar is not installed (extra `minatar`)")


def game(name: str = "Breakout", version: int = 1, **changes) -> EnvConfig:
    return EnvConfig(**{"id": f"MinAtar/{name}-v{version}", "frame_size": 40, **changes})


def play(env, steps: int, seed: int = 0) -> list[tuple]:
    """What a random player sees, games that end started anew."""
    rng, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        frame, *answer, _ = env.step(int(rng.integers(env.action_space.n)))
        if answer[1] or answer[2]:
            frame, _ = env.reset()
        seen.append((frame.tobytes(), *answer))
    return seen


@pytest.mark.parametrize(
    ("name", "actions"),
    [
        ("Asterix", ["NOOP", "LEFT", "UP", "RIGHT", "DOWN"]),
        ("Breakout", ["NOOP", "LEFT", "RIGHT"]),
        ("Freeway", ["NOOP", "UP", "DOWN"]),
        ("Seaquest", ["NOOP", "LEFT", "UP", "RIGHT", "DOWN", "FIRE"]),
        ("SpaceInvaders", ["NOOP", "LEFT", "RIGHT", "FIRE"]),
    ],
)
def test_each_game_has_its_actions(name: str, actions: list[str]) -> None:
    env = make_env(game(name), training=True)
    assert env.unwrapped.get_action_meanings() == actions
    assert env.action_space.n == len(actions)
    assert make_env(game(name, version=0), training=True).action_space.n == 6
    assert env_name(game(name)) == f"MinAtar-{name}"


@pytest.mark.parametrize("name", GAMES)
def test_a_cell_is_a_square_whose_colour_tells_all_that_is_there(name: str) -> None:
    env = make_env(game(name), training=True)
    env.reset(seed=1)
    rng, shown_as = np.random.default_rng(0), {(): (0, 0, 0)}
    for _ in range(150):
        frame, _, terminated, _, _ = env.step(int(rng.integers(env.action_space.n)))
        state = env.unwrapped._game.state()
        squares = frame.reshape(10, 4, 10, 4, 3)
        assert (squares == squares[:, :1, :, :1]).all()
        for row, column in np.ndindex(10, 10):
            there = tuple(np.flatnonzero(state[row, column]))
            colour = tuple(squares[row, 0, column, 0])
            assert shown_as.setdefault(there, colour) == colour
            if len(there) == 1:
                assert colour == tuple(COLOURS[there[0]])
        if terminated:
            env.reset()
    assert len(set(shown_as.values())) == len(shown_as) > 4
    assert len(np.unique(COLOURS, axis=0)) == len(COLOURS)


@pytest.mark.parametrize("size", [20, 24, 64])
def test_frames_come_in_any_size(size: int) -> None:
    env = make_env(game(frame_size=size), training=True)
    frame, _ = env.reset(seed=0)
    assert frame.shape == env.observation_space.shape == (size, size, 3)


def test_games_repeat_with_their_seed_and_go_on_without() -> None:
    def two_games(seed: int) -> list[tuple]:
        env = make_env(game("SpaceInvaders"), training=True)
        env.reset(seed=seed)
        return play(env, 150)

    assert two_games(0) == two_games(0)
    assert two_games(0) != two_games(1)
    env = make_env(game(), training=True)
    starts = {env.reset(seed=None)[0].tobytes() + env.step(0)[0].tobytes() for _ in range(20)}
    assert len(starts) == 2, "the ball starts at either side"


def test_the_last_action_of_a_game_does_not_reach_into_the_next() -> None:
    env = MinAtar("breakout", sticky_actions=1.0)
    env.reset(seed=0)
    first, *_ = env.step(1)
    assert (first[36:, 16:20] == COLOURS[0]).all(), "nothing to repeat but none: the paddle has not moved"
    env._game.last_action = 1  # as an action chosen in a game with another chance leaves it
    env.reset()
    assert (env.step(2)[0][36:, 16:20] == COLOURS[0]).all()


def test_the_two_settings_reach_the_game() -> None:
    for sticky_actions, ramping in ((0.0, True), (0.5, False)):
        cfg = MinAtarConfig(sticky_actions=sticky_actions, difficulty_ramping=ramping)
        inner = make_env(game("Asterix", minatar=cfg), training=True).unwrapped._game
        assert inner.sticky_action_prob == sticky_actions
        assert inner.env.ramping == ramping
    env = make_env(game(minatar=MinAtarConfig(sticky_actions=0.0)), training=True)
    env.reset(seed=0)
    for step in range(4):
        frame, *_ = env.step(1)
        assert (frame[36:, 12 - 4 * step : 16 - 4 * step] == COLOURS[0]).all()


def test_a_game_is_cut_short_only_by_its_bound() -> None:
    env = make_env(game("Freeway", max_raw_frames=30), training=True)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]


@pytest.mark.parametrize("name", GAMES)
def test_a_game_goes_on_elsewhere_exactly(name: str) -> None:
    env = make_env(game(name), training=True)
    env.reset(seed=2)
    play(env, 77)
    other = make_env(game(name), training=True)
    load_env(other, json.loads(json.dumps(save_env(env))))
    assert play(env, 200, seed=1) == play(other, 200, seed=1)
    if name != "Breakout":
        with pytest.raises(ValueError, match="MinAtar: the state has"):
            load_env(make_env(game(), training=True), save_env(env))


def test_unknown_games_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownGameError, match=r"'MinAtar/Brekout-v1'; did you mean MinAtar/Breakout-v1\?"):
        make_env(game("Brekout"), training=True)
    with pytest.raises(UnknownGameError, match=r"'MinAtar/Breakout-v2'"):
        make_env(game(version=2), training=True)
    monkeypatch.setitem(sys.modules, "minatar", None)
    with pytest.raises(MissingExtraError, match=r"minatar.*pip install 'retpop\[minatar\]'"):
        make_env(game(), training=True)


def test_the_agent_trains_on_it(tmp_path: Path) -> None:
    preset = PRESETS["debug"]
    schedule = replace(preset.schedule, epochs=1)
    config = replace(preset, env=replace(preset.env, id="MinAtar/Breakout-v1"), schedule=schedule)
    run = create_run_folder(tmp_path / "run", config)
    with prepare_training(config) as parts:
        Trainer(config, run, parts, make_progress([], 1, io.StringIO()), StopRequest()).run()
    phases = {line["phase"] for line in read_metrics(run.metrics)}
    assert {"collect", "tokenizer", "world_model", "controller", "evaluate"} <= phases
