"""What a run is made of: compiled networks, and environments that are closed where it does not start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from short_runs import SHORT, fingerprint, run_part

from rem_atari.config import Config
from rem_atari.envs.vector import VectorEnv
from rem_atari.errors import UsageError
from rem_atari.training.setup import prepare_training

COMPILED = replace(SHORT, compile=True)


def test_the_networks_are_compiled_and_nothing_else_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch's compiler: what is given to it, that it is called, and that names in files stay."""
    calls: list[int] = []

    def compile_nothing(function: Callable, *arguments: object, **options: object) -> Callable:
        place = len(calls)
        calls.append(0)

        @wraps(function)
        def call(*arguments: object, **options: object) -> object:
            calls[place] += 1
            return function(*arguments, **options)

        return call

    run_part(tmp_path / "plain")
    assert calls == []
    monkeypatch.setattr(torch, "compile", compile_nothing)
    run_part(tmp_path / "compiled", COMPILED)
    # The tokenizer's encoder and decoder, the world model's decoder, the controller's CNN.
    assert len(calls) == 4
    assert all(calls), calls
    assert fingerprint(tmp_path / "compiled") == fingerprint(tmp_path / "plain")


@pytest.mark.slow
def test_a_compiled_run_is_trained_saved_and_resumed(tmp_path: Path) -> None:
    """torch's compiler itself, a minute of it; the tokenizer's first updates are close to the plain ones."""
    config = replace(COMPILED, schedule=replace(COMPILED.schedule, epochs=1, collect_epochs=1))
    run_part(tmp_path / "plain", replace(config, compile=False))
    run_part(tmp_path / "compiled", config)
    plain, compiled = (fingerprint(tmp_path / name) for name in ("plain", "compiled"))
    for ours, theirs in zip(compiled["metrics"], plain["metrics"], strict=True):
        assert ours["phase"] == theirs["phase"]
        if ours["phase"] == "tokenizer":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert not run_part(tmp_path / "compiled", COMPILED, resume=True).stopped


@pytest.mark.parametrize(
    "config",
    [
        replace(SHORT, env=replace(SHORT.env, frame_size=23)),
        replace(SHORT, world_model=replace(SHORT.world_model, context_blocks=4)),
    ],
    ids=["tokenizer", "world model"],
)
def test_environments_are_closed_where_the_agent_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    closed = []
    close = VectorEnv.close
    monkeypatch.setattr(VectorEnv, "close", lambda envs: closed.append(envs) or close(envs))
    with pytest.raises(UsageError), prepare_training(config):
        pytest.fail("it cannot be built")
    assert len(closed) == 1
