"""``rem-atari record RUN``: a film of the game, its reconstruction and the imagination."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rem_atari.arguments import RecordArguments
from rem_atari.commands.counting import counting, tell
from rem_atari.commands.evaluate import film_fps
from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.evaluation import playing_conditions
from rem_atari.films.side_by_side import Moment, draw, play
from rem_atari.films.video import check_video_path, save_video
from rem_atari.runs.trained import load_trained
from rem_atari.training.setup import check_config


def record(arguments: RecordArguments) -> None:
    """Film the agent, and print the path of the film.

    Raises:
        UsageError: a value is out of its range, or there is no such run, checkpoint or device.
        RunError: no checkpoint can be used, or the film cannot be written.
    """
    _check(arguments)
    trained = load_trained(arguments.run, step=arguments.step, device=arguments.device, say=tell)
    config = playing_conditions(trained.config, temperature=arguments.temperature)
    check_config(config)
    path = arguments.out or trained.run.media / f"play-step-{trained.step:08d}.{arguments.format}"
    check_video_path(path)
    dream_steps = arguments.dream_steps or default_dream_steps(config)
    fps = film_fps(config) if arguments.fps is None else arguments.fps
    moments = play(trained.agent, config, steps=arguments.steps, dream_steps=dream_steps, seed=arguments.seed)
    with counting("filming", arguments.steps + 1, "frames") as advance:
        save_video(path, _pictures(moments, dream_steps, advance), fps)
    print(f"film: {path}")


def default_dream_steps(config: Config) -> int:
    """Steps that the world model imagines: the length of its training sequences without the context."""
    return max(1, config.world_model.sequence_blocks - config.world_model.context_blocks)


def _check(arguments: RecordArguments) -> None:
    for flag, value in (("--steps", arguments.steps), ("--dream-steps", arguments.dream_steps)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}, wanted at least 1")
    if arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}, wanted at least 0")
    if arguments.fps is not None and not (math.isfinite(arguments.fps) and arguments.fps > 0):
        raise UsageError(f"--fps is {arguments.fps}, wanted more than 0")
    if arguments.out is not None:
        _check_folder(arguments.out)


def _check_folder(path: Path) -> None:
    check_video_path(path)
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; wanted the name of a file")


def _pictures(
    moments: Iterator[Moment], dream_steps: int, advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for moment in moments:
        if moment.ending is not None:
            yield draw(moment.ending, dream_steps)
        yield draw(moment, dream_steps)
        advance(1)
