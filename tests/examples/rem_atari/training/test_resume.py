"""Resuming: a run that was stopped anywhere, any number of times, ends bit by bit as one that never was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from short_runs import (
    SHORT,
    Outcome,
    Point,
    fingerprint,
    hash_replay,
    measured,
    newest,
    run_part,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rem_atari.cli import main
from rem_atari.config import Config, EnvConfig
from rem_atari.config.presets import PRESETS
from rem_atari.envs.catch import Catch
from rem_atari.replay.buffer import Replay
from rem_atari.runs.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from rem_atari.runs.metrics import read_metrics

POINTS = [
    Point(0, "random", 1),
    Point(0, "collect_random", 38),
    Point(0, "collect", 10),
    Point(0, "tokenizer", 3),
    Point(0, "world_model", 1),
    Point(0, "controller", 1),
    Point(0, "evaluate", 2),
    Point(1, "collect", 32),
    Point(1, "world_model", 1),
    Point(1, "world_model", 2),
    Point(1, "controller", 1),
    Point(1, "evaluate", 3),
]
"""In the middle of each phase, and at the very end of some. In the second epoch the tokenizer rests."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert not run_part(folder).stopped
    return folder


def finish(folder: Path, config: Config = SHORT) -> Outcome:
    outcome = run_part(folder, config, resume=True)
    assert not outcome.stopped
    return outcome


def test_a_run_stopped_in_every_phase_and_moved_each_time_ends_as_one_that_never_was(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "0"
    for number, point in enumerate(POINTS):
        torch.rand(number)  # a fresh process has other random numbers behind it
        assert run_part(folder, until=point, resume=number > 0).stopped, point
        state = newest(folder).state
        assert (state["epoch"], state["phase"]) == point[:2]
        folder = folder.rename(tmp_path / str(number + 1))
    finish(folder)
    assert fingerprint(folder) == fingerprint(whole)


def test_a_run_in_slices_of_one_step_comes_through_random_play_and_evaluation(
    whole: Path, tmp_path: Path
) -> None:
    """However short a slice is, the run advances; what an evaluation records for the report survives too."""
    folder, slices = tmp_path / "run", 0
    for point in (Point(0, "random", 0), Point(0, "evaluate", 0)):
        games = 0
        while games < 2:  # of four and of three; each environment's first game takes five steps
            assert run_part(folder, until=point, resume=slices > 0).stopped
            slices += 1
            assert newest(folder).state["phase"] == point.phase
            games = len(newest(folder).state["evaluation"]["games"])
    assert slices == 10
    finish(folder)
    assert fingerprint(folder) == fingerprint(whole)
    ours, theirs = (hash_replay(Replay.load(path / "heldout")) for path in (folder, whole))
    assert ours == theirs


def test_the_short_run_has_what_is_to_survive(whole: Path) -> None:
    """Or the test above would not show that it does."""
    checkpoint = newest(whole)
    assert checkpoint.state["phases"]["tokenizer"]["frozen"]
    assert len(checkpoint.training["tokens/rows"]) > 20
    assert checkpoint.training["carry/0"].abs().sum() > 0
    assert not Replay.load(whole / "replay")._rows.truncated.any()
    assert checkpoint.state["best_return"] is not None


def test_a_fresh_process_goes_on_exactly(whole: Path, tmp_path: Path) -> None:
    """The command itself, in a process that has nothing but the folder."""
    run = tmp_path / "run"
    run_part(run, until=Point(0, "world_model", 1))
    command = [sys.executable, "-m", "rem_atari", "resume", str(run)]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from checkpoint {20 + 64 + 32 + 4 + 1}" in resumed.stderr
    assert (run / "report.html").is_file()
    assert fingerprint(run) == fingerprint(whole)


def crash() -> None:
    raise ZeroDivisionError("a crash")


def crash_at(folder: Path, point: Point, config: Config = SHORT) -> None:
    """Die without saving anything, as after kill -9."""
    with pytest.raises(ZeroDivisionError):
        run_part(folder, config, until=point, act=crash)


def test_what_a_crash_left_after_the_checkpoint_is_cut_off(whole: Path, tmp_path: Path) -> None:
    """Experience, metrics and TensorBoard's points: none is there twice."""
    folder = tmp_path / "run"
    crash_at(folder, Point(1, "controller", 1))
    assert newest(folder).state["epoch"] == 1
    assert measured(folder)[-1]["phase"] == "world_model"
    finish(folder)
    assert fingerprint(folder) == fingerprint(whole)
    points = scalars(folder)
    assert points == scalars(whole)
    assert [step for step, _ in points["world_model/loss"]] == [0, 1]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's points, without those that are times."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.endswith(("seconds", "rate", "frames_per_second"))
    }


