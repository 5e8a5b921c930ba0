"""Saving environments: what goes on from a saved state, in JSON and back, plays as the one that was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import gymnasium
import numpy as np
import pytest

from rem_atari.config import EnvConfig
from rem_atari.envs import make_env
from rem_atari.envs.env_state import load_env, random_state, save_env, set_random_state

BREAKOUT = EnvConfig(game="Breakout", frame_size=16, noop_max=5)
CATCH = EnvConfig(id="rem_atari/Catch-v0", frame_size=24, max_raw_frames=7)
RESIZED = EnvConfig(id="rem_atari/Catch-v0", frame_size=16)

MAKERS = {
    "Atari, training": partial(make_env, BREAKOUT, training=True),
    "Atari, evaluation": partial(make_env, BREAKOUT, training=False),
    "Catch, cut short after 7 steps": partial(make_env, CATCH, training=True),
    "resized": partial(make_env, RESIZED, training=True),
}


def play(env: gymnasium.Env, actions: np.ndarray, trace: list | None = None) -> list:
    """Step and reset as a VectorEnv does; everything that came back."""
    trace = [] if trace is None else trace
    for action in actions:
        frame, reward, terminated, truncated, info = env.step(int(action))
        trace.append((frame.tobytes(), reward, terminated, truncated, info))
        if terminated or truncated:
            frame, info = env.reset()
            trace.append((frame.tobytes(), info))
    return trace


@pytest.mark.parametrize("name", MAKERS)
def test_a_game_goes_on_from_any_moment(name: str) -> None:
    """Also where the last life has just been lost and the next episode is a reset away."""
    make = MAKERS[name]
    env = make()
    draws = np.random.default_rng(0)
    env.reset(seed=3)
    for steps in (1, 40, 41):
        play(env, draws.integers(env.action_space.n, size=steps))
        state = json.loads(json.dumps(save_env(env)))
        other = make()
        load_env(other, state)
        actions = draws.integers(env.action_space.n, size=60)
        assert play(env, actions) == play(other, actions)


@pytest.mark.parametrize("name", ["Atari, training", "Catch, cut short after 7 steps"])
def test_a_state_between_an_end_and_the_reset_goes_on_too(name: str) -> None:
    env, other = MAKERS[name](), MAKERS[name]()
    env.reset(seed=3)
    draws = np.random.default_rng(0)
    over = False
    while not over:
        _, _, terminated, truncated, _ = env.step(int(draws.integers(env.action_space.n)))
        over = terminated or truncated
    load_env(other, save_env(env))
    for one, two in ((env.reset(), other.reset()), (env.step(1), other.step(1))):
        assert np.array_equal(one[0], two[0])
        assert one[1:] == two[1:]


def test_to_save_changes_nothing() -> None:
    env, other = MAKERS["Atari, training"](), MAKERS["Atari, training"]()
    env.reset(seed=0)
    other.reset(seed=0)
    actions = np.random.default_rng(0).integers(4, size=60)
    expected = play(other, actions)
    trace: list = []
    for action in actions:
        save_env(env)
        play(env, np.array([action]), trace)
    assert trace == expected


class Unknown(gymnasium.Wrapper):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: Unknown(make_env(CATCH, training=True)),
        lambda: gymnasium.wrappers.RecordEpisodeStatistics(make_env(CATCH, training=True)),
    ],
)
def test_an_environment_with_a_layer_that_nobody_knows_cannot_be_saved(
    make: Callable[[], gymnasium.Env],
) -> None:
    env = make()
    env.reset(seed=0)
    assert save_env(env) is None


def test_the_state_of_another_environment_is_refused() -> None:
    env = make_env(CATCH, training=True)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"the saved environment consists of .*'TimeLimit'"):
        load_env(make_env(BREAKOUT, training=True), save_env(env))


@pytest.mark.parametrize("snapshot", ["", "AAAA", "no base64", "A" * 2_000_000])
def test_a_snapshot_that_is_none_is_refused(snapshot: str) -> None:
    env = make_env(BREAKOUT, training=True)
    env.reset(seed=0)
    state = save_env(env)
    state["layers"][-1]["state"]["snapshot"] = snapshot
    with pytest.raises(ValueError, match=r"snapshot|base64|Incorrect padding"):
        load_env(make_env(BREAKOUT, training=True), state)


def test_random_numbers_go_on() -> None:
    env, other = make_env(CATCH, training=True).unwrapped, make_env(CATCH, training=True).unwrapped
    env.reset(seed=0)
    env.np_random.integers(10, size=3)
    set_random_state(other, random_state(env))
    assert env.np_random.integers(1000, size=9).tolist() == other.np_random.integers(1000, size=9).tolist()
