"""Checks of what an environment answers; an invalid answer stops the run at once.

A reward that is not finite or a frame of another kind would otherwise show much later, as a loss that is not
finite or an agent that learns nothing. The error names the environment and the answer.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from rem_atari.envs.env_state import KeepsNothing
from rem_atari.errors import EnvironmentAnswerError

Info = dict[str, Any]
Step = tuple[Any, float, bool, bool, Info]

LARGEST_REWARD = float(np.finfo(np.float32).max)
"""Rewards are stored as float32."""

MOST_SHOWN = 60
"""Characters of an odd value that a message shows."""


def name_of(env: gymnasium.Env) -> str:
    """The environment's id if it is registered, else the name of its class."""
    return env.unwrapped.spec.id if env.unwrapped.spec is not None else type(env.unwrapped).__name__


def check_reset(answer: Any, name: str) -> tuple[Any, Info]:
    """The observation and the info of a `reset`.

    Raises:
        EnvironmentAnswerError: the answer is none of gymnasium's.
    """
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
        return answer
    raise EnvironmentAnswerError(
        f"{name}: reset() gave {describe(answer)}; wanted gymnasium's (observation, info), info a dict"
    )


def check_step(answer: Any, name: str) -> Step:
    """The five parts of a `step`, its reward as a float.

    Raises:
        EnvironmentAnswerError: the answer is none of gymnasium's, or the reward is no finite number.
    """
    if not isinstance(answer, tuple) or len(answer) != 5 or not isinstance(answer[4], dict):
        raise EnvironmentAnswerError(
            f"{name}: step() gave {describe(answer)}; wanted gymnasium's (observation, reward, terminated,"
            " truncated, info), info a dict"
        )
    observation, reward, terminated, truncated, info = answer
    for part, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(_single(value), bool | int):
            raise EnvironmentAnswerError(
                f"{name}: step() gave {describe(value)} for {part}; wanted True or False"
            )
    return observation, check_reward(reward, name), bool(terminated), bool(truncated), info


def check_reward(reward: Any, name: str) -> float:
    """A reward as a float.

    Raises:
        EnvironmentAnswerError: it is no number, or not finite as a float32.
    """
    try:
        number = float(_single(reward))
    except (TypeError, ValueError, OverflowError) as error:
        raise EnvironmentAnswerError(
            f"{name}: step() gave the reward {describe(reward)}; wanted one number"
        ) from error
    if not math.isfinite(number) or abs(number) > LARGEST_REWARD:
        raise EnvironmentAnswerError(
            f"{name}: step() gave the reward {number}; wanted a finite number, at most {LARGEST_REWARD:.2g}"
        )
    return number


def check_observation(observation: Any, space: gymnasium.Space, name: str) -> Any:
    """An observation of a space of images, which must be an array of the space's shape and type.

    Observations of other spaces are not looked at.

    Raises:
        EnvironmentAnswerError: the observation is something else.
    """
    if not isinstance(space, Box) or space.dtype != np.uint8:
        return observation
    wanted = f"uint8 {space.shape}, as its observation space says"
    is_array = isinstance(observation, np.ndarray)
    if not is_array or observation.dtype != np.uint8 or observation.shape != space.shape:
        raise EnvironmentAnswerError(
            f"{name}: the observation is {describe(observation)}; wanted an array, {wanted}"
        )
    return observation


def describe(value: Any) -> str:
    """What came, in a few words: kind, shape and range of an array, parts of a tuple, the value of anything
    else."""
    if isinstance(value, np.ndarray):
        text = f"an array {value.dtype} {value.shape}"
        if value.size and np.issubdtype(value.dtype, np.number):
            text += f" from {value.min():.6g} to {value.max():.6g}"
        return text
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} ({', '.join(type(part).__name__ for part in value)})"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= MOST_SHOWN else f'{shown[:MOST_SHOWN]}...'}"


class CheckedAnswers(KeepsNothing, gymnasium.Wrapper):
    """Check the answers of `reset` and `step` before other code unpacks them."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._name = name_of(env)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        """Start an episode."""
        observation, info = check_reset(self.env.reset(seed=seed, options=options), self._name)
        return check_observation(observation, self.observation_space, self._name), info

    def step(self, action: int) -> Step:
        """Step the environment."""
        observation, *rest = check_step(self.env.step(action), self._name)
        return check_observation(observation, self.observation_space, self._name), *rest


def _single(value: Any) -> Any:
    """The Python value of an array or tensor of one element; None for text; other values unchanged."""
    if isinstance(value, str | bytes):
        return None
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return value
