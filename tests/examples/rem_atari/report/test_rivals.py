"""The file of blind policies: read with care; and when an agent has learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import RIVALS

from rem_atari.report.history import Returns
from rem_atari.report.rivals import Rivals, has_learned, learned_sentence, read_rivals


def rivals(path: Path, **changes: Any) -> Rivals | None:
    path.write_text(json.dumps(RIVALS | changes))
    return read_rivals(path)


def test_the_best_policy_that_sees_nothing_is_named(tmp_path: Path) -> None:
    found = rivals(tmp_path / "blind.json")
    assert list(found.returns) == ["random", "constant", "list", "scripted"]
    assert found.best_blind == "list"  # the scripted player sees the game
    assert found.returns["list"] == Returns(mean=6.5, standard_error=0.3, episodes=100)
    assert found.search_steps == 30_000


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"search_steps": "many"},
        {"policies": None},
        {"policies": {}},
        {"policies": {"random": 3}},
        {"policies": {"random": {"mean_return": None, "standard_error": 0.1, "games": 9}}},
        {"policies": {"random": {"mean_return": 1.0, "standard_error": "0.1", "games": 9}}},
        {"policies": {"scripted": {"mean_return": 1.0, "standard_error": 0.1, "games": 9}}},
    ],
)
def test_what_is_not_whole_is_as_if_not_there(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert rivals(tmp_path / "blind.json", **changes) is None
    assert read_rivals(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("mean", "error", "learned"),
    [(8.0, 0.4, False), (8.01, 0.4, True), (6.5, 0.0, False), (3.4, 0.1, False), (9.0, None, None)],
)
def test_learned_is_above_the_best_by_three_standard_errors(
    tmp_path: Path, mean: float, error: float | None, learned: bool | None
) -> None:
    found = rivals(tmp_path / "blind.json")
    agent = Returns(mean=mean, standard_error=error, episodes=100)
    assert has_learned(agent, found) is learned
    said = learned_sentence(agent, found)
    assert "best list of actions: mean return 6.50 ± 0.30 over 100 games" in said
    assert ("it has learned" in said) is (learned is True)
    assert ("over games of this one run" in said) is (learned is not None)
