"""A full disk: at every place that writes, what was there before stays whole, and the user is told why."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from file_faults import file_faults
from saved_runs import SavedRun, all_checkpoints, check_run, leftovers

from rem_atari.cli import main
from rem_atari.config.presets import PRESETS
from rem_atari.errors import RunError
from rem_atari.films.pictures import save_reconstructions
from rem_atari.films.video import save_video
from rem_atari.replay.buffer import Replay
from rem_atari.runs.checkpoint import read_checkpoint
from rem_atari.runs.folder import create_run_folder, hold_run_folder, open_run_folder
from rem_atari.runs.metrics import MetricsLog, read_metrics

pytestmark = [
    # TensorBoard writes in a thread, where the error is raised once more.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def save_a_checkpoint(folder: Path) -> None:
    SavedRun(folder / "run").save_next()


def go_on_with_the_metrics(folder: Path) -> None:
    log = MetricsLog(folder / "metrics.jsonl", folder / "tensorboard", keep=1)
    try:
        for epoch in (1, 2):
            log.write("phase", epoch=epoch, env_steps=0, values={"loss": 0.5})
    finally:
        log.close()


def begin_a_run(folder: Path) -> None:
    with hold_run_folder(folder / "new"):
        create_run_folder(folder / "new", PRESETS["debug"])


def draw_a_picture(folder: Path) -> None:
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    save_reconstructions(folder / "picture.png", frames, frames + 200)


def state_of_the_files(folder: Path) -> str:
    """Which of the old and new files are there; anything half written raises."""
    steps = f"checkpoint {check_run(folder / 'run')}"
    lines = [line["epoch"] for line in read_metrics(folder / "metrics.jsonl")]
    assert lines == [0, 1, 2][: len(lines)]
    assert lines, "the line that a checkpoint knows of"
    has_run = (folder / "new" / "config.json").exists()
    if has_run:
        assert open_run_folder(folder / "new").load_config() == PRESETS["debug"]
    picture = (folder / "picture.png").read_bytes()
    assert picture == b"old" or picture.endswith(b"IEND\xaeB`\x82")
    return f"{steps}, {len(lines)} lines, run {has_run}, picture {picture != b'old'}"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder before the disk is full."""
    folder = tmp_path_factory.mktemp("before")
    run = SavedRun(folder / "run")
    for _ in range(3):
        run.save_next()
    log = MetricsLog(folder / "metrics.jsonl", folder / "tensorboard")
    log.write("phase", epoch=0, env_steps=0, values={"loss": 1.0})
    log.close()
    (folder / "picture.png").write_bytes(b"old")
    return folder


@pytest.mark.parametrize("work", [save_a_checkpoint, go_on_with_the_metrics, begin_a_run, draw_a_picture])
@pytest.mark.parametrize("once", [True, False], ids=["for a moment", "for good"])
def test_no_room_at_any_write_harms_nothing_that_is_there(
    tmp_path: Path, before: Path, work: Callable[[Path], None], once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that writes, in turn: it fails, alone or with all that come after it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for speed; the site is still there
    good = shutil.copytree(before, tmp_path / "good")
    old = state_of_the_files(good)
    with file_faults() as faults:
        work(good)
    new = state_of_the_files(good)
    assert old != new
    assert len(faults.sites) >= 6
    for site, name in enumerate(faults.sites):
        folder = shutil.copytree(before, tmp_path / str(site))
        with pytest.raises((OSError, RunError), match="No space left"), file_faults(site, once=once):
            work(folder)
        left = state_of_the_files(folder)
        assert left in (old, new) or work is go_on_with_the_metrics, name
        assert leftovers(folder) == [] or work is begin_a_run, name
        shutil.rmtree(folder, ignore_errors=True)


def test_what_failed_for_want_of_room_works_once_there_is_some(tmp_path: Path, before: Path) -> None:
    for site in (0, 5, 20, 40):
        folder = shutil.copytree(before, tmp_path / str(site))
        with pytest.raises(OSError, match="No space left"), file_faults(site, once=False):
            save_a_checkpoint(folder)
        save_a_checkpoint(folder)
        assert check_run(folder / "run") == 3


def test_a_replay_that_cannot_be_flushed_is_whole_and_flushed_later(tmp_path: Path) -> None:
    replay = Replay((2, 2, 3), 10, folder=tmp_path, seed=0)
    replay.append(0, np.zeros((2, 2, 3), np.uint8), 0, 0.0, False, False)
    with pytest.raises(OSError, match="No space left"), file_faults(1, once=False):
        replay.flush()
    assert list(tmp_path.iterdir()) == []
    replay.flush()
    assert Replay.load(tmp_path).num_steps == 1


def train(folder: Path) -> int:
    return main(["train", "--preset", "debug", "--run", str(folder)])


def check_what_is_left(folder: Path) -> int:
    """Everything under its final name is whole: the number of checkpoints."""
    found = list(all_checkpoints(folder / "checkpoints"))
    for step, path in found:
        read_checkpoint(path, step)
    if (folder / "replay").is_dir():
        Replay.load(folder / "replay", frame_shape=(24, 24, 3))
    if (folder / "metrics.jsonl").exists():
        read_metrics(folder / "metrics.jsonl")
    if (folder / "config.json").exists():
        json.loads((folder / "config.json").read_text())
    return len(found)


def said(errors: str) -> str:
    """The last line of stderr, which must be one of ours."""
    last = errors.strip().splitlines()[-1]
    assert last.startswith("rem-atari: "), errors
    return last


@pytest.mark.parametrize(
    ("name", "number", "checkpoints"), [("open {}model.safetensors", 2, 1), ("open {}report.html", 1, 2)]
)
def test_a_run_on_a_full_disk_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, number: int, checkpoints: int
) -> None:
    """At two of the places where a run writes, the second checkpoint and the report; all in the slow test."""
    start, end = name.split("{}")
    seen: list[str] = []

    def is_there(site: str) -> bool:
        seen.extend([site] * (site.startswith(start) and end in site))
        return len(seen) == number

    with file_faults(is_there, once=False):
        assert train(tmp_path / "run") == 1
    assert "No space left on device" in said(capsys.readouterr().err)
    assert check_what_is_left(tmp_path / "run") == checkpoints


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_full_at_any_time_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_faults() as faults:
        assert train(tmp_path / "good") == 0
    for site in range(0, len(faults.sites), 5):
        folder = tmp_path / str(site)
        with file_faults(site, once=False) as full:
            code = train(folder)
        # TensorBoard flushes when it likes, so that a run has a few sites more or less.
        assert code == bool(full.hits), full.hits or faults.sites[site]
        assert full.hits or site > len(faults.sites) - 20
        if full.hits:
            assert "No space left on device" in said(capsys.readouterr().err), full.hits
        check_what_is_left(folder)
        shutil.rmtree(folder, ignore_errors=True)


