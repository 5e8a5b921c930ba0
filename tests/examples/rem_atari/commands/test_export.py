"""`rem-atari export`: a folder that acts, dreams and is evaluated as its run, and says what it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import DEBUG, add_replay, files_in, make_run

from rem_atari import load_agent
from rem_atari.cli import main
from rem_atari.config import Config
from rem_atari.runs.checkpoint import CheckpointError
from rem_atari.runs.exported import read_about
from rem_atari.runs.folder import RunFolder
from rem_atari.runs.trained import BUNDLED, list_bundled

FILES = {"agent.json", "model.safetensors", "starts.npz", "metrics.jsonl", "README.md"}

TRAINED_ELSEWHERE = replace(
    DEBUG, tokenizer=replace(DEBUG.tokenizer, lpips_weights="/home/somebody/lpips.safetensors")
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make_run(tmp_path_factory.mktemp("export") / "run", TRAINED_ELSEWHERE)
    add_replay(run)
    line = {"epoch": 0, "phase": "random", "mean_return": -0.5, "episodes": 4, "returns": [-1, 0, -1, 0]}
    run.metrics.write_text(json.dumps(line) + "\n")
    return run


@pytest.fixture(scope="module")
def exported(run: RunFolder) -> Path:
    out = run.path.parent / "agent"
    assert main(["export", str(run.path), str(out), "--starts", "10", "--episodes", "3"]) == 0
    return out


def damage(folder: Path, name: str, copy: Path) -> Path:
    """A copy of an exported agent with one bit of a file flipped."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            data = bytearray(path.read_bytes())
            if path.name == name:
                data[len(data) // 2] ^= 1
            (copy / path.name).write_bytes(data)
    return copy


def change_metrics(folder: Path, data: bytes | None) -> None:
    """Give an exported agent another record of its training, or none."""
    path = folder / "metrics.jsonl"
    about = read_about(folder)
    if data is None:
        path.unlink()
        del about["files"][path.name]
    else:
        path.write_bytes(data)
        about["files"][path.name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "agent.json").write_text(json.dumps(about))


def test_it_is_the_agent_of_the_run(run: RunFolder, exported: Path) -> None:
    assert files_in(exported) >= FILES
    agent, original = load_agent(exported), load_agent(run.path)
    for name, tensor in original.networks.state_dict().items():
        assert torch.equal(agent.networks.state_dict()[name], tensor), name
    assert agent.action_names == original.action_names
    assert agent.sees == "the game's images, 24 x 24, as 24 x 24 pixels"
    assert len(agent.starts) == 10
    known = {frames.tobytes() for frames in original.starts.frames}
    assert all(frames.tobytes() in known for frames in agent.starts.frames)
    dreams = [each.imagine(each.dream(agent.starts, seed=1), 2) for each in (agent, original)]
    assert np.array_equal(dreams[0].tokens, dreams[1].tokens)


def test_it_says_what_it_is_and_nothing_of_the_machine(exported: Path) -> None:
    about = read_about(exported)
    assert about["figures"]["agent"]["episodes"] == 3
    assert about["figures"]["random_play"]["mean"] == -0.5
    card = (exported / "README.md").read_text()
    for words in (
        "plays Catch",
        "over 3 games",
        "random play: -0.50 ± 0.29 over 4 games",
        "left, stay, right",
    ):
        assert words in card
    assert "rem-atari train --preset debug" in card
    assert "/home" not in card + (exported / "agent.json").read_text()
    assert Config.from_dict(about["config"]).device == "cpu"


def test_half_takes_half_the_room(run: RunFolder, exported: Path, tmp_path: Path) -> None:
    words = ["export", str(run.path), str(tmp_path / "half"), "--half", "--episodes", "0"]
    assert main(words) == main(words) == 0, "an exported agent may be replaced"
    whole, half = ((folder / "model.safetensors").stat().st_size for folder in (exported, tmp_path / "half"))
    assert half < 0.6 * whole
    agent, original = load_agent(tmp_path / "half"), load_agent(exported)
    for name, tensor in agent.networks.state_dict().items():
        wanted = original.networks.state_dict()[name]
        assert tensor.dtype == wanted.dtype
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-4)
    assert "It was not measured." in (tmp_path / "half" / "README.md").read_text()


def test_what_its_run_measured_goes_along(run: RunFolder, exported: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["export", str(exported), str(again), "--episodes", "0", "--starts", "10"]) == 0
    for folder in (exported, again):
        assert (folder / "metrics.jsonl").read_bytes() == run.metrics.read_bytes()
    change_metrics(again, None)
    third = tmp_path / "third"
    for source, has_metrics in ((exported, True), (again, False)):
        assert main(["export", str(source), str(third), "--episodes", "0", "--starts", "10"]) == 0
        assert (third / "metrics.jsonl").exists() == has_metrics


