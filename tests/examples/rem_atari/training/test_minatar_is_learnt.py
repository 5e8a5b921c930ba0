"""The agent learns: MinAtar's Breakout from pixels, to several times what random play gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from rem_atari.cli import main
from rem_atari.runs.folder import open_run_folder
from rem_atari.runs.metrics import read_metrics

pytest.importorskip("minatar", reason="minatar is not installed (extra `minatar`)")

EPOCHS = "6"
"""Of the preset's 24."""


@pytest.mark.slow
def test_minatar_breakout_is_learnt(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--schedule.epochs", EPOCHS, "--evaluation.final-episodes", "50"]
    assert main(["train", "--preset", "minatar", "--seed", "0", "--run", str(run), *arguments]) == 0
    lines = read_metrics(open_run_folder(run).metrics)
    random = next(line for line in lines if line["phase"] == "random")
    final = next(line for line in lines if line["phase"] == "evaluate" and line["final"])
    assert random["episodes"] == 100
    assert 0.2 < random["mean_return"] < 0.55
    assert (final["episodes"], final["unfinished"]) == (50, 0)
    assert final["mean_return"] >= 4 * random["mean_return"]
