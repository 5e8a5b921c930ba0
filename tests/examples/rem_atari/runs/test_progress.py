"""What is shown of a run: the time left, plain lines for files, a bar for terminals."""

from __future__ import annotations

import io

import pytest

from rem_atari.runs.progress import BarProgress, LineProgress, TimeLeft, format_duration, make_progress
from rem_atari.training.schedule import Work

PLAN = [
    Work(0, "collect", 100, None),
    Work(0, "tokenizer", 50, None),
    Work(1, "collect", 100, None),
    Work(1, "tokenizer", 10, None),
    Work(1, "controller", 20, 30.0),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (83, "1:23"), (3600, "1:00:00"), (36_125, "10:02:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_time_left_adds_up_what_waits_at_the_pace_seen() -> None:
    left = TimeLeft(PLAN)
    left.begin(0, "collect")
    left.measure("collect", 100, 10.0)
    # 10 s for the other collection and at most 30 s for the controller; the tokenizer's pace is unknown.
    assert left.describe("collect", 0) == "at least 0:40 left"
    left.begin(0, "tokenizer")
    left.measure("tokenizer", 10, 20.0)
    # 40 of its own updates, 10 later ones, 2 s each; then as above.
    assert left.describe("tokenizer", 40) == "about 2:20 left"


def test_a_measured_pace_counts_only_up_to_the_bound() -> None:
    left = TimeLeft(PLAN)
    for phase in ("collect", "tokenizer"):
        left.drop(phase)
    left.measure("controller", 1, 1.0)
    assert left.describe("controller", 0) == "about 0:20 left"
    left.measure("controller", 1, 100.0)
    assert left.describe("controller", 0) == "about 0:30 left"


def test_work_that_was_passed_over_does_not_wait_any_more() -> None:
    left = TimeLeft(PLAN)
    left.begin(1, "controller")
    left.measure("controller", 4, 4.0)
    assert left.describe("controller", 5) == "about 0:05 left"


def test_a_file_gets_one_plain_line_for_each_phase() -> None:
    stream = io.StringIO()
    with make_progress(PLAN, 2, stream) as progress:
        assert isinstance(progress, LineProgress)
        with progress.phase(0, "collect", 100):
            progress.advance(60)
            progress.advance(40)
        with progress.phase(0, "tokenizer", 50):
            progress.advance()
        progress.say("hello")
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("epoch 1/2  collect: 100 steps in 0:00 (")
    assert " steps/s), at least 0:" in first
    assert second.startswith("epoch 1/2  tokenizer: 1 updates in ")
    assert third == "hello"
    assert "\x1b" not in stream.getvalue()


def test_a_file_gets_further_lines_while_a_phase_goes_on() -> None:
    stream = io.StringIO()
    with make_progress(PLAN, 2, stream) as progress:
        progress.refresh_seconds = 0.0  # a minute has passed
        with progress.phase(0, "tokenizer", 50):
            progress.advance(10)
            progress.refresh_seconds = 60.0
            progress.advance(40)
    going_on, finished = stream.getvalue().splitlines()
    assert going_on.startswith("epoch 1/2  tokenizer: 10 of 50 updates (")
    assert going_on.endswith(" left")
    assert finished.startswith("epoch 1/2  tokenizer: 50 updates in 0:00 (")


def test_a_terminal_gets_a_bar_with_the_same_facts() -> None:
    stream = Terminal()
    with make_progress(PLAN, 2, stream) as progress:
        assert isinstance(progress, BarProgress)
        with progress.phase(1, "controller", 20):
            progress.advance(20)
        progress.say("[bold]hello")
    shown = stream.getvalue()
    assert "epoch 2/2  controller" in shown
    assert "20/20" in shown
    assert "updates/s" in shown
    assert "left" in shown
    assert "[bold]hello" in shown


def test_a_phase_that_fails_says_nothing_of_being_done() -> None:
    stream = io.StringIO()
    progress = make_progress(PLAN, 2, stream)
    with pytest.raises(KeyError), progress.phase(0, "collect", 100):
        raise KeyError
    assert stream.getvalue() == ""


def test_what_was_done_before_a_run_was_resumed_counts_but_not_for_the_rate() -> None:
    stream = io.StringIO()
    with make_progress(PLAN, 2, stream) as progress:
        with progress.phase(0, "collect", 100, done=90):
            progress.advance(10)
        assert progress.time_left.pace["collect"] > 0
        seconds = progress.time_left.pace["collect"] * 10
        line = stream.getvalue()
        assert "collect: 100 steps in " in line
        assert f" ({10 / seconds:.1f} steps/s), " in line
