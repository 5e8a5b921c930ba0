"""Frames: square RGB images as uint8 arrays (S, S, 3), S pixels high and wide."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from PIL import Image

from rem_atari.envs.answers import describe
from rem_atari.envs.env_state import KeepsNothing
from rem_atari.errors import EnvironmentAnswerError


def resize_frame(frame: np.ndarray, size: int) -> np.ndarray:
    """The RGB image `frame` (H, W, 3) uint8 as a new array (size, size, 3), by PIL's BILINEAR filter.

    PIL widens the filter when it shrinks an image, so every pixel counts; cv2's bilinear filter does not, and
    small objects flicker. The published agent's frames are PIL's.
    """
    return np.array(
        Image.fromarray(np.ascontiguousarray(frame)).resize((size, size), Image.Resampling.BILINEAR)
    )


def frame_space(size: int) -> Box:
    """The observation space of frames `size` pixels high and wide."""
    return Box(low=0, high=255, shape=(size, size, 3), dtype=np.uint8)


SMALLEST_PICTURE = 8
"""Pixels of a side. Smaller arrays, such as the 7 by 7 cells of a grid world, hold symbols."""


def is_picture_space(space: gymnasium.Space) -> bool:
    """Whether observations of `space` are images: Box uint8 up to 255, (H, W) or (H, W, C) with 1, 3 or 4
    channels, at least `SMALLEST_PICTURE` pixels high and wide."""
    return (
        isinstance(space, Box)
        and space.dtype == np.uint8
        and _is_picture_shape(space.shape)
        and min(space.shape[:2]) >= SMALLEST_PICTURE
        and int(space.high.max()) == 255
    )


DARKEST_PICTURE = 16
"""Symbols, such as the kinds and colours of a grid world's cells, are numbers no larger than this."""


def doubt_pictures(frames: np.ndarray) -> str | None:
    """A sentence where a game's first frames, uint8, may be symbols in the shape of a picture; or None."""
    brightest = int(frames.max())
    if brightest == 0 or brightest > DARKEST_PICTURE:
        return None
    return (
        f"no pixel of the first frames is above {brightest} of 255; if these are symbols and no pictures,"
        " --env.render shows the agent what the game renders"
    )


def to_rgb(picture: np.ndarray, source: str) -> np.ndarray:
    """An image as RGB, uint8 (H, W, 3): gray becomes three equal channels, and an alpha channel is dropped.

    Args:
        picture: uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        source: what gave it, for the message.
    Raises:
        EnvironmentAnswerError: it is something else.
    """
    is_picture = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
    if not is_picture or not _is_picture_shape(picture.shape):
        raise EnvironmentAnswerError(
            f"{source} gives {describe(picture)}; wanted an image, uint8 (H, W, 3), RGBA or gray"
        )
    if picture.ndim == 2:
        picture = picture[..., None]
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture[..., :3]


def _is_picture_shape(shape: tuple[int, ...]) -> bool:
    return len(shape) in (2, 3) and min(shape) > 0 and (len(shape) == 2 or shape[2] in (1, 3, 4))


class ResizeFrames(KeepsNothing, gymnasium.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """Show the environment's images as RGB at `size` by `size` pixels (see `to_rgb`, `resize_frame`)."""

    def __init__(self, env: gymnasium.Env, size: int) -> None:
        super().__init__(env)
        self.observation_space = frame_space(size)
        self._size = size

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The image `observation`, uint8 (H, W) or (H, W, C), resized."""
        return resize_frame(to_rgb(observation, "the observation"), self._size)
