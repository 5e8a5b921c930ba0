"""The agent learns: Catch, from random play to nearly perfect, on every seed, with one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from rem_atari.cli import main
from rem_atari.runs.folder import open_run_folder
from rem_atari.runs.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_catch_is_learnt(seed: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--preset", "catch", "--seed", str(seed), "--run", str(run)]) == 0
    lines = read_metrics(open_run_folder(run).metrics)
    random = next(line for line in lines if line["phase"] == "random")
    final = next(line for line in lines if line["phase"] == "evaluate" and line["final"])
    assert -0.85 < random["mean_return"] < -0.5
    assert (final["episodes"], final["unfinished"]) == (200, 0)
    assert final["mean_return"] >= 0.9
