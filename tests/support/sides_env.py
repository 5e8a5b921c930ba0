"""A game with two starts that its first frame does not tell apart, and its second does."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

SIDES_ID = "Sides-v0"
STEPS = 5


class Sides(gymnasium.Env[np.ndarray, int]):
    """A point for each step but the first in which the action is the side, 1 or 2, that a game is about."""

    observation_space = Box(0, 255, (24, 24, 3), np.uint8)
    action_space = Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._side, self._step = int(self.np_random.integers(1, 3)), 0
        return np.zeros((24, 24, 3), np.uint8), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(self._step > 0 and action == self._side)
        self._step += 1
        frame = np.full((24, 24, 3), 100 * self._side, np.uint8)
        return frame, reward, self._step == STEPS, False, {}


gymnasium.register(id=SIDES_ID, entry_point=Sides)
