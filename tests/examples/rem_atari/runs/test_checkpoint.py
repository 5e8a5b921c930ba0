"""Checkpoints: whole or absent, whatever happens while they are written, read or lie on the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rem_atari.agent import Agent
from rem_atari.config.presets import PRESETS
from rem_atari.runs import checkpoint as checkpoint_module
from rem_atari.runs.checkpoint import (
    CONTENT_FILES,
    Checkpoint,
    CheckpointError,
    find_best,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    set_aside_newer,
)
from rem_atari.runs.durable import write_durably


def make_checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=generator)
    return Checkpoint(
        step=step,
        model={"layer.weight": weight, "transposed": weight.T, "uses": torch.arange(3)},
        optimizer={"part.0.step": torch.tensor(float(step))},
        state={"epoch": step, "updates": {"part": step}},
        training={"random/torch": torch.arange(5, dtype=torch.uint8) + step % 9},
    )


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert (ours.step, ours.state) == (theirs.step, theirs.state)
    for part in ("model", "optimizer", "training"):
        tensors, others = getattr(ours, part), getattr(theirs, part)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(42), keep=2)
    assert path == tmp_path / "step-00000042"
    assert {file.name for file in path.iterdir()} == {*CONTENT_FILES, "manifest.json", "replay"}
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


@pytest.mark.parametrize("fails_at", range(5))
def test_a_full_disk_leaves_the_checkpoint_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """At each of the five files that are written."""
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


def write_shards(folder: Path, count: int, size: int = 20_000) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"shard-{number:08d}.safetensors" for number in range(count)]
    for path in paths:
        if not path.exists():
            path.write_bytes(os.urandom(size))
    return paths


def disk_usage(folder: Path) -> int:
    """Bytes of the files in a folder, each file once however many links there are to it."""
    files = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(files.values())


def test_the_replay_takes_its_space_once_however_many_checkpoints_there_are(tmp_path: Path) -> None:
    for step in range(1, 11):
        shards = write_shards(tmp_path / "replay", step)
        save_checkpoint(tmp_path / "checkpoints", make_checkpoint(step), keep=5, shards=shards, best=True)
    assert sum(path.stat().st_size for path in shards) == 200_000
    assert 200_000 < disk_usage(tmp_path) < 230_000
    for step, path in list_checkpoints(tmp_path / "checkpoints"):
        linked = sorted((path / "replay").iterdir())
        assert [link.name for link in linked] == [shard.name for shard in shards[:step]]
        assert all(link.samefile(shard) for link, shard in zip(linked, shards, strict=False))
    # As long as a checkpoint needs it a shard is there, whatever becomes of the run's own.
    content = shards[0].read_bytes()
    shards[0].unlink()
    assert (path / "replay" / shards[0].name).read_bytes() == content


@pytest.mark.parametrize("best", [False, True])
def test_a_file_system_without_hard_links_has_checkpoints_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    """Their shards are those of the run; the best one is a copy."""

    def no_links(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    shards = write_shards(tmp_path / "replay", 2)
    path = save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1), keep=1, shards=shards, best=best)
    assert_same(load_checkpoint(tmp_path / "checkpoints"), make_checkpoint(1))
    assert list((path / "replay").iterdir()) == []
    found = find_best(tmp_path / "checkpoints")
    assert (found is not None) == best
    if found is not None:
        assert_same(read_checkpoint(found[1], 1), make_checkpoint(1))


def test_any_other_failure_to_link_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", broken)
    shards = write_shards(tmp_path / "replay", 1)
    with pytest.raises(OSError, match="Input/output error"):
        save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1), keep=1, shards=shards)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_the_best_is_kept_apart_and_replaced_by_a_better_one(tmp_path: Path) -> None:
    assert find_best(tmp_path) is None
    for step in range(1, 8):
        save_checkpoint(tmp_path, make_checkpoint(step), keep=2, best=step in (2, 4))
        wanted = {1: None, 2: 2, 3: 2}.get(step, 4)
        found = find_best(tmp_path)
        assert (found and found[0]) == wanted
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 7]
    assert found is not None
    assert_same(read_checkpoint(found[1], 4), make_checkpoint(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000004",
        "step-00000006",
        "step-00000007",
    ]


def test_a_checkpoint_that_was_saved_already_can_become_the_best(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    save_checkpoint(tmp_path, make_checkpoint(3), keep=1, best=True)
    found = find_best(tmp_path)
    assert found == (3, tmp_path / "best-00000003")
    assert (found[1] / "model.safetensors").samefile(path / "model.safetensors")


def test_damaged_checkpoints_make_way(tmp_path: Path) -> None:
    """Twice the same step: the later one takes the place of the earlier one among those set aside."""
    for size in (1, 2):
        for step in (1, 2, 3):
            save_checkpoint(tmp_path, make_checkpoint(step), keep=3)
        for step in (2, 3):
            (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"?" * size)
        assert set_aside_newer(tmp_path, 1) == [
            tmp_path / "damaged-step-00000002",
            tmp_path / "damaged-step-00000003",
        ]
    assert (tmp_path / "damaged-step-00000003" / "model.safetensors").read_bytes() == b"??"
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def rewrite_manifest(path: Path) -> None:
    """Make the manifest fit the files, as somebody would who forges a checkpoint."""
    files = {
        name: {
            "bytes": len(data := (path / name).read_bytes()),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        for name in CONTENT_FILES
    }
    (path / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", pickle.dumps({"layer.weight": 1})),
        ("training.safetensors", b""),
        ("state.json", b"[" * 100_000),
        ("state.json", b"\xff\xfe"),
    ],
)
def test_a_forged_file_is_damage_whatever_the_manifest_says(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    rewrite_manifest(path)
    assert_same(load_checkpoint(tmp_path), make_checkpoint(1))  # the forger's hand alone does no harm
    (path / name).write_bytes(content)
    rewrite_manifest(path)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(path, 1)


def test_a_manifest_of_monstrous_size_is_not_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(10**12)  # a hole in a file takes no space, but reading it would
    with pytest.raises(CheckpointError, match=r"manifest\.json has 1000000000000 bytes"):
        read_checkpoint(path, 1)


@pytest.mark.slow
def test_a_checkpoint_of_the_published_size_is_read_as_it_was_written(tmp_path: Path) -> None:
    """12 million parameters with two moments each, and 100,000 frames' tokens."""
    config = PRESETS["paper"]
    torch.manual_seed(0)
    agent = Agent.from_config(config, num_actions=18)
    optimizer = {
        f"agent.{index}.{slot}": torch.rand_like(parameter.detach())
        for index, parameter in enumerate(agent.parameters())
        for slot in ("exp_avg", "exp_avg_sq")
    }
    tokens = {"tokens/tokens": torch.zeros(100_000, 64, dtype=torch.int32)}
    checkpoint = Checkpoint(1, agent.state_dict(), optimizer, {}, tokens)
    save_checkpoint(tmp_path, checkpoint, keep=1)
    assert_same(load_checkpoint(tmp_path), checkpoint)
    assert disk_usage(tmp_path) < 4 * 3 * 12.6e6 + 26e6