def test_its_report_plays_the_games_that_it_measures(exported: Path, tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    shutil.copytree(exported, agent)
    training = {"epoch": 0, "env_steps": 500, "phase": "world_model", "updates": 7, "tokens": 0.5}
    change_metrics(agent, (agent / "metrics.jsonl").read_bytes() + json.dumps(training).encode() + b"\n")
    assert main(["report", str(agent), "--games", "3"]) == 0
    page, quality = (agent / "report.html").read_text(), json.loads((agent / "quality.json").read_text())
    assert "An exported agent: 3 games each of it and of random play were played for this page" in page
    assert page.count("over 3 games") >= 2
    assert "1 epoch, " in page
    assert f"rem-atari play {agent}" in page
    assert quality["step"] == 42
    assert quality["rewards"]["steps"] > 0
    assert {"media/imagination.gif", "media/reconstructions.png"} <= files_in(agent)
    assert not (agent / "tensorboard").exists()


def test_its_report_tells_what_it_came_without(exported: Path, tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    shutil.copytree(exported, agent)
    change_metrics(agent, None)
    assert main(["report", str(agent), "--games", "2"]) == 0
    page = (agent / "report.html").read_text()
    assert "The agent came without a record of its training." in page
    assert "never trained: what it does below" not in page


def test_wrong_use_of_its_report_is_one_sentence(
    run: RunFolder, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, answer in (
        ([str(exported), "--games", "1"], "--games is 1, wanted at least 2"),
        ([str(run.path), "--games", "4"], "--games is for exported agents"),
        ([str(run.path / "checkpoints" / "step-00000042")], "is a checkpoint; name the folder of its run"),
        ([str(tmp_path)], "is not a run folder"),
        (["nobody"], "there is no agent 'nobody'"),
    ):
        assert main(["report", *words]) == 2
        assert answer in capsys.readouterr().err


def test_evaluate_and_record_take_it(exported: Path) -> None:
    assert main(["evaluate", str(exported), "--episodes", "2", "--no-videos"]) == 0
    assert main(["record", str(exported), "--steps", "3", "--format", "gif"]) == 0
    assert {"evaluation/step-00000042/summary.json", "media/play-step-00000042.gif"} <= files_in(exported)
    assert load_agent(exported).num_actions == 3


@pytest.mark.parametrize("name", ["model.safetensors", "starts.npz"])
def test_damage_is_found(exported: Path, tmp_path: Path, name: str) -> None:
    copy = damage(exported, name, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=f"is damaged: {name} does not have the sha256"):
        _ = load_agent(copy).starts
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        _ = load_agent(copy).starts


def test_a_record_of_its_training_that_is_not_its_own_is_found_before_any_game(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damage(exported, "metrics.jsonl", tmp_path / "copy")
    assert load_agent(copy).num_actions == 3
    for words in (["report", str(copy)], ["export", str(copy), str(tmp_path / "out"), "--starts", "10"]):
        assert main(words) == 1
        told = capsys.readouterr().err
        assert "is damaged: metrics.jsonl does not have the sha256" in told
        assert "playing" not in told
    (copy / "metrics.jsonl").unlink()
    assert main(["report", str(copy)]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["media", "evaluation"])
def test_its_folder_leads_nowhere_else(
    exported: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damage(exported, "", tmp_path / "copy")
    (tmp_path / "victim").mkdir()
    (copy / name).symlink_to(tmp_path / "victim")
    for command in ("report", "evaluate", "record"):
        assert main([command, str(copy)]) == 2
        assert f"{copy / name} is a link" in capsys.readouterr().err
    assert not any((tmp_path / "victim").iterdir())


def test_what_it_says_is_not_trusted(exported: Path, tmp_path: Path) -> None:
    copy = damage(exported, "", tmp_path / "copy")
    for change, words in (
        ({"format": "other"}, "not in the format"),
        ({"files": []}, "its files is"),
        ({"config": {}}, "missing field"),
    ):
        about = json.loads((exported / "agent.json").read_text()) | change
        (copy / "agent.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match=words):
            load_agent(copy)


def test_wrong_use_is_one_sentence(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for words, answer in (
        ([str(run.path), str(tmp_path / "taken")], "holds something else"),
        ([str(run.path), str(tmp_path / "new"), "--starts", "0"], "--starts is 0, wanted at least 1"),
        ([str(run.path), str(tmp_path / "new"), "--episodes", "-1"], "--episodes is -1, wanted at least 0"),
        ([str(tmp_path), str(tmp_path / "new")], "is not a run folder"),
    ):
        assert main(["export", *words]) == 2
        assert answer in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_found_before_any_game(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "bundled").touch()
    monkeypatch.chdir(tmp_path)
    for words in (["export", str(run.path), str(tmp_path / "file" / "agent")], ["report", "catch"]):
        assert main(words) == 1
        told = capsys.readouterr().err
        assert "Not a directory" in told
        assert "playing" not in told


@pytest.mark.parametrize("name", list_bundled())
def test_what_comes_with_the_package_is_small_and_dreams(name: str) -> None:
    assert sum(path.stat().st_size for path in (BUNDLED / name).iterdir()) < 2_000_000
    agent = load_agent(name)
    dream = agent.imagine(agent.dream(agent.starts.select([0, 1])), 0)
    assert agent.decode(dream.tokens).shape == (2, *agent.frame_shape)
    assert read_about(BUNDLED / name)["figures"]["agent"]["episodes"] >= 100


def test_these_agents_come_with_the_package() -> None:
    assert list_bundled() == ["breakout", "catch", "krull"]
