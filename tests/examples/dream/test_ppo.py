"""The example: what PPO learns in the dream of Catch holds in the real game."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (extra `interplay`)")

SCRIPT = Path(__file__).parents[3] / "examples" / "dream" / "ppo.py"


@pytest.mark.slow
def test_ppo_that_only_dreamt_plays_the_real_game(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("dream_ppo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["catch", "--steps", "8192", "--games", "100"]) >= 0.8
    assert "after 8,192 dreamt steps" in capsys.readouterr().out
