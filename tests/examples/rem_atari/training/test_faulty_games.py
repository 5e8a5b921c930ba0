"""A run whose game misbehaves: it stops with a checkpoint and says why, and goes on with a mended game."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from rem_atari.cli import main
from rem_atari.envs.catch import Catch
from rem_atari.replay.buffer import Replay
from rem_atari.runs import checkpoint as checkpoint_module
from rem_atari.runs.checkpoint import load_checkpoint
from rem_atari.runs.metrics import read_metrics

FAULTS: dict[str, Any] = {}
"""What the game does now: "reset", an exception its resets raise; "reward", what its fourth step gives."""


class Faulty(Catch):
    """Catch, until it is told otherwise."""

    def reset(self, **options: Any) -> Any:
        if "reset" in FAULTS:
            raise FAULTS["reset"]
        return super().reset(**options)

    def step(self, action: int) -> Any:
        frame, reward, *rest = super().step(action)
        return frame, FAULTS.get("reward", reward) if self._ball_row == 4 else reward, *rest

    def close(self) -> None:
        if "close" in FAULTS:
            raise FAULTS["close"]


@pytest.fixture(autouse=True)
def faulty() -> Iterator[None]:
    gymnasium.register("Faulty-v0", entry_point=Faulty)
    FAULTS.clear()
    yield
    del gymnasium.registry["Faulty-v0"]


def train(run: Path, *words: str) -> int:
    few = ["--schedule.epochs", "1", "--evaluation.random-episodes", "0"]
    return main(["train", "--preset", "debug", "--env.id", "Faulty-v0", *few, "--run", str(run), *words])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("without_report")
def test_a_reward_that_is_not_finite_stops_the_run_before_it_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAULTS["reward"] = float("nan")
    run = tmp_path / "run"
    assert train(run) == 1
    told = "rem-atari: Faulty-v0: step() gave the reward nan; wanted a finite number, at most 3.4e+38"
    assert last_line(capsys) == told
    assert load_checkpoint(run / "checkpoints").state["env_steps"] == 2 * 3
    assert Replay.load(run / "replay").num_steps == 2 * 3
    FAULTS.clear()
    assert main(["resume", str(run)]) == 0
    assert "could not be saved: it starts anew" in capsys.readouterr().err


@pytest.mark.parametrize("error", [FileNotFoundError("the ROM is missing"), SystemExit("no licence")])
def test_a_first_reset_that_raises_is_what_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    FAULTS["reset"] = error
    assert train(tmp_path / "run") == 1
    assert last_line(capsys).endswith(f"the last time it raised {type(error).__name__}: {error}")


def test_a_save_that_fails_is_told_after_what_it_was_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS["reward"] = float("nan")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint_module, "write_durably", fail)
    assert train(tmp_path / "run") == 1
    last = last_line(capsys)
    assert last.startswith("rem-atari: Faulty-v0: step() gave the reward nan; wanted a finite number")
    assert "and no checkpoint could be saved: cannot write model.safetensors: No space left" in last


@pytest.mark.usefixtures("without_report")
def test_a_game_that_cannot_be_closed_fails_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAULTS["close"] = OSError("the window is gone")
    assert train(tmp_path / "run") == 0
    told = "rem-atari: warning: Faulty-v0 cannot be closed: it raised OSError: the window is gone"
    said = capsys.readouterr().err
    assert told in said.splitlines()
    assert "the signs of rewards" not in said, "rewards of -1, 0 and +1 are nothing to warn of"


def test_a_module_that_leaves_the_program_when_imported_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving_game.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert train(tmp_path / "run", "--env.id", "leaving_game:Game-v0") == 2
    assert last_line(capsys).endswith("leaving_game:Game-v0 cannot be made: it raised SystemExit: 0")
    assert "leaving_game" not in sys.modules


def test_rewards_that_are_no_signs_are_told_of_as_soon_as_they_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAULTS["reward"] = 5.0
    run = tmp_path / "run"
    assert train(run) == 0
    said = capsys.readouterr().err.splitlines()
    told = [number for number, line in enumerate(said) if "the game gives a reward of size 5, and" in line]
    assert len(told) == 1
    assert told[0] < next(number for number, line in enumerate(said) if "collect random:" in line)
    lines = read_metrics(run / "metrics.jsonl")
    sizes = [(line["smallest_reward"], line["largest_reward"]) for line in lines if "largest_reward" in line]
    assert sizes[0] == (1.0, 5.0), "a ball that lands pays what it always did"
    page = (run / "report.html").read_text()
    assert "rewards are from 1 to 5 in size" in page.replace("1.00", "1").replace("5.00", "5")
    assert "reward +5" in page, "in the films of what really happened"
    assert "Rewards of different sizes" in page


def test_nobody_is_told_of_sizes_that_are_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAULTS["reward"] = 5.0
    run = tmp_path / "run"
    assert train(run, "--world-model.reward-bins", "41") == 0
    assert "the game gives a reward" not in capsys.readouterr().err
    assert "learns only their signs" not in (run / "report.html").read_text()
