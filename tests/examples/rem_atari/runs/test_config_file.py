"""A run's config.json that was lost or edited: found again, noticed, said and recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import DEBUG, make_run
from short_runs import SHORT, Point, run_part

from rem_atari.cli import main
from rem_atari.errors import RunWarning, UsageError
from rem_atari.report import write_report
from rem_atari.runs.checkpoint import list_checkpoints, load_checkpoint
from rem_atari.runs.config_file import DIGEST, config_text, write_config
from rem_atari.runs.folder import RunFolder, open_run_folder


def edit(run: RunFolder, **settings: Any) -> None:
    """Change settings of the controller by hand."""
    data = json.loads(run.config.read_text())
    data["controller"] |= settings
    run.config.write_text(json.dumps(data))


def test_a_config_as_it_was_written_is_quiet(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert run.read_config().note is None
    data = json.loads(run.config.read_text())
    run.config.write_text(json.dumps(dict(reversed(data.items()))))
    assert run.read_config().note is None, "another order and other spaces change nothing"
    del data[DIGEST]
    run.config.write_text(json.dumps(data))
    assert run.read_config().note is None, "earlier versions wrote no digest"
    assert run.load_config() == DEBUG


def test_a_lost_config_is_that_of_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=(41, 42))
    run.config.unlink()
    with pytest.warns(RunWarning, match=r"config\.json is lost; the copy of checkpoint 42 is used"):
        assert open_run_folder(run.path).load_config() == DEBUG
    newest = list_checkpoints(run.checkpoints)[-1][1] / "config.json"
    newest.write_bytes(newest.read_bytes().replace(b"0.9", b"0.8"))
    assert open_run_folder(run.path).read_config().lost_from == 41
    for _, path in list_checkpoints(run.checkpoints):
        (path / "config.json").unlink()
    with pytest.raises(UsageError, match="is not a run folder"):
        open_run_folder(run.path)


def test_an_edited_config_is_noticed_setting_by_setting(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run, gamma=0.5, horizon=4)
    saved = run.read_config()
    assert saved.edits == {"controller.gamma": (0.995, 0.5), "controller.horizon": (3, 4)}
    assert saved.config.controller.gamma == 0.5
    said = "config.json was edited: controller.horizon was 3 and is 4; controller.gamma was 0.995 and is 0.5"
    with pytest.warns(RunWarning, match=said):
        run.load_config()
    page = write_report(run.path).read_text()
    assert page.count("controller.gamma was 0.995 and is 0.5") == 2, "at the top, and beside the command"
    assert "which is not the same run" in page


def test_an_edit_without_a_digest_and_the_config_of_another_run_are_noticed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    other = replace(DEBUG, seed=5, schedule=replace(DEBUG.schedule, epochs=9))
    for data in (config_text(other), json.dumps(other.to_dict()).encode()):
        run.config.write_bytes(data)
        saved = run.read_config()
        assert saved.is_edited
        assert saved.edits["seed"] == (0, 5)
    write_config(run.config, replace(other, seed=0))
    assert run.read_config().note is None, "a run is resumed with more epochs, and killed before it saved"


@pytest.mark.parametrize("damaged", [b"", bytes(900), b'{"seed": 1'])
def test_a_config_that_is_none_says_what_is_left(tmp_path: Path, damaged: bytes) -> None:
    run = make_run(tmp_path / "run")
    run.config.write_bytes(damaged)
    with pytest.raises(
        UsageError, match=r"not the configuration of a run: .+; without the file, the copy of"
    ):
        run.read_config()
    run.config.unlink()
    assert run.read_config().config == DEBUG


def test_resume_says_records_and_restores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "run")
    assert run_part(run.path, until=Point(0, "controller", 1)).stopped
    assert load_checkpoint(run.checkpoints).config == config_text(SHORT) == run.config.read_bytes()
    edit(run, gamma=0.5)
    assert main(["resume", str(run.path), "--stop-after", "0.001"]) == 3
    assert (
        "warning: config.json was edited: controller.gamma was 0.995 and is 0.5; the run goes on with it"
        in capsys.readouterr().err
    )
    edited = replace(SHORT, controller=replace(SHORT.controller, gamma=0.5))
    assert run.config.read_bytes() == config_text(edited) == load_checkpoint(run.checkpoints).config
    assert json.loads(run.sessions.read_text())["edited"] == {"controller.gamma": [0.995, 0.5]}
    run.config.unlink()
    assert main(["resume", str(run.path), "--stop-after", "0.001"]) == 3
    assert "warning: config.json is lost; the copy of checkpoint" in capsys.readouterr().err
    assert run.config.read_bytes() == config_text(edited)
    page = write_report(run.path).read_text()
    assert "controller.gamma was 0.995 and is 0.5" in page, "what was edited once is told for good"
