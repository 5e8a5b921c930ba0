"""Offline training: recorded episodes become the replay, and nothing else does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from short_runs import SHORT, Point, fingerprint, run_part

import rem_atari.envs  # noqa: F401 (registers Catch)
from rem_atari.cli import main
from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.parsing import parse_arguments
from rem_atari.replay.buffer import Replay
from rem_atari.replay.recorded import count_recorded, read_recorded
from rem_atari.runs.metrics import read_metrics

EPISODES = 12
STEPS = 5 * EPISODES
"""A game of Catch has five steps."""


def play(seed: int) -> dict[str, np.ndarray]:
    """A random game, as Minari records it: one more observation than actions."""
    env = gymnasium.make("rem_atari/Catch-v0")
    env.action_space.seed(seed)
    observations, actions, rewards, is_over = [env.reset(seed=seed)[0]], [], [], False
    while not is_over:
        actions.append(env.action_space.sample())
        frame, reward, is_over, _, _ = env.step(actions[-1])
        observations.append(frame)
        rewards.append(reward)
    ends = np.zeros(len(actions), dtype=bool)
    ends[-1] = True
    return {
        "observations": np.stack(observations),
        "actions": np.array(actions),
        "rewards": np.array(rewards),
        "terminations": ends,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    for seed in range(EPISODES):
        np.savez_compressed(folder / f"episode-{seed:03d}.npz", **play(seed))
    return folder


def offline(folder: Path) -> Config:
    return replace(SHORT, schedule=replace(SHORT.schedule, recorded=str(folder)))


def test_episodes_are_read_as_they_were_recorded(folder: Path) -> None:
    assert count_recorded(str(folder)) == STEPS
    read = list(read_recorded(str(folder), frame_size=24, num_actions=3))
    for seed, episode in enumerate(read):
        wanted = play(seed)
        assert np.array_equal(episode.frames, wanted["observations"][:-1])
        assert episode.actions.tolist() == wanted["actions"].tolist()
        assert episode.rewards.tolist() == wanted["rewards"].tolist()
        assert episode.terminated
    (small, *_) = read_recorded(str(folder), frame_size=16, num_actions=3)
    assert small.frames.shape == (5, 16, 16, 3)


def test_a_run_trains_on_them_alone_and_goes_on_without_the_files(folder: Path, tmp_path: Path) -> None:
    run_part(tmp_path / "whole", offline(folder))
    replay = Replay.load(tmp_path / "whole" / "replay")
    assert (replay.num_steps, replay.num_episodes) == (STEPS, EPISODES)
    stored = replay.stored_frames(0).numpy()
    assert np.array_equal(stored, np.concatenate([play(seed)["observations"][:-1] for seed in range(12)]))
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    phases = [line["phase"] for line in lines]
    assert phases.count("collect_random") == 1
    assert "collect" not in phases
    (first,) = (line for line in lines if line["phase"] == "collect_random")
    assert (first["steps"], first["episodes"], first["largest_reward"]) == (STEPS, EPISODES, 1.0)
    assert {"tokenizer", "world_model", "controller", "evaluate"} <= set(phases)

    copy = shutil.copytree(folder, tmp_path / "copy")
    config = offline(copy)
    run_part(tmp_path / "parts", config, until=Point(1, "world_model", 1))
    shutil.rmtree(copy)
    run_part(tmp_path / "parts", config, resume=True)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": np.array([0, 1, 2, 3, 0])}, "actions from 0 to 3; the game has 3"),
        ({"actions": np.zeros(5)}, "actions float64"),
        ({"rewards": np.zeros(4)}, r"rewards float64 \(4,\)"),
        ({"rewards": np.full(5, np.nan)}, "not finite"),
        ({"terminations": np.array([True, False, False, False, True])}, "goes on after its end"),
        ({"observations": np.zeros((5, 7), np.uint8)}, r"observations uint8 \(5, 7\)"),
        ({"observations": np.zeros((5, 8, 8, 3))}, "wanted an image, uint8"),
        ({"actions": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_a_wrong_episode_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **(play(0) | change))
    with pytest.raises(UsageError, match=f"bad.npz.*{words}"):
        list(read_recorded(str(tmp_path), frame_size=24, num_actions=3))


def test_it_is_refused_before_a_folder_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    words = ["train", "--preset", "debug", "--run", str(tmp_path / "run")]
    for recorded, answer in (
        (str(tmp_path / "empty"), "holds no recorded episodes"),
        ("minari:nobody/has-this-v0", "minari"),
    ):
        assert main([*words, "--schedule.recorded", recorded]) == 2
        assert answer in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_folder_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def recorded(name: str) -> str | None:
        return parse_arguments(["train", "--schedule.recorded", name]).config.schedule.recorded

    assert recorded("episodes") == str(tmp_path / "episodes")
    assert recorded("minari:catch/random-v0") == "minari:catch/random-v0"


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_minari_is_read_by_the_same_rules(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari", reason="minari is not installed (extra `interplay`)")
    pytest.importorskip("h5py", reason="h5py is not installed (extra `interplay`)")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    make_buffer: Callable[..., Any] = minari.data_collector.EpisodeBuffer
    games = [play(seed) for seed in range(3)]
    minari.create_dataset_from_buffers(
        "catch/random-v0",
        [
            make_buffer(
                **{name: list(column) for name, column in game.items()},
                truncations=[False] * len(game["actions"]),
            )
            for game in games
        ],
        observation_space=gymnasium.spaces.Box(0, 255, (24, 24, 3), np.uint8),
        action_space=gymnasium.spaces.Discrete(3),
        data_format="hdf5",
        jpeg_encoding=False,
    )
    assert count_recorded("minari:catch/random-v0") == 15
    read = list(read_recorded("minari:catch/random-v0", frame_size=24, num_actions=3))
    for episode, game in zip(read, games, strict=True):
        assert np.array_equal(episode.frames, game["observations"][:-1])
        assert episode.actions.tolist() == game["actions"].tolist()
        assert episode.rewards.tolist() == game["rewards"].tolist()
        assert episode.terminated
