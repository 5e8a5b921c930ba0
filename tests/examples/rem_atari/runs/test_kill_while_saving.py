"""kill -9 while saving: whatever the moment, a whole checkpoint is there, and all the replay it knows."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from file_faults import REMOVALS, WRITES, file_faults, kill
from saved_runs import SavedRun, check_run, leftovers


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing, for speed: a killed process loses nothing that it has written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def in_a_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked process: its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(7)
    return child


def save_for_ever(folder: Path, tell: int) -> None:
    """Go on with a run, tell each step when it is saved."""
    run = SavedRun(folder)
    while True:
        os.write(tell, run.save_next().to_bytes(8, "little"))


def start_and_kill(folder: Path, draw: random.Random) -> int:
    """Let a process save, kill it at a random moment: the last step that it said it had saved."""
    hear, tell = os.pipe()
    child = in_a_child(lambda: save_for_ever(folder, tell))
    os.close(tell)
    with open(hear, "rb", buffering=0) as told:
        last = told.read(8)
        began = time.perf_counter()
        last = told.read(8)
        time.sleep(draw.random() * 2 * (time.perf_counter() - began))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        while more := told.read(8):
            last = more
    return int.from_bytes(last, "little")


def kill_at_random(folder: Path, kills: int) -> int:
    """Kill a writer again and again; after each, all must be whole. How many kills interrupted a save."""
    draw = random.Random(0)
    interrupted = 0
    for _ in range(kills):
        told = start_and_kill(folder, draw)
        interrupted += bool(leftovers(folder))
        assert check_run(folder) >= told
    return interrupted


@pytest.mark.usefixtures("no_waiting")
def test_kills_at_random_moments_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    assert kill_at_random(tmp_path, 20) >= 3


@pytest.mark.slow
def test_a_thousand_kills_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    # A run of its own for every fifty: its replay grows with every save, and is checked after every kill.
    interrupted = sum(kill_at_random(tmp_path / f"run-{number}", 50) for number in range(20))
    print(f"{interrupted} of 1000 kills interrupted a save")
    assert interrupted >= 300


@pytest.mark.usefixtures("no_waiting")
def test_a_kill_between_any_two_operations_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Every call that changes a file while a checkpoint is saved and an old one deleted, in turn."""
    kinds = (*WRITES, *REMOVALS)

    run = SavedRun(tmp_path / "before")
    for _ in range(3):
        run.save_next()

    def copy(name: str) -> Path:
        # Links are as good as copies: nothing is ever written into a file that is there.
        return shutil.copytree(tmp_path / "before", tmp_path / name, copy_function=os.link)

    run = SavedRun(copy("counted"))
    with file_faults(kinds=kinds) as faults:
        assert run.save_next() == 3
    assert len(faults.sites) > 50, faults.sites
    newest = []
    for site, name in enumerate(faults.sites):
        folder = copy(str(site))

        def work(folder: Path = folder, site: int = site) -> None:
            run = SavedRun(folder)
            with file_faults(site, kill, kinds=kinds):
                run.save_next()

        status = os.waitpid(in_a_child(work), 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, name
        newest.append(check_run(folder))
    assert set(newest) == {2, 3}
    assert newest == sorted(newest), "from one rename on, and not before, the new one is there"
