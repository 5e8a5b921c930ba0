"""Frames: square RGB images as uint8 arrays (S, S, 3), S pixels high and wide."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
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


def check_pixel_env(env: gymnasium.Env, name: str) -> None:
    """Check that `env` shows RGB images and takes discrete actions; `name` is for the message.

    Raises:
        ValueError: the observations are not Box uint8 (H, W, 3), or the actions not Discrete from 0.
    """
    seen, actions = env.observation_space, env.action_space
    is_image = (
        isinstance(seen, Box) and seen.dtype == np.uint8 and len(seen.shape) == 3 and seen.shape[2] == 3
    )
    if not is_image:
        raise ValueError(f"{name}: the observation space is {seen}; wanted RGB images, Box uint8 (H, W, 3).")
    if not isinstance(actions, Discrete) or actions.start != 0:
        raise ValueError(f"{name}: the action space is {actions}; wanted Discrete, counting from 0.")


class ResizeFrames(gymnasium.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """Show the environment's images at `size` by `size` pixels (see `resize_frame`)."""

    def __init__(self, env: gymnasium.Env, size: int) -> None:
        super().__init__(env)
        self.observation_space = frame_space(size)
        self._size = size

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The image `observation` (H, W, 3), resized."""
        return resize_frame(observation, self._size)
