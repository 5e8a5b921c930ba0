"""Checkpoints: whole or absent, whatever happens while they are written, read or lie on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rem_atari import checkpoint as checkpoint_module
from rem_atari.checkpoint import (
    CONTENT_FILES,
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from rem_atari.durable import write_durably


def make_checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=generator)
    return Checkpoint(
        step=step,
        model={"layer.weight": weight, "transposed": weight.T, "uses": torch.arange(3)},
        optimizer={"part.0.step": torch.tensor(float(step))},
        state={"epoch": step, "updates": {"part": step}},
    )


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert (ours.step, ours.state) == (theirs.step, theirs.state)
    for tensors, others in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(42), keep=2)
    assert path == tmp_path / "step-00000042"
    assert {file.name for file in path.iterdir()} == {*CONTENT_FILES, "manifest.json"}
    assert_same(load_checkpoint(tmp_path), make_checkpoint(42))


def test_the_last_are_kept_and_the_newest_is_by_step_not_by_time(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 10):
        save_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    os.utime(tmp_path / "step-00000010", (2e9, 2e9))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100_000_000]
    assert load_checkpoint(tmp_path).step == 100_000_000


def test_only_names_that_are_wholly_ours_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_checkpoint(5), keep=1)
    for name in ("step-00000009.bak", "xstep-00000009", "step-9", ".writing-step-00000009"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").symlink_to(tmp_path / "step-00000005")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]


def test_leftovers_of_a_crash_are_cleared_away(tmp_path: Path) -> None:
    for name in (".writing-step-00000003", ".deleting-step-00000001"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_same_step_is_not_written_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    before = (path / "model.safetensors").stat().st_mtime_ns
    save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("name", [*CONTENT_FILES, "manifest.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut_off_the_end, Path.unlink, replace_by_a_link])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    save_checkpoint(tmp_path, make_checkpoint(1), keep=2)
    newest = save_checkpoint(tmp_path, make_checkpoint(2), keep=2)
    damage(newest / name)
    with pytest.warns(RuntimeWarning, match="step-00000002 is damaged"):
        loaded = load_checkpoint(tmp_path)
    assert_same(loaded, make_checkpoint(1))


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    flip_a_bit(save_checkpoint(tmp_path, make_checkpoint(1), keep=1) / "model.safetensors")
    with (
        pytest.warns(RuntimeWarning, match="passed over"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints"),
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("fails_at", range(4))
def test_a_full_disk_leaves_the_checkpoint_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """At each of the four files that are written."""
    save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    writes = 0

    def write_until_full(path: Path, data: bytes) -> None:
        nonlocal writes
        if writes == fails_at:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        writes += 1
        write_durably(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_durably", write_until_full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, make_checkpoint(2), keep=1)
    assert_same(load_checkpoint(tmp_path), make_checkpoint(1))
    save_checkpoint(tmp_path, make_checkpoint(2), keep=1)
    assert_same(load_checkpoint(tmp_path), make_checkpoint(2))


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        save_checkpoint(tmp_path, make_checkpoint(1), keep=0)
