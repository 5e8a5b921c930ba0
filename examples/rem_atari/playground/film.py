"""A film of what was played: the game and the dream side by side, moment by moment."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rem_atari.films.panels import Panel, draw_panels
from rem_atari.films.video import save_video
from rem_atari.playground.session import Moment


def make_film(path: Sequence[Moment], action_names: Sequence[str], ending: str, fps: float) -> bytes:
    """The file of a film.

    Args:
        path: the moments, oldest first, at least one.
        action_names: a name for each action.
        ending: "gif" or "mp4".
        fps: moments a second.

    Raises:
        RunError: the film cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="rem-atari-") as folder:
        file = Path(folder) / f"film.{ending}"
        save_video(file, (_draw(moment, action_names) for moment in path), fps)
        return file.read_bytes()


def _draw(moment: Moment, action_names: Sequence[str]) -> np.ndarray:
    game, dream = moment.game, moment.dream
    step = f"step {moment.step}"
    if moment.action is not None:
        step += f": {action_names[moment.action]}"
    if game is None:
        real = Panel(dream.frame, "the game", step, "unknown", faded=True)
    else:
        told = _told(game.reward, "return", game.total)
        real = Panel(game.frame, "the game", step, f"game over, {told}" if game.over else told)
    steps, reward = dream.dream.steps, 0.0 if dream.stands else float(dream.dream.rewards[0])
    slept = f"dreamt step {steps}" if steps else "is shown the game"
    told = "the dream is over" if dream.stands else _told(reward, "dreamt return", dream.total)
    return draw_panels([real, Panel(dream.frame, "the dream", slept, told, faded=dream.over)])


def _told(reward: float, name: str, total: float) -> str:
    return f"{name} {total:g}" + (f", reward {reward:+g}" if reward else "")
