"""The dream behind gymnasium's interface: its checker, seeds, horizon, starts; many dreams in one pass."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from run_folders import add_replay, make_run

from rem_atari import DreamEnv, DreamVectorEnv, LoadedAgent, load_agent
from rem_atari.replay.starts import Starts


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> LoadedAgent:
    run = make_run(tmp_path_factory.mktemp("dream") / "run")
    add_replay(run, steps=40)
    return load_agent(run.path)


def play(env: gymnasium.Env, seed: int, steps: int = 6) -> list[bytes]:
    frames = [env.reset(seed=seed)[0]]
    frames += [env.step(step % 3)[0] for step in range(steps)]
    return [frame.tobytes() for frame in frames]


@pytest.mark.filterwarnings("ignore:.*render:UserWarning")
def test_gymnasium_finds_nothing_wrong(agent: LoadedAgent) -> None:
    check_env(DreamEnv(agent, render_mode="rgb_array"))


def test_seeds_reproduce_it(agent: LoadedAgent) -> None:
    env = DreamEnv(agent)
    assert play(env, 1) == play(DreamEnv(agent), 1) == play(env, 1) != play(env, 2)


def test_it_begins_where_it_is_told_and_can_be_rewound(agent: LoadedAgent) -> None:
    env = DreamEnv(agent, render_mode="rgb_array")
    assert env.render() is None
    frame, info = env.reset(seed=0, options={"start": 4})
    assert info == {"start": 4}
    wanted = agent.decode(agent.encode(agent.starts.frames[4, -1]))
    assert np.array_equal(frame, wanted)
    assert np.array_equal(env.render(), wanted)
    kept = env.dream
    first = [env.step(1)[0] for _ in range(3)]
    env.dream = kept
    assert np.array_equal(first, [env.step(1)[0] for _ in range(3)])
    assert env.get_action_meanings() == ["LEFT", "STAY", "RIGHT"]
    with pytest.raises(ValueError, match=r"options\['start'\] is 1000"):
        env.reset(options={"start": 1000})


def test_the_horizon_truncates(agent: LoadedAgent) -> None:
    env = DreamEnv(agent, horizon=3, starts=Starts.at(agent.starts.frames[:2, -1]))
    for _ in range(2):
        env.reset(seed=0)
        assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


def test_many_dreams_are_as_each_alone(agent: LoadedAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0 nothing but the start decides, and the starts are drawn in a known order."""
    envs = DreamVectorEnv(agent, 3, horizon=2, temperature=0)
    frames, _ = envs.reset(seed=7)
    chosen = np.random.default_rng(7)
    numbers = chosen.integers(len(agent.starts), size=3)
    single = DreamEnv(agent, horizon=2, temperature=0)
    passes = []
    imagine = agent.networks.world_model.imagine
    monkeypatch.setattr(
        agent.networks.world_model, "imagine", lambda *a, **k: passes.append(1) or imagine(*a, **k)
    )
    steps = [envs.step(np.array([0, 1, 2])) for _ in range(2)]
    assert len(passes) == 2, "one pass a step"
    for row, number in enumerate(numbers):
        first, _ = single.reset(options={"start": int(number)})
        assert np.array_equal(first, frames[row])
        for seen, rewards, ended, truncated, _ in steps:
            frame, reward, is_over, is_cut, _ = single.step(row)
            assert np.array_equal(frame, seen[row])
            assert (reward, is_over, is_cut) == (rewards[row], ended[row], truncated[row])
            if is_over:
                break


def test_a_finished_dream_begins_anew_with_the_next_step(agent: LoadedAgent) -> None:
    envs = DreamVectorEnv(agent, 2, horizon=2)
    assert isinstance(envs, gymnasium.vector.VectorEnv)
    envs.reset(seed=0)
    ages = [0, 0]
    for _ in range(7):
        before = ages
        frames, rewards, ended, truncated, _ = envs.step(envs.action_space.sample())
        assert frames in envs.observation_space
        over = [age is None for age in before]
        assert all(reward == 0 for reward, begins in zip(rewards, over, strict=True) if begins)
        assert not (ended | truncated)[over].any()
        ages = [0 if age is None else age + 1 for age in before]
        assert truncated.tolist() == [age == 2 for age in ages]
        ages = [None if end or cut else age for age, end, cut in zip(ages, ended, truncated, strict=True)]


def test_the_same_seed_gives_the_same_dreams_side_by_side(agent: LoadedAgent) -> None:
    def rewards_and_frames(seed: int) -> list[bytes]:
        envs = DreamVectorEnv(agent, 2, horizon=3)
        envs.reset(seed=seed)
        steps = [envs.step(np.array([1, 2])) for _ in range(5)]
        return [step[0].tobytes() + step[1].tobytes() for step in steps]

    assert rewards_and_frames(0) == rewards_and_frames(0) != rewards_and_frames(1)


def test_wrong_arguments_are_named(agent: LoadedAgent, tmp_path: Path) -> None:
    for make, words in (
        (lambda: DreamEnv(agent, horizon=0), "horizon is 0"),
        (lambda: DreamEnv(agent, horizon=float("nan")), "horizon is nan"),
        (lambda: DreamEnv(agent, temperature=-1), "temperature is -1"),
        (lambda: DreamEnv(agent, temperature="1"), "temperature is '1'"),
        (lambda: DreamEnv(agent, starts=Starts.at(np.zeros((1, 8, 8, 3), np.uint8))), r"are \(8, 8, 3\)"),
        (lambda: DreamEnv(agent, render_mode="human"), "render_mode is 'human'"),
        (lambda: DreamEnv(agent, starts=agent.starts.select([])), "starts is empty"),
        (lambda: DreamEnv(tmp_path / "nothing"), "there is no agent"),
        (lambda: DreamVectorEnv(agent, 0), "num_envs is 0"),
        (lambda: DreamVectorEnv(agent, 1.5), "num_envs is 1.5"),
        (lambda: DreamVectorEnv(agent, 1, horizon=-1), "horizon is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    for env in (DreamEnv(agent), DreamVectorEnv(agent, 2)):
        with pytest.raises(RuntimeError, match="before the first reset"):
            env.step(0)
    with pytest.raises(TypeError, match="starts is a int; wanted Starts"):
        DreamEnv(agent, starts=3)
    env = DreamEnv(agent)
    env.reset()
    with pytest.raises(ValueError, match="action is 3"):
        env.step(3)
