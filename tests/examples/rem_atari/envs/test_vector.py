"""VectorEnv: restarts, whole games over several lives, seeds."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TimeLimit

from rem_atari.config import EnvConfig
from rem_atari.envs import make_env
from rem_atari.envs.atari import LifeLossEndsEpisode
from rem_atari.envs.catch import Catch
from rem_atari.envs.vector import GameReturn, VectorEnv


class Countdown(gymnasium.Env):
    """A game that pays its step number and ends after `length` steps; the frame shows game and step."""

    def __init__(self, length: int, *, lives: list[int] | None = None, cut: bool = False) -> None:
        self.observation_space = Box(0, 255, (2, 2, 3), np.uint8)
        self.action_space = Discrete(2)
        self.length, self.lives, self.cut = length, lives, cut
        self.game = 0
        self.seeds: list[int | None] = []

    def _answer(self) -> tuple[np.ndarray, dict[str, Any]]:
        info = {} if self.lives is None else {"lives": self.lives[self.time]}
        return np.full((2, 2, 3), 10 * self.game + self.time, np.uint8), info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.game += 1
        self.time = 0
        return self._answer()

    def step(self, action: int):
        self.time += 1
        frame, info = self._answer()
        over = self.time >= self.length
        return frame, float(self.time), over and not self.cut, over and self.cut, info


def in_turn(*envs: gymnasium.Env) -> VectorEnv:
    waiting = iter(envs)
    return VectorEnv(lambda: next(waiting), len(envs), seed=0)


def test_action_names_are_the_games_or_numbers() -> None:
    assert VectorEnv(Catch, 1, seed=0).action_names == ["left", "stay", "right"]
    assert in_turn(Countdown(2)).action_names == ["action 0", "action 1"]

    class Misnamed(Countdown):
        def get_action_meanings(self) -> list[str]:
            return ["the only one of two"]

    assert in_turn(Misnamed(2)).action_names == ["action 0", "action 1"]


def test_ended_episodes_restart_at_once_and_others_go_on() -> None:
    env = in_turn(Countdown(2), Countdown(3, cut=True))
    assert (env.num_envs, env.num_actions) == (2, 2)
    frames = env.reset()
    assert frames.shape == (2, 2, 2, 3)
    assert frames.dtype == np.uint8
    assert frames[:, 0, 0, 0].tolist() == [10, 10]
    shown, terminated, truncated, rewards, games = [], [], [], [], []
    for _ in range(4):
        step = env.step(np.array([0, 1]))
        shown.append(step.frames[:, 0, 0, 0].tolist())
        terminated.append(step.terminated.tolist())
        truncated.append(step.truncated.tolist())
        rewards.append(step.rewards.tolist())
        games.append(step.game_returns)
    assert shown == [[11, 11], [20, 12], [21, 20], [30, 21]]
    assert terminated == [[False, False], [True, False], [False, False], [True, False]]
    assert truncated == [[False, False], [False, False], [False, True], [False, False]]
    assert rewards == [[1, 1], [2, 2], [1, 3], [2, 1]]
    assert step.rewards.dtype == np.float32
    assert games == [[], [GameReturn(0, 3.0, 2)], [GameReturn(1, 6.0, 3)], [GameReturn(0, 3.0, 2)]]


def test_a_game_may_draw_all_its_frames_into_one_array() -> None:
    class Thrifty(Countdown):
        frame = np.zeros((2, 2, 3), np.uint8)

        def _answer(self) -> tuple[np.ndarray, dict[str, Any]]:
            self.frame[:], info = super()._answer()
            return self.frame, info

    envs, plain = in_turn(Thrifty(2), Thrifty(3)), in_turn(Countdown(2), Countdown(3))
    assert (envs.reset() == plain.reset()).all()
    for _ in range(4):
        step, wanted = envs.step([0, 0]), plain.step([0, 0])
        assert (step.frames == wanted.frames).all()
        assert {index: frame.max() for index, frame in step.last_frames.items()} == {
            index: frame.max() for index, frame in wanted.last_frames.items()
        }


def test_a_game_counts_all_lives_and_the_no_op_between_them() -> None:
    # A life goes at step 2; the no-op that begins the next episode is the game's step 3.
    env = in_turn(LifeLossEndsEpisode(Countdown(5, lives=[3, 3, 2, 2, 2, 2])))
    env.reset()
    steps = [env.step([0]) for _ in range(4)]
    assert [bool(step.terminated[0]) for step in steps] == [False, True, False, True]
    assert [step.rewards[0] for step in steps] == [1, 2, 4, 5]
    assert [step.game_returns for step in steps] == [[], [], [], [GameReturn(0, 15.0, 4)]]
    assert steps[1].frames[0, 0, 0, 0] == 13
    assert steps[3].frames[0, 0, 0, 0] == 20
    assert env.step([0]).game_returns == []
    assert env.open_games() == [GameReturn(0, 1.0, 1)]


def test_a_game_that_ends_in_that_no_op_is_reported() -> None:
    env = in_turn(LifeLossEndsEpisode(Countdown(3, lives=[3, 3, 2, 2])))
    env.reset()
    assert env.step([0]).game_returns == []
    step = env.step([0])
    assert step.terminated[0]
    assert step.game_returns == [GameReturn(0, 6.0, 2)]
    assert step.frames[0, 0, 0, 0] == 20
    assert env.open_games() == [GameReturn(0, 0.0, 0)]


def test_a_truncation_from_outside_ends_the_game() -> None:
    env = in_turn(TimeLimit(LifeLossEndsEpisode(Countdown(9, lives=[3] * 10)), 2))
    env.reset()
    env.step([0])
    step = env.step([0])
    assert step.truncated[0]
    assert step.game_returns == [GameReturn(0, 3.0, 2)]


def test_seeds_differ_between_environments_repeat_with_the_seed_and_are_used_once() -> None:
    def seeds_of(seed: int) -> list[int]:
        envs: list[Countdown] = []

        def make() -> Countdown:
            envs.append(Countdown(1))
            return envs[-1]

        vector = VectorEnv(make, 64, seed=seed)
        vector.reset()
        vector.step([0] * 64)
        vector.reset()
        assert all(env.seeds[1:] == [None, None] for env in envs)
        return [env.seeds[0] for env in envs]

    assert len(set(seeds_of(0))) == 64
    assert seeds_of(0) == seeds_of(0)
    assert not set(seeds_of(0)) & set(seeds_of(1))


def test_reset_gives_up_games_under_way() -> None:
    env = in_turn(Countdown(3))
    env.reset()
    env.step([0])
    env.step([0])
    assert env.reset()[0, 0, 0, 0] == 20
    assert [env.step([0]).game_returns for _ in range(3)] == [[], [], [GameReturn(0, 6.0, 3)]]


def test_close_closes_every_environment() -> None:
    closed: list[int] = []

    class Closing(Countdown):
        def close(self) -> None:
            closed.append(1)

    in_turn(Closing(1), Closing(1)).close()
    assert closed == [1, 1]


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_envs is 0"):
        VectorEnv(Catch, 0, seed=0)
    env = VectorEnv(Catch, 2, seed=0)
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.step([0, 0])
    env.reset()
    with pytest.raises(ValueError, match="3 actions for 2 environments"):
        env.step([0, 0, 0])


def test_a_game_of_breakout_has_five_lives_and_one_return() -> None:
    make = partial(make_env, EnvConfig(game="Breakout"), training=True)
    env = VectorEnv(make, 1, seed=0)
    env.reset()
    rng = np.random.default_rng(0)
    total, lives, steps, games = 0.0, 0, 0, []
    while not games:
        step = env.step(rng.integers(4, size=1))
        steps += 1
        total += float(step.rewards[0])
        lives += int(step.terminated[0])
        games = step.game_returns
    assert lives == 5
    assert total > 0
    assert games == [GameReturn(0, total, steps)]