def test_a_run_that_crashed_before_its_first_checkpoint_starts_from_its_beginning(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    crash_at(folder, Point(0, "world_model", 1))
    assert list_checkpoints(folder / "checkpoints") == []
    assert Replay.load(folder / "replay").num_steps > 0
    finish(folder)
    assert fingerprint(folder) == fingerprint(whole)


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_set_aside(
    whole: Path, tmp_path: Path
) -> None:
    """The run then reaches the damaged one's step again, and saves it anew."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (_, path) = list_checkpoints(folder / "checkpoints")[-1]
    flip_a_bit(path / "optimizer.safetensors")
    shown = finish(folder).shown
    assert f"checkpoint passed over: {path} is damaged" in shown
    assert f"damaged checkpoint is now called {path.with_name(f'damaged-{path.name}')}" in shown
    assert fingerprint(folder) == fingerprint(whole)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # not through a hard link to the same file
    path.write_bytes(data)


@pytest.fixture(scope="module")
def stopped_late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while its controller trained a second time, with all its shards."""
    folder = tmp_path_factory.mktemp("stopped_late") / "run"
    run_part(folder, until=Point(1, "controller", 1))
    return folder


def test_a_damaged_shard_comes_back_from_the_checkpoint_s_copy(
    whole: Path, stopped_late: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped_late, folder)
    shard = folder / "replay" / "shard-00000001.safetensors"
    flip_a_bit(shard)
    (folder / "replay" / "shard-00000002.safetensors").unlink()
    (folder / "replay" / "shard-00000009.safetensors").write_bytes(b"stray")
    shown = finish(folder).shown
    assert f"{shard} was missing or damaged; the checkpoint's copy" in shown
    assert fingerprint(folder) == fingerprint(whole)


def test_a_lost_shard_is_set_aside_and_the_run_goes_on_without_it(stopped_late: Path, tmp_path: Path) -> None:
    """The checkpoint's copy is damaged too, as where one bit flipped in the file that both are."""
    folder = tmp_path / "run"
    shutil.copytree(stopped_late, folder)
    lost = "shard-00000001.safetensors"
    for copy in folder.rglob(lost):
        flip_a_bit(copy)
    shown = finish(folder).shown
    note = f"{lost} is damaged and was set aside as {lost}.damaged; 32 steps of experience are lost"
    assert note in shown
    assert any(note in line for line in newest(folder).state["notes"])
    replay = Replay.load(folder / "replay")
    assert replay.num_steps == 128, "what was lost still counts"
    rows = replay.sample_sequences(500, 3, min_real=1).rows
    assert not ((rows >= 64) & (rows < 96)).any()
    assert set(range(64)) <= set(rows.flatten().tolist())
    # And it can be stopped and resumed again.
    assert run_part(folder, longer(SHORT), until=Point(2, "controller", 1), resume=True).stopped
    assert "lost" not in finish(folder, longer(SHORT)).shown


def longer(config: Config, epochs: int = 3) -> Config:
    return replace(config, schedule=replace(config.schedule, epochs=epochs, collect_epochs=epochs))


def test_a_finished_run_says_so_and_can_be_made_longer(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    run, once = str(tmp_path / "run"), longer(SHORT, 1)
    run_part(tmp_path / "run", once)
    assert main(["resume", run]) == 0
    output = capsys.readouterr()
    assert "the run is finished: 1 of 1 epochs; --schedule.epochs N makes it longer" in output.out
    assert "report: " in output.out, "the report was missing"
    before = fingerprint(tmp_path / "run")
    assert main(["resume", run]) == 0
    assert "report: " not in capsys.readouterr().out
    assert fingerprint(tmp_path / "run") == before
    request.getfixturevalue("without_report")
    assert main(["resume", run, "--schedule.epochs", "2", "--schedule.collect-epochs", "2"]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["schedule"]["epochs"], saved["schedule"]["collect_epochs"]) == (2, 2)
    ours, theirs = fingerprint(tmp_path / "run"), fingerprint(whole)
    # Only the evaluation after the first epoch was another one, of more games.
    assert [line["phase"] for line in ours["metrics"]] == [line["phase"] for line in theirs["metrics"]]
    for part in ("model", "optimizer", "experience", "tokens/tokens", "random/torch", "state/random"):
        assert ours[part] == theirs[part], part


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--schedule.epochs", "1"],
            "schedule.epochs is 1, and the run was begun with 2: it can only be raised",
        ),
        (["--schedule.keep-checkpoints", "0"], "schedule.keep_checkpoints is 0, wanted at least 1"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    run_part(tmp_path / "run", until=Point(0, "random", 1))
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert main(["resume", str(tmp_path / "run"), *words]) == 2
    assert complaint in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_damaged_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_part(tmp_path / "run", until=Point(0, "collect", 1))
    for _, path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "manifest.json").write_text("{}")
    assert main(["resume", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "none of the 1 checkpoints" in last
    assert f"{path} is damaged: manifest.json has no entry 'files'" in last


ATARI = replace(
    SHORT,
    env=EnvConfig(game="Breakout", frame_size=24, noop_max=5, num_envs=2),
    schedule=replace(SHORT.schedule, epochs=1, collect_epochs=1, random_steps=300, steps_per_epoch=120),
    evaluation=replace(SHORT.evaluation, every=0, final_episodes=1, random_episodes=0, max_steps=5),
)


def test_atari_goes_on_exactly_lives_and_frames_and_no_ops(tmp_path: Path) -> None:
    run_part(tmp_path / "whole", ATARI)
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert lines[0]["episodes"] > 2, "no life was lost"
    for number, point in enumerate([Point(0, "collect_random", 70), Point(0, "collect", 31)]):
        assert run_part(tmp_path / "parts", ATARI, until=point, resume=number > 0).stopped
    finish(tmp_path / "parts", ATARI)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


class Opaque(Catch):
    """Catch in a wrapper that nobody knows."""


class Wrapped(gymnasium.Wrapper):
    pass


def make_opaque(**options: object) -> gymnasium.Env:
    return Wrapped(Catch(**options))


gymnasium.register(id="rem_atari_test/Opaque-v0", entry_point=make_opaque)
OPAQUE = replace(SHORT, env=replace(SHORT.env, id="rem_atari_test/Opaque-v0"))


def test_an_environment_that_cannot_be_saved_starts_anew_and_the_run_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_part(folder, OPAQUE, until=Point(0, "collect", 14))
    assert newest(folder).state["environments"] == [None, None]
    # 64 + 14 steps of two environments: 39 each, of games of five.
    assert not Replay.load(folder / "replay")._rows.truncated.any()
    outcome = finish(folder, OPAQUE)
    for index in range(2):
        assert f"environment {index} could not be saved: it starts anew" in outcome.shown
    assert len(newest(folder).state["notes"]) == 2
    replay = Replay.load(folder / "replay")
    assert np.flatnonzero(replay._rows.truncated).tolist() == [76, 77]
    assert replay.num_steps == 128
    assert (replay._episodes._place[78:80] == 0).all(), "new episodes begin there"


def edit(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    return replace(checkpoint, state={**checkpoint.state, **changes})


def put_back(folder: Path, changed: Checkpoint) -> None:
    """Put a changed checkpoint in the place of a run's newest."""
    shutil.rmtree(list_checkpoints(folder / "checkpoints")[-1][1])
    save_checkpoint(folder / "checkpoints", changed, keep=5)


def test_a_checkpoint_of_an_earlier_version_that_names_the_next_phase_is_gone_on_from(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    crash_at(folder, Point(1, "collect", 2))
    between_epochs = newest(folder)
    assert between_epochs.state["phase"] is None
    put_back(folder, edit(between_epochs, phase="random"))
    finish(folder)
    assert fingerprint(folder) == fingerprint(whole)


@pytest.mark.parametrize(
    "forge",
    [
        lambda saved: edit(saved, epoch=None),
        lambda saved: edit(saved, updates={}),
        lambda saved: edit(saved, environments=[None]),
        lambda saved: edit(saved, shards=[{"name": "shard-00000000.safetensors"}]),
        lambda saved: edit(saved, metric_lines="many"),
        lambda saved: replace(saved, optimizer={"tokenizer.0.exp_avg": torch.zeros(3)}),
        lambda saved: replace(saved, optimizer={"tokenizer.9999.exp_avg": torch.zeros(3)}),
        lambda saved: replace(saved, training={**saved.training, "frames": torch.zeros(2, 8, 8, 3)}),
        lambda saved: replace(saved, training={**saved.training, "carry/0": torch.zeros(2, 3)}),
        lambda saved: replace(saved, training={**saved.training, "random/torch": torch.zeros(3)}),
    ],
)
def test_a_checkpoint_that_does_not_fit_fails_with_one_sentence(
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    forge: Callable[[Checkpoint], Checkpoint],
) -> None:
    """Whole by its digests, but of another configuration; `runs/test_hostile_files.py` has worse ones."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    put_back(folder, forge(newest(folder)))
    assert main(["resume", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "checkpoint" in error.splitlines()[-1]
    assert len(error.splitlines()[-1]) < 2000


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while its world model trained."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_part(folder, until=Point(0, "world_model", 1))
    return folder


@pytest.mark.slow
def test_environments_in_processes_of_their_own_go_on_exactly(whole: Path, tmp_path: Path) -> None:
    config = replace(SHORT, env=replace(SHORT.env, processes=True))
    for number, point in enumerate(POINTS):
        assert run_part(tmp_path / "run", config, until=point, resume=number > 0).stopped
    finish(tmp_path / "run", config)
    assert fingerprint(tmp_path / "run") == fingerprint(whole)


@pytest.mark.slow
def test_a_run_stopped_after_every_single_unit_ends_as_one_that_never_was(
    whole: Path, tmp_path: Path
) -> None:
    """Evaluations excepted: they begin anew each time, so they would never end."""
    folder = tmp_path / "run"
    phases = {
        "collect_random": range(2, 66, 2),
        "collect": range(2, 34, 2),
        "tokenizer": range(1, 5),
        "world_model": range(1, 3),
        "controller": range(1, 3),
    }
    points = [
        Point(epoch, phase, done)
        for epoch in range(2)
        for phase, units in phases.items()
        for done in units
        if (epoch, phase) not in ((1, "collect_random"), (1, "tokenizer"))
    ]
    for number, point in enumerate(points):
        assert run_part(folder, until=point, resume=number > 0).stopped, point
    finish(folder)
    assert fingerprint(folder) == fingerprint(whole)


@pytest.mark.slow
def test_atari_at_its_real_size_goes_on_exactly(tmp_path: Path) -> None:
    """The preset tiny with less training: four games, lives, frames of 64 x 64, a tokenizer that rests."""
    tiny = PRESETS["tiny"]
    few = {"updates_per_epoch": 3, "max_seconds": None}
    config = replace(
        tiny,
        tokenizer=replace(
            tiny.tokenizer,
            freeze_epoch=1,
            freeze_foreground_error=10.0,
            optim=replace(tiny.tokenizer.optim, **few),
        ),
        world_model=replace(tiny.world_model, optim=replace(tiny.world_model.optim, **few)),
        controller=replace(tiny.controller, optim=replace(tiny.controller.optim, **few)),
        schedule=replace(tiny.schedule, epochs=3, collect_epochs=3, collect_max_seconds=None),
        evaluation=replace(tiny.evaluation, max_seconds=None, max_steps=50, random_episodes=0),
    )
    run_part(tmp_path / "whole", config)
    points = [
        Point(0, "collect", 200),
        Point(1, "world_model", 2),
        Point(1, "controller", 1),
        Point(2, "collect", 4),
    ]
    for number, point in enumerate(points):
        assert run_part(tmp_path / "parts", config, until=point, resume=number > 0).stopped
    finish(tmp_path / "parts", config)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        replace(SHORT, controller=replace(SHORT.controller, cell="gru")),
        replace(SHORT, controller=replace(SHORT.controller, space="pixels", pixel_channels=(8, 8))),
        replace(SHORT, world_model=replace(SHORT.world_model, pop=False)),
        replace(SHORT, precision="bfloat16"),
        replace(
            SHORT,
            precision="bfloat16",
            tokenizer=replace(SHORT.tokenizer, kind="patches", patch_means=True),
            world_model=replace(
                SHORT.world_model,
                own_token_embedding=False,
                code_network=4,
                draw="groups",
                local_frames=2,
                local_outcomes=True,
                muon=True,
            ),
        ),
    ],
    ids=["gru", "pixels", "token by token", "bfloat16", "means of patches, drawn in groups"],
)
def test_every_kind_of_agent_goes_on_exactly(tmp_path: Path, config: Config) -> None:
    run_part(tmp_path / "whole", config)
    points = [
        Point(0, "collect", 10),
        Point(0, "controller", 1),
        Point(1, "collect", 4),
        Point(1, "world_model", 1),
    ]
    for number, point in enumerate(points):
        assert run_part(tmp_path / "parts", config, until=point, resume=number > 0).stopped
    finish(tmp_path / "parts", config)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
