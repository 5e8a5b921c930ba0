"""`rem-atari blind`: what is written, what is shown of it elsewhere, and wrong use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import make_run
from sides_env import SIDES_ID

from rem_atari.cli import main
from rem_atari.report.rivals import read_rivals


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["blind", *words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_gets_its_rivals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    run.metrics.write_text(json.dumps({"phase": "collect", "epoch": 0, "env_steps": 96}) + "\n")
    assert main(["blind", str(run.path), "--games", "20"]) == 0
    data = json.loads(run.blind.read_text())
    assert (data["game"], data["search_steps"], data["seed"]) == ("Catch", 96, 0)
    assert list(data["policies"]) == ["random", "constant", "list", "scripted"]
    for policy in data["policies"].values():
        assert (policy["games"], policy["steps"]) == (20, 100)
    assert data["policies"]["scripted"]["mean_return"] == 1.0
    assert data["command"] == "rem-atari blind --preset debug --steps 96 --games 20 --seed 0"
    shown = capsys.readouterr().out
    assert "Catch: 96 environment steps a search, seed 0" in shown
    assert data["action_names"][int(data["policies"]["constant"]["lists"][0])] in shown
    rivals = read_rivals(run.blind)
    assert rivals.returns["scripted"].mean == 1.0
    assert rivals.best_blind in ("random", "constant", "list")


def test_a_game_needs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sides.json"
    words = ["--preset", "debug", "--env.id", SIDES_ID, "--games", "8"]
    assert main(["blind", *words, "--steps", "300", "--seed", "2", "--out", str(out)]) == 0
    rivals = read_rivals(out)
    assert (rivals.search_steps, rivals.data["seed"]) == (300, 2)
    assert list(rivals.returns) == ["random", "constant", "list", "list_by_start"]
    assert f"--preset debug --env.id {SIDES_ID} --steps 300" in rivals.data["command"]
    assert rivals.best_blind == "list_by_start"
    capsys.readouterr()
    assert main(["blind", *words, "--steps", "40"]) == 0
    assert "written" not in capsys.readouterr().out


def test_wrong_use_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert "--games is 1, wanted at least 2" in fails(capsys, "--games", "1")
    assert "--steps is 1, wanted at least 2" in fails(capsys, "--steps", "1")
    assert "--seed is -1" in fails(capsys, "--seed", "-1")
    assert "is not a run folder" in fails(capsys, str(tmp_path / "none"))
    assert "has its own game" in fails(capsys, str(run.path), "--preset", "catch")
    assert "has its own game" in fails(capsys, str(run.path), "--env.frame-size", "32")
    assert "there is no folder" in fails(
        capsys, "--preset", "catch", "--out", str(tmp_path / "no/where.json")
    )
    assert "Brekout" in fails(capsys, "--env.game", "Brekout")
    assert "env.action_repeat is 0" in fails(capsys, "--env.action-repeat", "0")
    run.blind.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in fails(capsys, str(run.path))
