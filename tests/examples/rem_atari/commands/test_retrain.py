"""`rem-atari retrain`: a fresh controller in the dreams of a run, which stays as it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import DEBUG, add_replay, make_run

from rem_atari.arguments import RetrainArguments
from rem_atari.cli import main
from rem_atari.commands import retrain as retrain_command
from rem_atari.parsing import parse_arguments
from rem_atari.runs.folder import RunFolder
from rem_atari.training.component import Component

LITTLE = ("--updates", "12", "--games", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    controller = replace(DEBUG.controller, entropy_weight=0.07, uses=2)
    run = make_run(tmp_path_factory.mktemp("retrain") / "run", replace(DEBUG, controller=controller))
    add_replay(run)
    return run


def bytes_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What the command prints, but for the seconds, which differ from call to call."""
    assert main(["retrain", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [re.sub(r"^( *\d+ +)\d+", r"\1", line) for line in lines]


def test_a_table_of_the_updates_and_the_mean_return(run, capsys):
    before = bytes_in(run.path)
    lines = said(capsys, str(run.path), *LITTLE)
    assert lines[0].split() == ["updates", "seconds", "imagined_return", "entropy", "value", "grad_norm"]
    assert [line.split()[0] for line in lines[2:8]] == ["2", "4", "6", "8", "10", "12"]
    assert re.fullmatch(r"mean return -?[\d.]+ ± [\d.]+ over 2 games at temperature 0\.5", lines[8])
    assert bytes_in(run.path) == before


def test_it_is_repeated_by_its_seed(run, capsys):
    first, again, other = (
        said(capsys, str(run.path), "--updates", "6", "--games", "0", "--seed", seed)
        for seed in ("0", "0", "1")
    )
    assert first == again
    assert first != other


def test_the_world_model_stays_and_the_controller_starts_anew(run, monkeypatch):
    """Nothing of the run's controller is left, and its flags are those that train."""
    seen = []
    make = Component.__init__

    def spy(self, name, module, config, **options):
        seen.append((name, config.lr, {key: value.clone() for key, value in module.state_dict().items()}))
        make(self, name, module, config, **options)

    monkeypatch.setattr(Component, "__init__", spy)
    agents = []
    play = retrain_command.evaluate
    monkeypatch.setattr(
        retrain_command,
        "evaluate",
        lambda agent, *rest, **named: agents.append(agent) or play(agent, *rest, **named),
    )
    loaded = retrain_command.load_trained(run.path, step="newest", device=None, say=print).agent
    assert main(["retrain", str(run.path), *LITTLE, "--controller.optim.lr", "0.5"]) == 0
    ((name, lr, fresh),) = seen
    assert (name, lr) == ("controller", 0.5)
    weight = "actor.weight"
    assert not torch.equal(fresh[weight], loaded.controller.state_dict()[weight])
    (played,) = agents
    assert not torch.equal(fresh[weight], played.controller.state_dict()[weight])
    for part in ("tokenizer", "world_model"):
        kept, after = (getattr(agent, part).state_dict() for agent in (loaded, played))
        assert all(torch.equal(kept[key], after[key]) for key in kept)


def test_flags_have_the_values_of_the_run(run):
    for words in ([str(run.path), "--updates", "6"], ["--updates", "6", str(run.path)]):
        arguments = parse_arguments(["retrain", *words, "--controller.mean-rewards"])
        assert isinstance(arguments, RetrainArguments)
        assert arguments.controller == replace(run.load_config().controller, mean_rewards=True)


def test_wrong_use_is_named(run, tmp_path, capsys):
    without_replay = make_run(tmp_path / "run").path
    for words, wanted in (
        ([str(without_replay)], "has no replay, which dreams begin in; name the folder of a run"),
        (["krull"], "has no replay, which dreams begin in; name the folder of a run"),
        ([str(run.path), "--updates", "5"], "--updates is 5, wanted at least 6"),
        ([str(run.path), "--games", "-1"], "--games is -1, wanted at least 0"),
        ([str(run.path), "--controller.horizon", "1"], "controller.horizon is 1"),
        ([str(tmp_path / "none")], "none"),
    ):
        assert main(["retrain", *words]) == 2
        assert wanted in capsys.readouterr().err.splitlines()[-1]