def with_a_limit_on_files(most: int, work: Callable[[], int], errors: Path) -> int:
    """The exit code of `work` in a process whose files may not grow beyond `most` bytes."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
            sys.stderr = os.fdopen(2, "w")
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_files_that_may_not_grow_are_a_full_disk_that_is_real(tmp_path: Path) -> None:
    """The system itself refuses; the optimiser's file has more than 150,000 bytes."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    assert with_a_limit_on_files(150_000, lambda: train(folder), errors) == 1
    last = said(errors.read_text())
    assert "optimizer.safetensors: File too large; nothing that was saved before is lost" in last
    assert check_what_is_left(folder) == 0
    assert leftovers(folder) == []


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_a_film_that_is_cut_short_does_not_get_its_name(tmp_path: Path, name: str) -> None:
    """ffmpeg is ended by the system in the middle of its work."""
    if name == "film.mp4":
        pytest.importorskip("imageio_ffmpeg")
    draw = np.random.default_rng(0)
    pictures = list(draw.integers(256, size=(60, 64, 64, 3), dtype=np.uint8))
    folder = tmp_path / "media"
    save_video(folder / name, pictures[:1], fps=15)
    before = (folder / name).read_bytes()

    def save() -> int:
        try:
            save_video(folder / name, pictures, fps=15)
        except RunError as error:
            print(error, file=sys.stderr, flush=True)
            return 1
        return 0

    errors = tmp_path / "errors"
    assert with_a_limit_on_files(50_000, save, errors) == 1
    assert f"the film {folder / name} cannot be written" in errors.read_text()
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [100, 300, 600, 900])
def test_a_small_file_system_that_fills_up(tmp_path: Path, kilobytes: int) -> None:
    """A real one, where the system lets us mount it."""
    mount = f"mount -t tmpfs -o size={kilobytes}k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system")
    train_there = f"{sys.executable} -m rem_atari train --preset debug --run {tmp_path}/run"
    # What is left is checked inside: the file system is gone with the process that mounted it.
    check = "; ".join(
        (
            f"import sys; sys.path[:] = {sys.path!r}",
            "from pathlib import Path",
            "from rem_atari.runs.checkpoint import list_checkpoints, read_checkpoint",
            f"found = list_checkpoints(Path({str(tmp_path)!r}) / 'run' / 'checkpoints')",
            "[read_checkpoint(path, step) for step, path in found]",
            "print(len(found), 'whole')",
        )
    )
    script = f'{mount} && {{ {train_there}; echo "exit code $?"; {sys.executable} -c "{check}"; }}'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert "exit code 1" in done.stdout, done
    assert "whole" in done.stdout, done
    assert "No space left on device" in said(done.stderr)
    assert "Traceback" not in done.stderr.replace("Exception in thread", "")
