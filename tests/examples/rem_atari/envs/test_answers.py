"""What crosses the boundary: answers that no environment may give stop the run, and everybody knows why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from rem_atari.config import EnvConfig
from rem_atari.envs import make_env
from rem_atari.envs.vector import VectorEnv
from rem_atari.errors import EnvironmentAnswerError

BLACK = np.zeros((8, 8, 3), np.uint8)


class Game(gymnasium.Env):
    """A game that never ends, always with one picture; `reset_with` and `step_with` change that."""

    observation_space, action_space = Box(0, 255, (8, 8, 3), np.uint8), Discrete(2)

    def __init__(
        self,
        reset_with: Callable[..., Any] | None = None,
        step_with: Callable[..., Any] | None = None,
        good_steps: int = 0,
    ) -> None:
        self.reset_with, self.step_with, self.good_steps = reset_with, step_with, good_steps
        self.seeds: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.seeds.append(seed)
        return (BLACK, {}) if self.reset_with is None else self.reset_with()

    def step(self, action: int) -> Any:
        self.good_steps -= 1
        if self.step_with is None or self.good_steps >= 0:
            return BLACK, 0.0, False, False, {}
        return self.step_with()


def answer(*, frame: Any = BLACK, reward: Any = 0.0, terminated: Any = False) -> Any:
    return frame, reward, terminated, False, {}


ODD_STEPS: dict[str, tuple[Callable[[], Any], str]] = {
    "nan": (partial(answer, reward=float("nan")), "the reward nan; wanted a finite number"),
    "infinite": (partial(answer, reward=-np.inf), "the reward -inf; wanted a finite number"),
    "infinite as float32": (partial(answer, reward=1e39), r"the reward 1e\+39; wanted a finite number"),
    "no reward": (partial(answer, reward=None), "the reward NoneType None; wanted one number"),
    "text": (partial(answer, reward="1"), "the reward str '1'; wanted one number"),
    "two rewards": (partial(answer, reward=np.ones(2)), r"the reward an array float64 \(2,\)"),
    "no end": (partial(answer, terminated=None), "NoneType None for terminated; wanted True or False"),
    "old step": (lambda: (BLACK, 0.0, False, {}), r"a tuple of 4 \(ndarray, float, bool, dict\); wanted gym"),
    "nothing": (lambda: None, "NoneType None; wanted gymnasium's"),
    "list": (
        partial(answer, frame=BLACK.tolist()),
        r"is list \[\[\[0, .*wanted an array, uint8",
    ),
    "floats": (partial(answer, frame=BLACK / 255), r"an array float64 \(8, 8, 3\) from 0 to 0; wanted"),
    "too bright": (partial(answer, frame=BLACK.astype(int) + 999), r"int64 \(8, 8, 3\) from 999 to 999"),
    "another shape": (
        partial(answer, frame=BLACK[1:]),
        r"uint8 \(7, 8, 3\) .*wanted .*\(8, 8, 3\)",
    ),
}


@pytest.mark.parametrize("odd", ODD_STEPS)
def test_an_odd_step_is_refused_by_name(odd: str) -> None:
    step_with, message = ODD_STEPS[odd]
    envs = VectorEnv(partial(Game, step_with=step_with, good_steps=1), 2, seed=0)
    envs.reset()
    envs.step([0, 0])
    with pytest.raises(EnvironmentAnswerError, match=f"^Game: .*{message}"):
        envs.step([0, 0])
    assert envs.resume_states() == [None, None], "nobody knows where they stand"


@pytest.mark.parametrize(
    ("reset_with", "message"),
    [
        (lambda: BLACK, r"reset\(\) gave an array uint8 \(8, 8, 3\) from 0 to 0; wanted gymnasium's"),
        (lambda: (BLACK, 0), r"reset\(\) gave a tuple of 2 \(ndarray, int\)"),
        (lambda: (BLACK[..., 0], {}), r"the observation is an array uint8 \(8, 8\)"),
    ],
)
def test_an_odd_reset_is_refused_by_name(reset_with: Callable[[], Any], message: str) -> None:
    envs = VectorEnv(partial(Game, reset_with=reset_with), 2, seed=0)
    with pytest.raises(EnvironmentAnswerError, match=f"^Game: {message}"):
        envs.reset()


def test_an_answer_is_refused_from_another_process_too() -> None:
    make = partial(Game, step_with=partial(answer, reward=float("nan")))
    with closing(VectorEnv(make, 2, seed=0, processes=True, timeout=20.0)) as envs:
        envs.reset()
        with pytest.raises(EnvironmentAnswerError, match=r"Game: step\(\) gave the reward nan"):
            envs.step([0, 0])


@pytest.mark.parametrize("reward", [1, True, np.float16(1), np.int64(1), np.ones(1), np.ones(())])
def test_every_kind_of_one_number_is_a_reward(reward: Any) -> None:
    envs = VectorEnv(
        partial(Game, step_with=partial(answer, reward=reward, terminated=np.bool_(True))), 1, seed=0
    )
    envs.reset()
    step = envs.step([0])
    assert step.rewards.tolist() == [1.0]
    assert [game.raw_return for game in step.game_returns] == [1.0]


@pytest.mark.parametrize("max_episode_steps", [None, 5])
def test_an_old_game_is_named_by_its_id(max_episode_steps: int | None) -> None:
    """Below gymnasium's TimeLimit too, which would only say that there is not enough to unpack."""
    gymnasium.register(
        "answers/Old-v0",
        entry_point=Game,
        kwargs={"step_with": ODD_STEPS["old step"][0]},
        max_episode_steps=max_episode_steps,
    )
    try:
        env = make_env(EnvConfig(id="answers/Old-v0", frame_size=8), training=True)
        env.reset(seed=0)
        with pytest.raises(EnvironmentAnswerError, match=r"answers/Old-v0: step\(\) gave a tuple of 4"):
            env.step(0)
    finally:
        del gymnasium.registry["answers/Old-v0"]


