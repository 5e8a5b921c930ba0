"""What a sweep would run, which needs no Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rem_atari.arguments import SweepArguments
from rem_atari.commands.sweep import plan
from rem_atari.config.presets import PRESETS
from rem_atari.errors import UsageError
from rem_atari.parsing import parse_arguments
from rem_atari.runs.folder import create_run_folder

TINY = PRESETS["tiny"]


def test_a_run_for_each_game_and_seed(tmp_path: Path) -> None:
    words = ["sweep", "--games", "all26", "Tennis", "MinAtar/Breakout-v1", "--seeds", "0", "5", "--cpus", "2"]
    runs = plan(parse_arguments([*words, "--preset", "paper", "--out", str(tmp_path)]))
    assert len(runs) == 2 * (26 + 2)
    assert [run.path.name for run in runs[-4:]] == [
        *("Tennis-0", "Tennis-5", "MinAtar_Breakout_v1-0", "MinAtar_Breakout_v1-5")
    ]
    assert {run.config.seed for run in runs} == {0, 5}
    assert {run.config.threads for run in runs} == {2}
    assert runs[-1].config.env.id == "MinAtar/Breakout-v1"
    assert (runs[0].config.env.id, runs[0].config.env.game) == (None, "Alien")
    assert runs[0].config.env == replace(PRESETS["paper"].env, game="Alien")


def test_without_games_and_seeds_it_is_the_preset(tmp_path: Path) -> None:
    (run,) = plan(SweepArguments(config=replace(TINY, seed=7), out=tmp_path))
    assert run.config == replace(TINY, seed=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"games": ("Pogn",)}, "there is no Atari game 'Pogn'; did you mean Pong"),
        ({"games": ("Pong", "Pong")}, "a game or a seed is named twice"),
        ({"seeds": (1, 1)}, "a game or a seed is named twice"),
        ({"cpus": 0}, "--cpus is 0"),
        ({"retries": -1}, "--retries -1"),
    ],
)
def test_wrong_use_is_found_before_anything_runs(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(SweepArguments(config=TINY, out=tmp_path, **changes))


def test_seeds_are_named_once() -> None:
    with pytest.raises(UsageError, match="--seeds and --seed are both given"):
        parse_arguments(["sweep", "--seeds", "1", "--seed", "2"])


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    create_run_folder(tmp_path / "Breakout-0", replace(TINY, env=replace(TINY.env, num_envs=7)))
    with pytest.raises(UsageError, match=r"Breakout-0 was begun with env.num_envs 7, not"):
        plan(SweepArguments(config=TINY, out=tmp_path))
