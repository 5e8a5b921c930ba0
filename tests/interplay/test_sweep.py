"""`rem-atari sweep` on local Ray: runs like those made by hand, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("ray", reason="ray is not installed (extra `sweep`)")

from short_runs import fingerprint

from rem_atari.arguments import SweepArguments, TrainArguments
from rem_atari.commands.sweep import sweep
from rem_atari.commands.train import train
from rem_atari.config.presets import CATCH_ID, PRESETS
from rem_atari.errors import RunError
from rem_atari.runs.folder import LOCK_FILE, hold_run_folder
from rem_atari.runs.session import read_sessions

DEBUG = PRESETS["debug"]
SECONDS = 600
NAME = "rem_atari_Catch_v0"


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen in {SECONDS} s"
        time.sleep(0.02)


def kill_the_run(path: Path, delay: float) -> None:
    """Kill the process that trains in a folder, some time after its first measurements."""
    wait_until(lambda: (path / "metrics.jsonl").is_file() and (path / "metrics.jsonl").stat().st_size > 0)
    time.sleep(delay)
    os.kill(json.loads((path / LOCK_FILE).read_text())["pid"], signal.SIGKILL)


def assert_as_by_hand(path: Path, seed: int) -> None:
    by_hand = path.with_name(f"by-hand-{seed}")
    train(TrainArguments(config=replace(DEBUG, seed=seed), run=by_hand))
    assert fingerprint(path) == fingerprint(by_hand)


def commands_of(path: Path) -> list[str]:
    return [session["command"] for session in read_sessions(path / "sessions.jsonl")]


def test_a_killed_run_is_resumed_and_a_failing_one_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = SweepArguments(
        config=DEBUG, games=(CATCH_ID, "rem_atari/Nothing-v0"), seeds=(3,), out=tmp_path, cpus=0.5
    )
    path = tmp_path / f"{NAME}-3"
    killer = Thread(target=kill_the_run, args=(path, random.Random(0).uniform(0, 0.2)), daemon=True)
    killer.start()
    with pytest.raises(RunError, match=r"1 of 2 runs failed: rem_atari_Nothing_v0-3: .*Nothing"):
        sweep(arguments)
    killer.join()
    assert commands_of(path) in (["train", "resume"], ["train", "train"])  # or killed before a checkpoint
    assert f"{NAME}-3: done" in capsys.readouterr().err
    assert_as_by_hand(path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_stopped_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    words = f"-m rem_atari sweep --preset debug --seeds 0 1 --schedule.epochs 6 --out {tmp_path}".split()
    first = subprocess.Popen([sys.executable, *words], start_new_session=True)
    paths = [tmp_path / f"{NAME}-{seed}" for seed in (0, 1)]
    wait_until(lambda: all((path / "checkpoints").is_dir() for path in paths))
    first.send_signal(number)
    assert first.wait(SECONDS) == (-signal.SIGKILL if number == signal.SIGKILL else 3)
    wait_until(lambda: all(is_free(path) for path in paths))
    assert subprocess.run([sys.executable, *words], check=False).returncode == 0
    for path in paths:
        assert commands_of(path) == ["train", "resume"]
        by_hand = path.with_name(f"by-hand-{path.name[-1]}")
        config = replace(DEBUG, seed=int(path.name[-1]), schedule=replace(DEBUG.schedule, epochs=6))
        train(TrainArguments(config=config, run=by_hand))
        assert fingerprint(path) == fingerprint(by_hand)


def is_free(path: Path) -> bool:
    """Whether nobody trains in a folder."""
    try:
        with hold_run_folder(path):
            return True
    except RunError:
        return False