@pytest.mark.parametrize("names", [lambda self: None, lambda self: 1 / 0])
def test_names_of_actions_that_are_none_are_refused_by_name(names: Callable[[Any], Any]) -> None:
    kind = type("Nameless", (Game,), {"get_action_meanings": names})
    with pytest.raises(
        EnvironmentAnswerError, match=r"Nameless: get_action_meanings\(\) does not give names"
    ):
        VectorEnv(kind, 1, seed=0)


def test_a_reset_without_a_seed_is_refused_at_once() -> None:
    class Older(Game):
        def reset(self) -> Any:
            return BLACK

    gymnasium.register("answers/Older-v0", entry_point=Older)
    try:
        with pytest.raises(ValueError, match=r"answers/Older-v0: its reset\(\) takes no seed and no options"):
            make_env(EnvConfig(id="answers/Older-v0", frame_size=8), training=True)
    finally:
        del gymnasium.registry["answers/Older-v0"]


def test_nothing_private_is_read_from_an_environments_info() -> None:
    """Levels that are won, told in the words that were once ours: returns are those of a plain loop."""

    class Level(Game):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            self.steps = 0
            return BLACK, {"game_over": True, "reset_reward": 100.0, "lives": 2}

        def step(self, action: int) -> Any:
            self.steps += 1
            return BLACK, 0.5, self.steps == 3, False, {"game_over": self.steps == 2, "lives": 1}

    envs = VectorEnv(Level, 2, seed=0)
    envs.reset()
    games = [game for _ in range(9) for game in envs.step([0, 0]).game_returns]
    assert [(game.raw_return, game.length) for game in games] == [(1.5, 3)] * 6


def test_seeds_fit_32_signed_bits() -> None:
    games: list[Game] = []

    def make() -> Game:
        games.append(Game())
        return games[-1]

    VectorEnv(make, 50, seed=3).reset()
    seeds = [game.seeds[0] for game in games]
    assert all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == 50
