"""The presets: named, checked, and each the size that it promises."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.errors import UsageError
from rem_atari.training.schedule import plan_run
from rem_atari.training.setup import check_config


def differences(ours: Any, theirs: Any, path: str = "") -> dict[str, Any]:
    """Values of `ours` by dotted path where they differ from `theirs`."""
    found: dict[str, Any] = {}
    for field in fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if is_dataclass(mine):
            found |= differences(mine, other, f"{path}{field.name}.")
        elif mine != other:
            found[f"{path}{field.name}"] = mine
    return found


def test_presets_know_their_names() -> None:
    assert list(PRESETS) == ["debug", "tiny", "catch", "minatar", "small", "paper"]
    assert all(preset.preset == name for name, preset in PRESETS.items())


def test_paper_is_the_defaults_with_the_published_defects() -> None:
    assert differences(PRESETS["paper"], Config()) == {
        "controller.burn_in_actions": False,
        "controller.mask_after_end": False,
    }


@pytest.mark.parametrize("name", ["debug", "tiny", "catch", "minatar", "small"])
def test_cpu_presets_can_be_trained(name: str) -> None:
    config = PRESETS[name]
    check_config(config)
    agent = Agent.from_config(config, num_actions=4)
    assert sum(parameter.numel() for parameter in agent.parameters()) < 1_000_000


def test_paper_needs_the_perceptual_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"--tokenizer\.perceptual-weight 0 trains without"):
        check_config(PRESETS["paper"])


def test_tiny_is_an_atari_agent_bounded_by_time() -> None:
    config = PRESETS["tiny"]
    agent = Agent.from_config(config, num_actions=4)
    assert config.env.id is None
    assert config.env.frame_size == 64
    assert agent.tokenizer.num_tokens == 64
    assert config.world_model.embed_dim == 64
    assert config.world_model.num_layers == 2
    assert config.schedule.epochs == 5
    steps = config.schedule.random_steps + config.schedule.collect_epochs * config.schedule.steps_per_epoch
    assert steps == 3_000


def test_tiny_finishes_within_five_minutes_on_the_slowest_machine() -> None:
    """The rest of the five minutes is for what has no bound: building, checkpoints, the report."""
    bounds = [work.max_seconds for work in plan_run(PRESETS["tiny"])]
    assert all(bound is not None for bound in bounds)
    assert sum(bounds) <= 255


@pytest.mark.parametrize("name", ["debug", "catch", "minatar"])
def test_presets_for_small_games_are_decided_by_counts_alone(name: str) -> None:
    """No bound on time, so that a seed gives one result."""
    config = PRESETS[name]
    if name == "minatar":
        assert (config.env.id, config.env.frame_size) == ("MinAtar/Breakout-v1", 40)
    else:
        assert (config.env.id, config.env.frame_size) == ("rem_atari/Catch-v0", 24)
    assert {path for path in differences(config, Config()) if path.endswith("max_seconds")} == set()
