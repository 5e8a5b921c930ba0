"""The run folder: made once, never over another, and opened again."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from rem_atari.cli import main
from rem_atari.config.presets import PRESETS
from rem_atari.errors import UsageError
from rem_atari.runs.folder import (
    LOCK_FILE,
    create_run_folder,
    default_run_path,
    hold_run_folder,
    open_run_folder,
)

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


HOLDER = """
import sys
from pathlib import Path
from rem_atari.runs.folder import hold_run_folder
with hold_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_a_folder_in_use_is_refused_with_who_has_it_until_that_process_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    create_run_folder(folder, CONFIG)
    before = datetime.now().replace(microsecond=0)
    with held_by_another_process(folder) as holder:
        with pytest.raises(UsageError) as refused, hold_run_folder(folder):
            pass
        found = re.fullmatch(
            rf"the run folder {folder} is in use by process (\d+) since (.*); stop it or wait .*",
            str(refused.value),
        )
        assert int(found[1]) == holder.pid
        assert before <= datetime.fromisoformat(found[2]) <= datetime.now()
        for words in (["train", "--preset", "debug", "--run", str(folder)], ["resume", str(folder)]):
            assert main(words) == 2
            assert f"in use by process {holder.pid} since" in capsys.readouterr().err
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with hold_run_folder(folder):
            assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    with hold_run_folder(folder):
        pass
    assert open_run_folder(folder).load_config() == CONFIG


def test_the_lock_does_not_depend_on_what_its_file_says(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    create_run_folder(folder, CONFIG)
    for text in ("", "{", '{"pid": "x"}', '{"pid": 1, "since": "never"}', "[" * 100_000, "null"):
        (folder / LOCK_FILE).write_text(text)
        with hold_run_folder(folder):
            (folder / LOCK_FILE).write_text(text)
            with pytest.raises(UsageError, match="in use by another process"), hold_run_folder(folder):
                pass


def test_a_folder_that_is_not_a_run_s_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"), hold_run_folder(tmp_path):
        create_run_folder(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot create or lock"), hold_run_folder(tmp_path / "file" / "run"):
        pass


def test_a_lock_file_that_its_holder_just_deleted_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it: the process before gives the folder up, and its file with it."""
    create_run_folder(tmp_path / "run", CONFIG)
    real = fcntl.flock
    deleted: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        if not deleted:
            deleted.append(descriptor)
            (tmp_path / "run" / LOCK_FILE).unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold_run_folder(tmp_path / "run"):
        assert deleted
        with pytest.raises(UsageError, match="in use"), hold_run_folder(tmp_path / "run"):
            pass
