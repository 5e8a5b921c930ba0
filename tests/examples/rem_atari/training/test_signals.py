"""SIGTERM and SIGINT: the step is finished and everything saved; a second one ends the run at once."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from short_runs import SHORT, Point, SpyProgress, fingerprint, newest, run_part

from rem_atari.cli import main
from rem_atari.replay.buffer import Replay
from rem_atari.runs import progress as progress_module
from rem_atari.runs.metrics import read_metrics
from rem_atari.training import signals as signals_module
from rem_atari.training.component import Component
from rem_atari.training.signals import StopRequest

LIMIT = ["--tokenizer.freeze-foreground-error", "10.0"]
"""What SHORT has and the preset debug has not."""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what it runs in the background with SIGINT ignored; the tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_part(folder)
    return folder


def signal_at(monkeypatch: pytest.MonkeyPatch, point: Point, number: int) -> None:
    """Let the process signal itself in the step that takes the run to `point`."""
    advance = SpyProgress.advance
    spies: list[SpyProgress] = []

    def make(plan: object, epochs: int, stream: object) -> SpyProgress:
        spies.append(SpyProgress(SHORT, stream))
        return spies[-1]

    def advance_and_signal(progress: SpyProgress, units: int = 1) -> None:
        before = progress.point
        if before[:2] == point[:2] and before.done < point.done <= before.done + units:
            os.kill(os.getpid(), number)
        advance(progress, units)

    monkeypatch.setattr(SpyProgress, "advance", advance_and_signal)
    monkeypatch.setattr(progress_module, "make_progress", make)


@pytest.mark.parametrize(
    ("point", "number"),
    [
        (Point(0, "random", 2), signal.SIGTERM),
        (Point(0, "collect_random", 10), signal.SIGINT),
        (Point(0, "collect", 10), signal.SIGTERM),
        (Point(1, "collect", 10), signal.SIGINT),
        (Point(0, "tokenizer", 2), signal.SIGTERM),
        (Point(0, "world_model", 2), signal.SIGINT),
        (Point(0, "controller", 1), signal.SIGTERM),
        (Point(0, "evaluate", 2), signal.SIGINT),
    ],
)
def test_a_signal_in_any_phase_finishes_the_step_saves_and_exits_with_3(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    point: Point,
    number: signal.Signals,
) -> None:
    run = tmp_path / "run"
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_at(patch, point, number)
        assert main(["train", "--preset", "debug", *LIMIT, "--run", str(run)]) == 3
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"saved; `rem-atari resume {run}` goes on",
        f"rem-atari: stopped by {number.name}",
    ]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    state = newest(run).state
    assert (state["epoch"], state["phase"]) == point[:2]
    check_interrupted_line(run, point)
    assert not run_part(run, resume=True).stopped
    assert fingerprint(run) == fingerprint(whole)


def check_interrupted_line(run: Path, point: Point) -> None:
    """What was done of the phase has a line of metrics, so that no step is missing from them."""
    last = read_metrics(run / "metrics.jsonl")[-1:]
    if point.phase in ("random", "evaluate"):  # an evaluation begins anew
        assert not any(line.get("interrupted") for line in last)
        return
    (line,) = last
    assert (line["epoch"], line["phase"], line["interrupted"]) == (point.epoch, point.phase, 1)
    assert line["steps" if point.phase.startswith("collect") else "updates"] == point.done
    assert line["env_steps"] == Replay.load(run / "replay").num_steps == newest(run).state["env_steps"]


def test_outside_of_training_nothing_is_held_back() -> None:
    with StopRequest():
        pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_is_not_held_back() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_ends_a_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of an update: it is not finished, and nothing is saved."""
    apply = Component.apply

    def interrupt_twice(component: Component, *arguments: object) -> object:
        if component.name == "world_model":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")
        return apply(component, *arguments)

    monkeypatch.setattr(Component, "apply", interrupt_twice)
    run = tmp_path / "run"
    assert main(["train", "--preset", "debug", "--run", str(run)]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "rem-atari: stopped by SIGINT"
    assert not (run / "checkpoints").exists()


def test_a_run_in_parts_of_so_many_seconds_ends_as_one_that_never_stopped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock moves a second with every look at it, so that a part is a few steps long."""
    run, parts = tmp_path / "0", 1
    ticks = itertools.count()
    monkeypatch.setattr(signals_module, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    code = main(["train", "--preset", "debug", *LIMIT, "--run", str(run), "--stop-after", "30"])
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"saved; `rem-atari resume {run}` goes on",
        "rem-atari: stopped after 30 seconds, as --stop-after asked",
    ]
    while code == 3:
        run = run.rename(tmp_path / str(parts))
        code = main(["resume", str(run), "--stop-after", "30"])
        parts += 1
    assert code == 0
    assert parts > 2
    assert (run / "report.html").is_file()
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    words = ["train", "--preset", "debug", "--run", str(tmp_path / "run"), f"--stop-after={seconds}"]
    assert main(words) == 2
    assert "wanted more than 0 seconds" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [False, True])
def test_a_process_that_is_told_to_stop_does_within_30_seconds(
    tmp_path: Path, number: signal.Signals, processes: bool
) -> None:
    """At the size of a real run, its environments in processes of their own too."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rem_atari", "train", "--preset", "tiny", "--run", str(run)]
    command += ["--env.processes" if processes else "--env.no-processes"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "collect random" in line:
                break
        process.send_signal(number)
        told = time.monotonic()
        rest = process.stderr.read()
        assert process.wait() == 3, rest
        assert time.monotonic() - told < 30
    assert rest.splitlines()[-1] == f"rem-atari: stopped by {number.name}"
    assert newest(run).state["env_steps"] >= 1000
