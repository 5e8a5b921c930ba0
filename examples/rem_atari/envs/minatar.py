"""MinAtar's five small games, drawn as pixels.

A game is a board of 10 by 10 cells. Here each cell is a square of one colour, and a gymnasium id names the
game: MinAtar/Breakout-v1 with only the actions that the game uses, MinAtar/Breakout-v0 with all six.

Source: MinAtar, arXiv 1903.03176; the package ``minatar`` (GPL-3) is installed beside this one, by its extra.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from rem_atari.config import MinAtarConfig
from rem_atari.envs.errors import UnknownGameError, needs_extra
from rem_atari.envs.frames import frame_space

NAMESPACE = "MinAtar/"

GAMES = {
    "Asterix": "asterix",
    "Breakout": "breakout",
    "Freeway": "freeway",
    "Seaquest": "seaquest",
    "SpaceInvaders": "space_invaders",
}
"""MinAtar's names of the games by those in gymnasium's ids."""

ACTIONS = ("noop", "left", "up", "right", "down", "fire")

CELLS = 10
"""Cells in a row and in a column."""

COLOURS = np.array(
    [
        (80, 160, 255),
        (255, 255, 255),
        (255, 150, 0),
        (220, 50, 60),
        (60, 200, 90),
        (240, 230, 60),
        (200, 80, 220),
        (60, 210, 210),
        (150, 100, 50),
        (150, 150, 150),
    ],
    dtype=np.uint8,
)
"""A colour for each of a game's channels; an empty cell is black."""


def make_minatar(name: str, cfg: MinAtarConfig, *, frame_size: int) -> gymnasium.Env:
    """The game of the id `name`; its frames have at least `frame_size` pixels, a whole number to a cell.

    Raises:
        UnknownGameError: there is no such id.
        MissingExtraError: MinAtar is not installed.
    """
    match = re.fullmatch(rf"{NAMESPACE}(\w+)-v([01])", name)
    if match is None or match[1] not in GAMES:
        ids = [f"{NAMESPACE}{game}-v1" for game in GAMES]
        close = difflib.get_close_matches(name, ids, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(ids)}."
        raise UnknownGameError(f"There is no MinAtar game {name!r}; {hint}")
    return MinAtar(
        GAMES[match[1]],
        cell_pixels=-(-frame_size // CELLS),
        sticky_actions=cfg.sticky_actions,
        difficulty_ramping=cfg.difficulty_ramping,
        all_actions=match[2] == "0",
    )


class MinAtar(gymnasium.Env[np.ndarray, int]):
    """A game of MinAtar with frames of pixels.

    Where objects share a cell, its colour is the mean of theirs, so that none hides another (in MinAtar's own
    pictures the trail of an enemy hides the player on it). The same seed gives the same games, and a game
    does not repeat the last action of the game before it (MinAtar 1.0.15 takes no seed and does carry the
    last action over).

    Args:
        game: MinAtar's name of it.
        cell_pixels: pixels along a cell's side; frames are 10 times as high and wide.
        sticky_actions: probability that a step repeats the previous action.
        difficulty_ramping: whether the game becomes harder over time.
        all_actions: offer all six actions, not only those that the game uses.
        render_mode: "rgb_array", whose picture is the frame itself, or None.

    Raises:
        MissingExtraError: MinAtar is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's attribute)

    def __init__(
        self,
        game: str,
        *,
        cell_pixels: int = 4,
        sticky_actions: float = 0.1,
        difficulty_ramping: bool = True,
        all_actions: bool = False,
        render_mode: str | None = None,
    ) -> None:
        with needs_extra("minatar"):
            from minatar import Environment
        self._game = Environment(game, sticky_actions, difficulty_ramping)
        self._actions = range(len(ACTIONS)) if all_actions else self._game.minimal_action_set()
        self._cell_pixels = cell_pixels
        self._is_seeded = False
        self.observation_space = frame_space(CELLS * cell_pixels)
        self.action_space = Discrete(len(self._actions))
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a game."""
        super().reset(seed=seed)
        if seed is not None or not self._is_seeded:
            self._game.seed(int(self.np_random.integers(2**32)))
            self._is_seeded = True
        self._game.reset()
        self._game.last_action = 0
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one of the game's actions; MinAtar itself never cuts a game short."""
        reward, is_over = self._game.act(self._actions[action])
        return self._frame(), float(reward), bool(is_over), False, {}

    def render(self) -> np.ndarray | None:
        """The frame, if the render mode asks for it."""
        return self._frame() if self.render_mode == "rgb_array" else None

    def get_action_meanings(self) -> list[str]:
        """The meanings of the actions, in ale-py's form."""
        return [ACTIONS[action].upper() for action in self._actions]

    def get_resume_state(self) -> dict[str, Any]:
        """Everything that changes during a game, its random numbers included."""
        random = self._game.random.get_state(legacy=False)
        return {
            "game": {name: _to_json(value) for name, value in self._variables().items()},
            "last_action": int(self._game.last_action),
            "random": {**random, "state": {**random["state"], "key": random["state"]["key"].tolist()}},
            "is_seeded": self._is_seeded,
        }

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Continue from a `get_resume_state`.

        Raises:
            ValueError: the state is another game's, or another version's.
        """
        names = set(self._variables())
        if set(state["game"]) != names:
            raise ValueError(f"MinAtar: the state has {sorted(state['game'])}, this game {sorted(names)}.")
        for name, value in state["game"].items():
            setattr(self._game.env, name, _from_json(value))
        self._game.last_action = state["last_action"]
        self._game.seed(0)  # wrapper and game share one generator
        self._game.random.set_state(state["random"])
        self._is_seeded = state["is_seeded"]

    def _variables(self) -> dict[str, Any]:
        """The game's attributes, without its table of channels and its random numbers."""
        attributes = vars(self._game.env)
        return {
            name: value
            for name, value in attributes.items()
            if not isinstance(value, dict | np.random.RandomState)
        }

    def _frame(self) -> np.ndarray:
        there = self._game.state().astype(np.int64)  # (10, 10, channels), 0 or 1
        colours = there @ COLOURS[: there.shape[2]]
        cells = (colours // np.maximum(there.sum(axis=2, keepdims=True), 1)).astype(np.uint8)
        return cells.repeat(self._cell_pixels, axis=0).repeat(self._cell_pixels, axis=1)


def _to_json(value: Any) -> Any:
    """Numbers, texts, None, and lists and arrays of them, as plain JSON data."""
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": value.dtype.name}
    if isinstance(value, list):
        return [_to_json(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def _from_json(value: Any) -> Any:
    """The inverse of `_to_json`; numpy's numbers come back as Python's."""
    if isinstance(value, dict):
        return np.array(value["array"], dtype=value["dtype"])
    return [_from_json(entry) for entry in value] if isinstance(value, list) else value
