"""Durable writing: whole or absent at every point at which it can be cut short, and in the right order."""

from __future__ import annotations

import ast
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from file_faults import REMOVALS, WRITES, file_faults

import rem_atari
from rem_atari.errors import describe_os_error
from rem_atari.runs.durable import replace_file, sync_folder, write_durably

OLD, NEW = b"old" * 1000, b"newer" * 1000


def test_replacing_syncs_before_it_renames_and_the_folder_after(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with file_faults(kinds=(*WRITES, *REMOVALS)) as faults:
        replace_file(path, NEW)
    assert path.read_bytes() == NEW
    kinds = [site.split()[0] for site in faults.sites]
    assert kinds == ["unlink", "open", "write", "flush", "fsync", "close", "replace", "fsync"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("once", [True, False])
def test_a_write_that_fails_anywhere_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, exists: bool, once: bool
) -> None:
    path = tmp_path / "file"
    with file_faults() as faults:
        replace_file(path, NEW)
    for site in range(len(faults.sites)):
        path.unlink(missing_ok=True)
        if exists:
            path.write_bytes(OLD)
        with pytest.raises(OSError, match="No space left") as raised, file_faults(site, once=once):
            replace_file(path, NEW)
        assert str(tmp_path) in str(raised.value.filename), faults.sites[site]
        left = path.read_bytes() if path.exists() else None
        assert left in ((OLD if exists else None), NEW)
        assert {entry.name for entry in tmp_path.iterdir()} <= {"file"}, faults.sites[site]


def test_what_a_crash_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".file.writing").write_bytes(b"half")
    replace_file(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_two_who_replace_a_file_take_turns(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(replace_file, [tmp_path / "file"] * 40, [OLD, NEW] * 20):
            assert (tmp_path / "file").read_bytes() in (OLD, NEW)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(OLD)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("file", ".file.writing"):
        (folder / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_durably(folder / "file", NEW)
    replace_file(folder / "file", NEW)
    assert victim.read_bytes() == OLD
    assert (folder / "file").read_bytes() == NEW
    assert not (folder / "file").is_symlink()


def test_a_folder_that_cannot_be_synced_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sync_folder(tmp_path / "nowhere")


def test_errors_of_the_system_become_a_sentence() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/metrics.jsonl")
    assert describe_os_error(full) == (
        "cannot write runs/x/metrics.jsonl: No space left on device; nothing that was saved before is lost:"
        " make room and try again"
    )
    assert (
        describe_os_error(PermissionError(errno.EACCES, "Permission denied", "x")) == "x: Permission denied"
    )
    assert describe_os_error(OSError("odd")) == "odd"


MAY_WRITE = {
    "runs/durable.py": "the place for it",
    "runs/folder.py": "the lock, which is empty to anybody but its holder",
    "runs/metrics.py": "appends lines, each whole with its line feed",
    "runs/session.py": "appends a line, which the report alone reads",
    "weights/downloads.py": "resumes a download under a name of its own",
    "weights/fetch.py": "a lock",
    "envs/process.py": "the null device",
    "commands/sweep.py": "a run's log, which only a person reads",
    "films/video.py": "tries whether a film can be written before frames are made",
}
"""The modules that open files for writing themselves, and why that is no danger."""


def opens_for_writing(call: ast.Call) -> bool:
    """Whether a call may create or change a file under its final name."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("write_text", "write_bytes", "savefig", "touch"):
        to = call.args[0] if name == "savefig" else None
        return not (isinstance(to, ast.Name) and to.id == "buffer")
    if name != "open":
        return False
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    modes += [word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)]
    computed = any(isinstance(argument, ast.IfExp | ast.BinOp) for argument in call.args)
    return computed or any(isinstance(mode, str) and set(mode) & set("wax+") for mode in modes)


def test_nobody_else_opens_files_for_writing() -> None:
    """Every other file is written by `durable`, so that its sites are the only ones there are."""
    root = Path(rem_atari.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_for_writing(node)
    }
    assert found <= MAY_WRITE.keys()
    assert "runs/durable.py" in found, "the search itself finds nothing"
