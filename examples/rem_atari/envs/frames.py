"""Frames: square RGB images as uint8 arrays (S, S, 3), S pixels high and wide."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from PIL import Image


def resize_frame(frame: np.ndarray, size: int) -> np.ndarray:
    """The RGB image `frame` (H, W, 3) uint8 as a new array (size, size, 3), by PIL's BILINEAR filter.

    PIL widens the filter when it shrinks an image, so that no pixel goes unseen; cv2's bilinear does not, and
    small things flicker. The published agent's frames are PIL's.
    """
    return np.array(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))


def frame_space(size: int) -> Box:
    """The observation space of frames `size` pixels high and wide."""
    return Box(low=0, high=255, shape=(size, size, 3), dtype=np.uint8)


def is_picture_space(space: gymnasium.Space) -> bool:
    """Whether observations of `space` are RGB images, Box uint8 (H, W, 3)."""
    return (
        isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3
    )


class ResizeFrames(gymnasium.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """Show the environment's images at `size` by `size` pixels (see `resize_frame`)."""

    def __init__(self, env: gymnasium.Env, size: int) -> None:
        super().__init__(env)
        self.observation_space = frame_space(size)
        self._size = size

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The image `observation` (H, W, 3), resized."""
        return resize_frame(observation, self._size)

    def get_resume_state(self) -> dict[str, Any]:
        """Nothing: each image is resized on its own."""
        return {}

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Take nothing."""
