"""Metrics: a line at a time, on the disk at once, and always JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rem_atari.errors import RunWarning
from rem_atari.report.history import read_lines
from rem_atari.runs.metrics import MetricsLog, read_metrics


def test_lines_are_there_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    log.write("tokenizer", epoch=3, env_steps=70, values={"loss": 0.5, "updates": 4})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    log.close()
    assert line.pop("seconds") >= 0
    assert line.pop("cpu_seconds") >= 0
    assert line == {"epoch": 3, "env_steps": 70, "phase": "tokenizer", "loss": 0.5, "updates": 4}


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    log.write(
        "evaluate",
        epoch=0,
        env_steps=0,
        values={"loss": math.nan, "worst": -math.inf, "returns": [1.0, math.inf]},
    )
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["worst"], line["returns"]) == (None, None, [1.0, None])


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    assert [line["epoch"] for line in read_metrics(path)] == [0, 1]


def test_a_damaged_line_is_named_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": \x00}\n[1]\n{"epoch": 3, "game": "a\u2028b"}\n')
    with pytest.warns(RunWarning) as said:
        assert [line["epoch"] for line in read_metrics(path)] == [0, 3]
    assert [str(warning.message) for warning in said] == [
        f"{path}, line {number} cannot be read and is left out" for number in (2, 3)
    ]
    notes: list[str] = []
    assert [line["epoch"] for line in read_lines(path, notes)] == [0, 3]
    assert notes == ["2 of 4 lines of metrics.jsonl cannot be read: line 2, 3."]


def test_tensorboard_gets_the_numbers_by_phase_and_epoch(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    for epoch in range(3):
        log.write(
            "collect", epoch=epoch, env_steps=10 * epoch, values={"rate": 2.0 * epoch, "returns": [1.0]}
        )
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["collect/rate"]
    points = [(point.step, point.value) for point in events.Scalars("collect/rate")]
    assert points == [(0, pytest.approx(0.0)), (1, pytest.approx(2.0)), (2, pytest.approx(4.0))]


def test_a_log_that_goes_on_keeps_the_lines_it_is_told_to_and_writes_tensorboard_anew(tmp_path: Path) -> None:
    """One of them is nobody's metrics, and the last one is cut short."""
    path, tensorboard = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    log = MetricsLog(path, tensorboard)
    for epoch in range(4):
        log.write("collect", epoch=epoch, env_steps=0, values={"steps": epoch, "returns": [1.0]})
    log.close()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "a note\n", *lines[1:]]) + '{"half')
    log = MetricsLog(path, tensorboard, keep=3, seconds=1000.0, cpu_seconds=2000.0)
    assert path.read_text() == "".join([lines[0], "a note\n", lines[1]])
    assert log.num_lines == 3
    log.write("collect", epoch=7, env_steps=0, values={"steps": 7})
    log.sync()
    log.close()
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["seconds"] >= 1000.0
    assert last["cpu_seconds"] >= 2000.0
    events = EventAccumulator(str(tensorboard)).Reload()
    assert events.Tags()["scalars"] == ["collect/steps"]
    assert [(point.step, point.value) for point in events.Scalars("collect/steps")] == [
        (0, 0),
        (1, 1),
        (7, 7),
    ]


def test_a_log_with_fewer_lines_than_it_should_have_goes_on_with_those(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", keep=5)
    assert log.num_lines == 0
    log.close()


def test_lines_that_others_damaged_neither_shift_nor_stop_a_log_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    deep, huge = b"[" * 100_000, b'{"seconds": 1%s, "phase": "a", "epoch": 0}' % (b"0" * 400)
    damaged = [b'{"game": "a\rb\xff\x0c"}', deep, huge, b'{"epoch": 3}']
    path.write_bytes(b"\n".join([*damaged, b'{"epoch": 4}', b'{"epo']))
    MetricsLog(path, tmp_path / "tensorboard", keep=4).close()
    assert path.read_bytes().split(b"\n") == [*damaged, b""]
