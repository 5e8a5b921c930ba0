"""Blind policies: what the search finds, what is measured, and the scripted players above them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from run_folders import DEBUG
from sides_env import SIDES_ID, STEPS

from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.envs.catch import LEFT, RIGHT, STAY
from rem_atari.envs.vector import GameReturn
from rem_atari.evaluation import playing_conditions
from rem_atari.play.blind import ANY_START, BlindPlay
from rem_atari.play.open_loop import KEPT, MOST_ACTIONS, OpenLoopSearch, TriedList, change_list, draw_list
from rem_atari.play.scripted import scripted_player


def in_game(name: str, preset: Config = DEBUG) -> Config:
    return playing_conditions(replace(preset, env=replace(preset.env, id=name)))


def ignore(done: int) -> None:
    """Nobody watches."""


def played(actions: np.ndarray, steps: int) -> np.ndarray:
    """What a list does in a game of so many steps."""
    return np.resize(actions, steps)


def test_the_search_finds_a_sweep_and_is_not_misled_by_luck() -> None:
    """A point for each step that fits "fire, and eight left, eight right", and noise as large as a half."""
    sweep = np.tile(np.stack([np.full(16, 2), np.repeat([0, 1], 8)], axis=1).ravel(), 2)
    rng = np.random.default_rng(0)
    search = OpenLoopSearch(3, np.random.default_rng(1))
    for _ in range(1_500):
        tried = search.ask()
        fits = float((played(tried.actions, len(sweep)) == sweep).sum())
        tried.add(GameReturn(0, fits + rng.normal(0, 16), len(sweep)))
    found = (played(search.best(), len(sweep)) == sweep).mean()
    assert found > 0.85  # the best constant fits in a half


def test_the_best_list_is_not_the_luckiest() -> None:
    search = OpenLoopSearch(2, np.random.default_rng(0))
    steady, lucky = search.ask(), search.ask()
    for _ in range(20):
        steady.add(GameReturn(0, 5.0, 1))
    lucky.add(GameReturn(0, 6.0, 1))
    assert search.ask() is lucky  # it is doubted first
    lucky.add(GameReturn(0, 0.0, 1))
    assert search.best() is steady.actions


def test_without_any_reward_ever_new_lists_are_drawn() -> None:
    search = OpenLoopSearch(2, np.random.default_rng(0))
    lists = []
    for _ in range(20):
        lists.append(search.ask())
        lists[-1].add(GameReturn(0, 0.0, 1))
    assert {tried.games for tried in lists} == {1}


def test_what_the_search_remembers_is_bounded() -> None:
    search = OpenLoopSearch(2, np.random.default_rng(0))
    for value in range(3 * KEPT):
        search.ask().add(GameReturn(0, float(value % 7), 1))
    assert len(search._tried) <= 2 * KEPT


@pytest.mark.parametrize("seed", range(5))
def test_every_list_can_be_played(seed: int) -> None:
    rng = np.random.default_rng(seed)
    actions, other = draw_list(4, rng), draw_list(4, rng)
    for _ in range(50):
        actions = change_list(TriedList(actions, longest=100), other, 4, rng)
        assert 0 < len(actions) <= MOST_ACTIONS
        assert set(actions.tolist()) <= set(range(4))


def test_in_catch_nothing_blind_beats_random_play_and_the_script_never_misses() -> None:
    play = BlindPlay(in_game("rem_atari/Catch-v0"), seed=0)
    assert play.num_starts > 10
    done: list[int] = []
    random = play.measure_random(200, done.append)
    assert (sum(done), len(random.games), set(random.lengths)) == (200, 200, {5})
    assert abs(random.mean + 2 / 3) < 4 * random.standard_error
    constant, listed = play.find_constant(300, ignore), play.find_lists(300, ignore)
    for lists in (constant, listed):
        result = play.measure_lists(lists, 200, ignore)
        assert abs(result.mean + 2 / 3) < 4 * result.standard_error
    player = scripted_player(in_game("rem_atari/Catch-v0").env, play.action_names)
    assert set(play.measure(player, 50, ignore).returns) == {1.0}


def test_a_list_for_each_start_is_told_by_the_frame_after_the_first_step() -> None:
    play = BlindPlay(in_game(SIDES_ID), seed=0)
    assert play.num_starts == 2
    blind, told = play.find_lists(1_000, ignore), play.find_lists(1_000, ignore, by_start=True)
    assert set(blind) == {ANY_START}
    assert len(told) == 2
    assert play.measure_lists(told, 40, ignore).mean == STEPS - 1
    assert play.measure_lists(blind, 40, ignore).mean < 0.75 * (STEPS - 1)


def test_what_a_player_does_is_copied_for_each_start() -> None:
    """Who sees in Sides scores on every step but the first, and so does a copy that sees the start alone."""
    play = BlindPlay(in_game(SIDES_ID), seed=0)
    copied = play.copy_lists(lambda frame, clock: int(frame[0, 0, 0]) // 100)
    assert sorted(actions.tolist() for actions in copied.values()) == [[1] * 4, [2] * 4]
    assert play.measure_lists(copied, 20, ignore).mean == STEPS - 1


def test_searches_take_the_steps_given_and_the_same_seed_finds_the_same() -> None:
    found, returns = [], []
    for seed in (3, 3, 4):
        play, steps = BlindPlay(in_game("rem_atari/Catch-v0"), seed=seed), []
        found.append(play.find_lists(200, steps.append)[ANY_START].tolist())
        returns.append(play.measure_random(30, ignore).returns)
        assert sum(steps) == 200
    assert found[0] == found[1]
    assert returns[0] == returns[1] != returns[2]


def test_the_games_measured_are_none_that_were_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    play, seeds = BlindPlay(in_game("rem_atari/Catch-v0"), seed=0), []
    make = play._make_envs
    monkeypatch.setattr(play, "_make_envs", lambda *purpose: seeds.append(purpose) or make(*purpose))
    play.measure_lists(play.find_lists(50, ignore), 5, ignore)
    assert [purpose[0] for purpose in seeds] == ["search", "measure"]


def test_the_script_of_breakout_is_far_above_random_play() -> None:
    pytest.importorskip("minatar", reason="minatar is not installed (extra `minatar`)")
    config = in_game("MinAtar/Breakout-v1", PRESETS["minatar"])
    play = BlindPlay(config, seed=0)
    assert play.num_starts == 2
    result = play.measure(scripted_player(config.env, play.action_names), 3, ignore)
    assert result.mean > 4  # random play: 0.4


@pytest.mark.parametrize(("name", "size"), [("MinAtar/Freeway-v1", 40), ("MinAtar/Breakout-v1", 48)])
def test_without_a_script_or_whole_cells_there_is_no_scripted_player(name: str, size: int) -> None:
    env = replace(PRESETS["minatar"].env, id=name, frame_size=size)
    assert scripted_player(env, ["noop", "left", "right"]) is None


def test_of_an_atari_game_there_is_no_scripted_player() -> None:
    assert scripted_player(PRESETS["paper"].env, ["noop", "left", "right"]) is None


def test_the_script_of_catch_knows_left_from_right() -> None:
    env = PRESETS["catch"].env
    player = scripted_player(env, ["left", "stay", "right"])
    for ball, wanted in ((0, LEFT), (2, STAY), (5, RIGHT)):
        cells = np.zeros((6, 6, 3), np.uint8)
        cells[5, 2], cells[0, ball] = (80, 160, 255), (255, 255, 255)
        assert player(cells.repeat(4, axis=0).repeat(4, axis=1), 0) == wanted
