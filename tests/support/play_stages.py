"""A stage for the page of `rem-atari play`: an agent with fresh weights whose dreams do not end."""

from __future__ import annotations

from pathlib import Path

import torch
from run_folders import DEBUG, add_replay, make_run

from rem_atari.commands.play import make_stage
from rem_atari.config import Config
from rem_atari.playground.server import Stage
from rem_atari.runs.trained import load_trained


def make_test_stage(path: Path, config: Config = DEBUG, *, replay: bool = True) -> Stage:
    """The stage of a run of Catch made at `path`.

    Its policy is random, and its dreams never end. Where `replay` is on, the run has recorded games.
    """
    run = make_run(path, config)
    if replay:
        add_replay(run)
    trained = load_trained(run.path, step="newest", device=None, say=print)
    with torch.no_grad():
        trained.agent.world_model.end_head[-1].bias.copy_(torch.tensor([100.0, -100.0]))
    return make_stage(trained, name=str(run.path), seed=0)
