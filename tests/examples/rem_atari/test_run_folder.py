"""The run folder: made once, never over another, and opened again."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from rem_atari.errors import UsageError
from rem_atari.presets import PRESETS
from rem_atari.run_folder import create_run_folder, default_run_path, open_run_folder

CONFIG = PRESETS["debug"]


def test_a_new_folder_holds_the_configuration(tmp_path: Path) -> None:
    run = create_run_folder(tmp_path / "deep" / "run", CONFIG)
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    assert json.loads(run.config.read_text())["tokenizer"]["code_dim"] == CONFIG.tokenizer.code_dim
    assert open_run_folder(run.path).load_config() == CONFIG


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert create_run_folder(tmp_path, CONFIG).config.is_file()


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        create_run_folder(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot create the run folder"):
        create_run_folder(tmp_path / "file" / "run", CONFIG)


def test_the_default_path_names_environment_preset_seed_and_time() -> None:
    path = default_run_path(CONFIG, "My Game/2", datetime(2031, 2, 3, 4, 5, 6))
    assert path == Path("runs/My_Game_2-debug-0-20310203-040506")


def test_a_folder_without_a_run_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        open_run_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"seed": 1}', "[]"])
def test_a_broken_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match="is not the configuration of a run"):
        open_run_folder(tmp_path).load_config()
