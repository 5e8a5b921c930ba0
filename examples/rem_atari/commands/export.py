"""``rem-atari export RUN OUT``: a trained agent as a small folder to keep, share and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import torch

from rem_atari.arguments import ExportArguments
from rem_atari.commands.counting import counting, tell
from rem_atari.errors import RunError, UsageError, describe_os_error
from rem_atari.evaluation import evaluate, make_test_envs, playing_conditions
from rem_atari.inference.loading import load_starts
from rem_atari.report.history import MetricLine, Returns, returns_of
from rem_atari.runs.checkpoint import Checkpoint
from rem_atari.runs.durable import make_writable
from rem_atari.runs.exported import is_exported, movable, write_exported
from rem_atari.runs.model_card import model_card
from rem_atari.runs.reading import read_json_lines
from rem_atari.runs.trained import TrainedAgent, build_agent, load_trained
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import check_config


def export(arguments: ExportArguments) -> None:
    """Write the agent, after some games for its model card, and print the folder and its size.

    Raises:
        UsageError: a value is out of its range, there is no such agent, or OUT holds something else.
        RunError: the folder cannot be written.
    """
    _check(arguments)
    trained = load_trained(arguments.run, step=arguments.step, device="cpu", say=tell)
    checkpoint = _checkpoint_of(trained, half=arguments.half)
    config = movable(trained.config)
    trained = replace(trained, config=config, agent=build_agent(config, checkpoint))
    starts = load_starts(trained, arguments.starts)
    metrics = trained.metrics
    lines = [] if metrics is None else read_json_lines(metrics)[0]
    try:
        make_writable(arguments.out)
    except OSError as error:
        raise RunError(describe_os_error(error)) from error
    figures = _measure(trained, arguments.episodes, lines)
    try:
        write_exported(
            arguments.out,
            config,
            checkpoint,
            starts,
            card=model_card(trained, figures),
            figures=figures,
            metrics=None if metrics is None else metrics.read_bytes(),
        )
    except OSError as error:
        raise RunError(describe_os_error(error)) from error
    size = sum(path.stat().st_size for path in arguments.out.iterdir() if path.is_file())
    print(f"exported: {arguments.out}, {size / 1e6:.2f} MB, {len(starts)} starts")


def _check(arguments: ExportArguments) -> None:
    if arguments.starts < 1:
        raise UsageError(f"--starts is {arguments.starts}, wanted at least 1")
    if arguments.episodes < 0:
        raise UsageError(f"--episodes is {arguments.episodes}, wanted at least 0")
    out = arguments.out
    is_free = not out.exists() or is_exported(out) or (out.is_dir() and not any(out.iterdir()))
    if out.is_symlink() or not is_free:
        raise UsageError(f"{out} holds something else; wanted a new or empty folder, or an exported agent")


def _checkpoint_of(trained: TrainedAgent, *, half: bool) -> Checkpoint:
    """The weights, in float16 with `half`."""
    weights = trained.agent.state_dict()
    if half:
        floats = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
        weights = {name: tensor.half() if name in floats else tensor for name, tensor in weights.items()}
    return Checkpoint(step=trained.step, model=weights, optimizer={}, state=_state_of(trained))


def _state_of(trained: TrainedAgent) -> Mapping[str, Any]:
    """The noted properties of the agent; runs of earlier versions lack what it sees."""
    if trained.sees is not None:
        return trained.state
    with closing(make_test_envs(trained.config, 1, seed=0)) as envs:
        return {**trained.state, "sees": envs.sees}


def _measure(trained: TrainedAgent, episodes: int, lines: Sequence[MetricLine]) -> dict[str, Any]:
    """Returns of the agent over some games, and of random play as its run measured it in these lines."""
    if episodes == 0:
        return {}
    config = playing_conditions(trained.config)
    check_config(config)
    with counting("playing", episodes, "games") as advance:
        result = evaluate(
            trained.agent,
            config,
            episodes=episodes,
            seed=derive_seed(0, "evaluate"),
            after_step=lambda ended: advance(ended) if ended else None,
        )
    figures = {
        "agent": asdict(Returns(mean=result.mean, standard_error=result.standard_error, episodes=episodes))
    }
    random = returns_of(lines, "random")
    return figures if random is None else figures | {"random_play": asdict(random)}
