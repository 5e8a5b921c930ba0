"""Any gymnasium environment with pixels, played as it is."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from rem_atari.envs.errors import UnknownGameError
from rem_atari.envs.frames import ResizeFrames, frame_space, is_picture_space, resize_frame

Info = dict[str, Any]
Step = tuple[np.ndarray, float, bool, bool, Info]


def make_gym_pixels(name: str) -> gymnasium.Env:
    """The gymnasium environment `name`, or "module:name", made to render where its pictures are needed.

    Where its observations are RGB images they are the frames. Where they are anything else, the environment
    is asked to render instead, and `show_frames` takes the pictures.

    Raises:
        UnknownGameError: there is no such environment.
        ValueError: it has no pixels, or its actions are not Discrete from 0.
    """
    try:
        env = gymnasium.make(name)
        if not is_picture_space(env.observation_space):
            env = _make_rendered(env, name)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"{name} cannot be made: {error}") from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UnknownGameError(f"There is no gymnasium environment {name!r}: {error}") from error
    actions = env.action_space
    if not isinstance(actions, Discrete) or actions.start != 0:
        raise ValueError(f"{name}: the action space is {actions}; wanted Discrete, counting from 0.")
    return env


def show_frames(env: gymnasium.Env, size: int) -> gymnasium.Env:
    """Let an environment show frames (size, size, 3): its observations, or else what it renders."""
    if not is_picture_space(env.observation_space):
        return RenderedFrames(env, size)
    if env.observation_space.shape != (size, size, 3):
        return ResizeFrames(env, size)
    return env


def _make_rendered(env: gymnasium.Env, name: str) -> gymnasium.Env:
    """The environment made once more, to render RGB pictures, if it can."""
    env.close()
    modes = env.metadata.get("render_modes") or []
    if "rgb_array" not in modes:
        raise ValueError(
            f"{name}: the observation space is {env.observation_space}; wanted RGB images, Box uint8"
            f" (H, W, 3), or the render mode 'rgb_array' (it has {', '.join(map(str, modes)) or 'none'})."
        )
    env = gymnasium.make(name, render_mode="rgb_array")
    try:
        # What rendering needs may not be installed, and is better missed now than once a run has begun.
        env.reset(seed=0)
        _check_picture(env.render(), name)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"{name} cannot be rendered: {error}") from error
    return env


def _check_picture(picture: Any, name: str) -> np.ndarray:
    is_picture = (
        isinstance(picture, np.ndarray)
        and picture.dtype == np.uint8
        and picture.ndim == 3
        and picture.shape[2] == 3
    )
    if not is_picture:
        kind = (
            f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        )
        raise ValueError(f"{name}: render() gives {kind}; wanted an RGB image, uint8 (H, W, 3).")
    return picture


class RepeatAction(gymnasium.Wrapper):
    """Repeat an action for up to `times` steps; rewards are added up, and the last observation is shown."""

    def __init__(self, env: gymnasium.Env, times: int) -> None:
        super().__init__(env)
        self._times = times

    def step(self, action: int) -> Step:
        """Take `action` until it was taken `times` times or the episode is over."""
        total = 0.0
        for _ in range(self._times):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info

    def get_resume_state(self) -> Info:
        """Nothing: nothing is kept between steps."""
        return {}

    def set_resume_state(self, state: Info) -> None:
        """Take nothing."""


class RenderedFrames(gymnasium.Wrapper):
    """Show what the environment renders, RGB, at `size` by `size` pixels, in place of its observations."""

    def __init__(self, env: gymnasium.Env, size: int) -> None:
        super().__init__(env)
        self.observation_space = frame_space(size)
        self._size = size

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode."""
        _, info = self.env.reset(seed=seed, options=options)
        return self._frame(), info

    def step(self, action: int) -> Step:
        """Step the environment, then render it."""
        _, reward, terminated, truncated, info = self.env.step(action)
        return self._frame(), float(reward), terminated, truncated, info

    def get_resume_state(self) -> Info:
        """Nothing: each picture is taken on its own."""
        return {}

    def set_resume_state(self, state: Info) -> None:
        """Take nothing."""

    def _frame(self) -> np.ndarray:
        return resize_frame(_check_picture(self.env.render(), str(self.env)), self._size)
