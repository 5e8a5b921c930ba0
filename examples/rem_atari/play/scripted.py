"""Scripted players that see the game: an upper bound for small games.

They read the agent's frames cell by cell and know the meaning of the colours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from rem_atari.config import EnvConfig
from rem_atari.envs import catch, minatar
from rem_atari.play.blind import Policy

CATCH_CELLS = {"rem_atari/Catch-v0": 6, "rem_atari/Catch8-v0": 8}
"""Cells in a row of the registered boards."""

BREAKOUT_PADDLE, BREAKOUT_BALL, BREAKOUT_TRAIL = minatar.COLOURS[:3]
"""Colours of the first channels of MinAtar's Breakout; the trail is where the ball was one step before."""


def scripted_player(env: EnvConfig, action_names: Sequence[str]) -> Policy | None:
    """The scripted player of a game; None if there is none or frames do not show whole cells.

    Args:
        env: the game.
        action_names: its actions, in lower case.
    """
    script: Callable[[np.ndarray], int]
    if env.id in CATCH_CELLS:
        cells, stay, script = CATCH_CELLS[env.id], "stay", _towards_the_ball
    elif env.id is not None and re.fullmatch(rf"{minatar.NAMESPACE}Breakout-v\d", env.id):
        cells, stay, script = minatar.CELLS, "noop", _ahead_of_the_ball
    else:
        return None
    if env.frame_size % cells:
        return None
    moves = [action_names.index(name) for name in ("left", stay, "right")]
    return partial(_play, script, moves, env.frame_size // cells)


def _play(
    script: Callable[[np.ndarray], int], moves: Sequence[int], pixels: int, frame: np.ndarray, clock: int
) -> int:
    """The game's action for a script's move, -1, 0 or 1."""
    return moves[1 + script(frame[::pixels, ::pixels])]


def _towards_the_ball(cells: np.ndarray) -> int:
    """Catch: run under the ball, which falls straight."""
    paddle, ball = _cell(cells, catch.PADDLE), _cell(cells, catch.BALL)
    return 0 if paddle is None or ball is None else int(np.sign(ball[1] - paddle[1]))


def _ahead_of_the_ball(cells: np.ndarray) -> int:
    """Breakout: run to the column where the ball, which flies diagonally, will be next.

    Its direction is that from its trail, unless it has just bounced: at a wall it stayed in its column, and a
    paddle that met it from the front sends it back.
    """
    paddle, ball, trail = (
        _cell(cells, colour) for colour in (BREAKOUT_PADDLE, BREAKOUT_BALL, BREAKOUT_TRAIL)
    )
    if paddle is None or ball is None:  # behind a brick
        return 0
    last = minatar.CELLS - 1
    going = 0 if trail is None else ball[1] - trail[1]
    if going == 0:
        going = {0: 1, last: -1}.get(ball[1], 0)
    elif ball[0] == trail[0] == last - 1 and paddle[1] == ball[1]:
        going = -going
    return int(np.sign(min(max(ball[1] + going, 0), last) - paddle[1]))


def _cell(cells: np.ndarray, colour: Sequence[int] | np.ndarray) -> tuple[int, int] | None:
    """Row and column of the first cell of a colour, or None."""
    found = np.argwhere((cells == np.asarray(colour)).all(axis=-1))
    return (int(found[0, 0]), int(found[0, 1])) if len(found) else None
