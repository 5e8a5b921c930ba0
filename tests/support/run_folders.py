"""Folders of runs as a training leaves them, made in a moment: fresh weights, no training."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.envs import make_env
from rem_atari.envs.vector import VectorEnv
from rem_atari.play.real_env import RealEnv
from rem_atari.replay.buffer import Replay
from rem_atari.runs.checkpoint import Checkpoint, save_checkpoint
from rem_atari.runs.config_file import config_text
from rem_atari.runs.folder import RunFolder, create_run_folder

DEBUG = replace(PRESETS["debug"], threads=0)
"""Without a say on torch's threads, which belong to the whole test run."""

RIVALS = {
    "schema": 1,
    "search_steps": 30_000,
    "policies": {
        "random": {"mean_return": 0.4, "standard_error": 0.05, "games": 100},
        "constant": {"mean_return": 0.6, "standard_error": 0.05, "games": 100, "lists": ["0"]},
        "list": {"mean_return": 6.5, "standard_error": 0.3, "games": 100, "lists": ["0 1 1"]},
        "scripted": {"mean_return": 22.0, "standard_error": 3.0, "games": 100},
    },
}
"""What `rem-atari blind` leaves in a run's folder, as far as others read it."""


def make_run(
    path: Path, config: Config = DEBUG, *, steps: tuple[int, ...] = (42,), epoch: int = 2
) -> RunFolder:
    """A run on a game of three actions with a checkpoint at each step, the last one after `epoch` epochs."""
    run = create_run_folder(path, config)
    for place, step in enumerate(steps):
        torch.manual_seed(step)
        agent = Agent.from_config(config, num_actions=3)
        complete = epoch - (len(steps) - 1 - place)
        state = {"epoch": complete, "env_steps": 10 * step, "action_names": ["left", "stay", "right"]}
        checkpoint = Checkpoint(step, agent.state_dict(), {}, state, config=config_text(config))
        save_checkpoint(run.checkpoints, checkpoint, keep=len(steps))
    return run


def add_replay(run: RunFolder, steps: int = 60) -> None:
    """Experience of a run: random play of its game in two environments."""
    config = run.load_config()
    side = config.env.frame_size
    replay = Replay((side, side, 3), steps, folder=run.replay, seed=0)
    envs = VectorEnv(partial(make_env, config.env, training=True), 2, seed=0)
    env = RealEnv(envs, Agent.from_config(config, num_actions=3).tokenizer, replay)
    env.reset()
    choose = np.random.default_rng(0)
    for _ in range(steps // 2):
        env.play(choose.integers(env.num_actions, size=2))
    replay.flush()
    env.close()


def make_scored_run(
    path: Path, game: str, score: float, *, seed: int = 0, epochs: int = 2, **evaluation: Any
) -> RunFolder:
    """A finished Atari run whose evaluation at the end of training had this mean return."""
    whole = {"max_steps": None, "max_seconds": None} | evaluation
    config = replace(
        PRESETS["paper"],
        seed=seed,
        env=replace(PRESETS["paper"].env, game=game),
        schedule=replace(PRESETS["paper"].schedule, epochs=epochs),
        evaluation=replace(PRESETS["paper"].evaluation, **whole),
    )
    run = create_run_folder(path, config)
    line = {"epoch": epochs - 1, "phase": "evaluate", "final": 1, "mean_return": score, "episodes": 100}
    run.metrics.write_text(json.dumps(line) + "\n")
    return run


def add_evaluation(run: RunFolder, step: int, **changes: Any) -> Path:
    """What `rem-atari evaluate` leaves for a checkpoint, as far as others read it."""
    summary = {"step": step, "epoch": 2, "env_steps": 300, "episodes": 50, "mean_return": 1.0}
    summary |= {"temperature": 0.5} | changes
    path = run.evaluation / f"step-{step:08d}" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(summary))
    return path


def files_in(folder: Path) -> set[str]:
    """Every file below a folder, by its path from there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
