"""`--config FILE`: settings of a file between the preset and the flags."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rem_atari.cli import main
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.parsing import parse_arguments
from rem_atari.runs.config_file import write_config

TOML = """
preset = "catch"
seed = 3

[env]
num_envs = 4

[world_model]
num_layers = 3
optim.lr = 1e-3

[controller]
channels = [16, 8]
"""


def configured(*words: str) -> Config:
    return parse_arguments(["train", *words]).config


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(TOML)
    return path


def test_a_file_overrides_its_preset_and_flags_override_both(toml: Path) -> None:
    config, catch = configured("--config", str(toml), "--seed", "5"), PRESETS["catch"]
    assert config.seed == 5
    assert config.env == replace(catch.env, num_envs=4)
    assert config.world_model.optim == replace(catch.world_model.optim, lr=1e-3)
    assert (config.world_model.num_layers, config.controller.channels) == (3, (16, 8))
    assert config.schedule == catch.schedule
    other = configured(f"--config={toml}", "--preset", "debug")
    assert other.preset == "debug"
    assert other.schedule == PRESETS["debug"].schedule
    assert other.world_model.num_layers == 3
    assert parse_arguments(["benchmark", "--config", str(toml)]).config.seed == 3


def test_a_run_is_repeated_by_its_own_configuration(tmp_path: Path) -> None:
    wanted = replace(PRESETS["debug"], seed=11)
    write_config(tmp_path / "config.json", wanted)
    assert configured("--config", str(tmp_path / "config.json")) == wanted


def test_a_game_in_the_file_wins_over_the_preset(tmp_path: Path) -> None:
    (tmp_path / "pong.json").write_text(json.dumps({"preset": "catch", "env": {"game": "Pong"}}))
    assert configured("--config", str(tmp_path / "pong.json")).env.id is None
    by_flag = configured("--config", str(tmp_path / "pong.json"), "--env.id", "MinAtar/Breakout-v1")
    assert by_flag.env.id == "MinAtar/Breakout-v1"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1]", "it holds list"),
        ("a.toml", "seed =", "cannot be read"),
        ("a.json", '{"preset": "nonsense"}', "there is no preset 'nonsense'"),
        ("a.json", '{"preset": ["catch"]}', "there is no preset"),
        ("a.json", '{"env": {"num_env": 1}}', "unknown field: env.num_env"),
        ("a.json", '{"env": 3}', "env is 3, wanted an object"),
        ("a.toml", 'seed = "one"', "seed is 'one', wanted int"),
        ("a.toml", "world_model.optim.lr = true", "world_model.optim.lr is True, wanted float"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    name: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["train", "--config", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml cannot be read" in capsys.readouterr().err
