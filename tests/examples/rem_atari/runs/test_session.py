"""What a run was trained with and on is written down, each time that it is started or resumed."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from rem_atari.arguments import TrainArguments
from rem_atari.cli import main
from rem_atari.config.presets import PRESETS
from rem_atari.parsing import parse_arguments
from rem_atari.runs.session import find_commit, read_sessions


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a package that is committed, and one in its environment that is not."""
    for package in ("package", "environment/package"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_the_commit_is_that_of_the_code(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert find_commit(repository / "package") == commit
    (repository / "package" / "__init__.py").write_text("changed = True\n")
    assert find_commit(repository / "package") == f"{commit}-dirty"


def test_a_package_in_somebody_s_repository_has_not_its_commit(repository: Path, tmp_path: Path) -> None:
    assert find_commit(repository / "environment/package") is None
    assert find_commit(tmp_path / "nowhere") is None


def test_without_git_the_commit_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_commit(repository / "package") is None


@pytest.mark.usefixtures("without_report")
def test_each_start_leaves_a_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = [
        "--evaluation.random-episodes",
        "0",
        "--evaluation.final-episodes",
        "1",
        "--schedule.epochs",
        "1",
    ]
    assert main(["train", "--preset", "debug", "--run", str(run), *small, "--seed", "3"]) == 0
    assert main(["resume", str(run), "--schedule.epochs", "2"]) == 0
    first, second = read_sessions(run / "sessions.jsonl")
    assert (first["command"], second["command"]) == ("train", "resume")
    assert first["versions"]["torch"] == torch.__version__
    assert (first["threads"], first["device"]) == (torch.get_num_threads(), "cpu")
    assert first["cores"] >= 1
    assert first["processor"]
    arguments = parse_arguments(shlex.split(first["reproduce"])[1:])
    assert isinstance(arguments, TrainArguments)
    assert arguments.config.seed == 3
    assert arguments.config.schedule.epochs == 1 < PRESETS["debug"].schedule.epochs


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    assert read_sessions(path) == []
    path.write_text(json.dumps({"command": "train"}) + '\n[1]\n{"comm')
    assert read_sessions(path) == [{"command": "train"}]
