"""Catch: the smallest game with something to see, something to do and something to lose."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from rem_atari.envs.env_state import random_state, set_random_state
from rem_atari.envs.frames import frame_space

LEFT, STAY, RIGHT = 0, 1, 2
BALL = (255, 255, 255)
PADDLE = (80, 160, 255)


class Catch(gymnasium.Env[np.ndarray, int]):
    """A ball falls one cell a step; a paddle one cell wide on the bottom row must catch it.

    The ball starts in a random column of the top row, the paddle in a random cell of the bottom row. Actions:
    0 left, 1 stay, 2 right. The episode ends when the ball reaches the bottom row, after cells - 1 steps:
    reward 1 if the paddle is there, else -1; every other reward is 0. Every ball can be caught; random play
    catches one in `cells`, so it returns 2 / cells - 1 on average (-0.67 with 6 cells).

    Args:
        cells: cells in a row and in a column.
        cell_pixels: pixels along a cell's side; frames are (cells * cell_pixels) high and wide.
        render_mode: "rgb_array", whose picture is the frame itself, or None.

    Raises:
        ValueError: `cells` is below 2, `cell_pixels` below 1, or the render mode unknown.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 (gymnasium's attribute)

    def __init__(self, cells: int = 6, cell_pixels: int = 4, render_mode: str | None = None) -> None:
        if cells < 2 or cell_pixels < 1:
            raise ValueError(
                f"Catch: cells is {cells}, at least 2; cell_pixels is {cell_pixels}, at least 1."
            )
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"Catch: render_mode is {render_mode!r}; it must be 'rgb_array' or None.")
        self.observation_space = frame_space(cells * cell_pixels)
        self.action_space = Discrete(3)
        self.render_mode = render_mode
        self._cells = cells
        self._cell_pixels = cell_pixels
        self._ball_row = self._ball_column = self._paddle = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place ball and paddle at random columns."""
        super().reset(seed=seed)
        self._ball_row = 0
        self._ball_column, self._paddle = (int(cell) for cell in self.np_random.integers(self._cells, size=2))
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the paddle (it stops at the walls), then let the ball fall one cell."""
        if not self.action_space.contains(action):
            raise ValueError(f"Catch: action is {action!r}; it must be 0 (left), 1 (stay) or 2 (right).")
        self._paddle = min(max(self._paddle + int(action) - STAY, 0), self._cells - 1)
        self._ball_row += 1
        landed = self._ball_row == self._cells - 1
        reward = (1.0 if self._paddle == self._ball_column else -1.0) if landed else 0.0
        return self._frame(), reward, landed, False, {}

    def render(self) -> np.ndarray | None:
        """The frame, if the render mode asks for it."""
        return self._frame() if self.render_mode == "rgb_array" else None

    def get_action_meanings(self) -> list[str]:
        """The meanings of the actions, in ale-py's form."""
        return ["LEFT", "STAY", "RIGHT"]

    def get_resume_state(self) -> dict[str, Any]:
        """Positions of ball and paddle, and the state of the random numbers."""
        ball = [self._ball_row, self._ball_column]
        return {"ball": ball, "paddle": self._paddle, "random": random_state(self)}

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Go on from a `get_resume_state`."""
        self._ball_row, self._ball_column = (int(cell) for cell in state["ball"])
        self._paddle = int(state["paddle"])
        set_random_state(self, state["random"])

    def _frame(self) -> np.ndarray:
        cells = np.zeros((self._cells, self._cells, 3), dtype=np.uint8)
        cells[-1, self._paddle] = PADDLE
        cells[self._ball_row, self._ball_column] = BALL
        return cells.repeat(self._cell_pixels, axis=0).repeat(self._cell_pixels, axis=1)
