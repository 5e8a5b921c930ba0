"""Pictures of any numbers, and a report that is written whatever one of its parts meets."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import make_run

from rem_atari.cli import main
from rem_atari.errors import RunWarning
from rem_atari.evaluation import describe_mean
from rem_atari.report import page as page_module
from rem_atari.report import sections, write_report
from rem_atari.report.charts import Chart, chart_svg, charts_of, make_axis, save_curves
from rem_atari.report.contents import without_nan
from rem_atari.report.history import Series
from rem_atari.report.text import number
from rem_atari.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

NAN, INF = math.nan, math.inf

CURVES = {
    "constant": [0.1 + 0.2, 0.3, 0.3],
    "zero": [0.0, -0.0],
    "one": [5.0],
    "tiny": [5e-324, 0.0, 1e-310],
    "tiny steps": [1.0, 1.0 + 2e-16, 1.0 - 1e-16],
    "small": [1e-20, 3e-20],
    "huge": [1e308, -1e308, 1.7e308],
    "wide": [5e-324, 1.7e308],
    "steps beyond floats": [1e16, 1e16 + 2],
    "negative": [-1e-5, -1e5],
    "holes": [NAN, 1.0, INF, 2.0, -INF],
    "nothing": [NAN, NAN],
}


def chart_of(name: str, level: float | None) -> Chart:
    """A curve, and the same with a band that is not finite below."""
    values = CURVES[name]
    xs = [float(x) for x in range(len(values))]
    band = Series("band", xs, values, low=[NAN] * len(values), high=values)
    level_line = None if level is None else ("level", level)
    return Chart(title=name, x_label="epoch", series=[Series("curve", xs, values), band], level=level_line)


@pytest.mark.parametrize("level", [None, 0.3, NAN, INF, 1e308])
@pytest.mark.parametrize("name", CURVES)
def test_every_curve_is_drawn_within_the_picture(name: str, level: float | None) -> None:
    chart = chart_of(name, level)
    assert bool(chart.drawn) == any(map(math.isfinite, CURVES[name]))
    if not chart.drawn:
        return
    svg = chart_svg(chart)
    assert not re.search(r'"-?(nan|inf)', svg)
    places = re.findall(r' (?:y1|y2|cy)="([^"]*)"', svg)
    assert all(0 <= float(place) <= 190 for place in places)


@pytest.mark.parametrize("level", [None, 1e308])
def test_every_curve_is_drawn_as_a_file_too(tmp_path: Path, level: float | None) -> None:
    charts = [chart for name in CURVES if (chart := chart_of(name, level)).drawn]
    save_curves(tmp_path / "curves.png", charts)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_mean_that_differs_in_its_last_bit_is_flat() -> None:
    game = sum([-0.1] * 7)
    lines = [
        {"phase": "evaluate", "epoch": epoch, "env_steps": 100 * epoch, "mean_return": sum([game] * n) / n}
        | {"min_return": game, "max_return": game}
        for epoch, n in ((1, 3), (2, 5))
    ]
    assert "polyline" in chart_svg(charts_of(lines)[0])


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.25, 0.5, 0.75, 1]),
        ([0.0, 3e-20], [0, 1e-20, 2e-20, 3e-20]),
        ([0.0], [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_at_every_size(values: list[float], ticks: list[float]) -> None:
    assert make_axis(values, start=0, stop=1).ticks == ticks


def test_numbers_are_short() -> None:
    assert (number(1.5e300), number(-2e15), number(12345.0)) == ("1.50e+300", "−2.00e+15", "12,345")
    assert without_nan({"a": [NAN, 1.0, (INF,)], "b": "text"}) == {"a": [None, 1.0, [None]], "b": "text"}


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (11, None, "11.00"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (-0.004, 1.2, "-0.00 ± 1.20"),
        (0.00123, 4e-5, "0.00123 ± 4e-05"),
        (-2.5e38, 1e38, "-2.5e+38 ± 1e+38"),
    ],
)
def test_a_mean_return_of_any_size_is_told(mean: float, error: float | None, text: str) -> None:
    assert describe_mean(mean, error) == text


def test_odd_metrics_do_not_fail_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    good = {"epoch": 1, "phase": "random", "mean_return": 0.001, "returns": [0.0, 0.002], "episodes": 2}
    odd = good | {"phase": "evaluate", "returns": 5, "episodes": "many", "standard_error": "small"}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in ({}, {"phase": []}, good, odd)))
    assert main(["resume", str(run.path)]) == 0
    told = "mean return: agent 0.001 over 0 episodes, random play 0.001 ± 0.001 over 2 episodes"
    assert told in capsys.readouterr().out
    assert (run.path / "report.html").is_file()


def test_a_part_that_fails_is_shown_as_such_and_the_rest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a flat curve")

    run = make_run(tmp_path / "run")
    run.metrics.write_text('{"epoch": 0, "env_steps": 1, "seconds": 1, "phase": "tokenizer", "loss": 1.0}\n')
    monkeypatch.setattr(page_module, "save_curves", fail)
    monkeypatch.setattr(sections, "chart_svg", fail)
    with pytest.warns(RunWarning) as said:
        page = write_report(run.path).read_text()
    assert [str(warning.message) for warning in said] == [
        "media/curves.png could not be made: ZeroDivisionError: a flat curve.",
        "The section on curves could not be made: ZeroDivisionError: a flat curve.",
    ]
    assert all(str(warning.message) in page for warning in said)
    assert "How to reproduce" in page


def test_weights_that_are_not_finite_are_not_looked_at(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    model = dict(load_checkpoint(run.checkpoints).model)
    model["controller.actor.weight"] = torch.full_like(model["controller.actor.weight"], NAN)
    save_checkpoint(run.checkpoints, Checkpoint(43, model, {}, {"epoch": 2}), keep=1)
    page = write_report(run.path).read_text()
    assert "the weights of checkpoint 43 are not finite: controller.actor.weight" in page
