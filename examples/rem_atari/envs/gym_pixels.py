"""Any gymnasium environment with pixels, played as it is."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from rem_atari.config import EnvConfig
from rem_atari.envs.answers import CheckedAnswers, describe
from rem_atari.envs.env_options import parse_kwargs
from rem_atari.envs.env_state import WRAPPER_ATTRIBUTES, KeepsNothing, layers_of
from rem_atari.envs.errors import UnknownGameError
from rem_atari.envs.frames import ResizeFrames, frame_space, is_picture_space, resize_frame, to_rgb
from rem_atari.errors import EnvironmentAnswerError, explain

Info = dict[str, Any]
Step = tuple[Any, float, bool, bool, Info]


def make_gym_pixels(cfg: EnvConfig) -> gymnasium.Env:
    """The gymnasium environment `cfg.id`, or "module:name", made to render where its pictures are needed.

    Observations that are images are the frames. Otherwise, or if `cfg.render` is set, the environment renders
    and `show_frames` takes the pictures.

    Raises:
        UnknownGameError: there is no such environment.
        ValueError: it cannot be made, it has no pixels, or its actions are not Discrete from 0.
    """
    # Where it is rendered in any case, its wrapper may need that it renders already.
    env = _make(replace(cfg, wrapper=None) if cfg.render else cfg)
    if is_rendered(env, cfg):
        modes = env.metadata.get("render_modes") or []
        if "rgb_array" not in modes:
            raise ValueError(
                f"{cfg.id}: the observation space is {env.observation_space}; wanted RGB images, RGBA or gray"
                " (Box uint8 up to 255, 8 pixels a side at least), or the render mode 'rgb_array' (it has"
                f" {', '.join(map(str, modes)) or 'none'})."
            )
        env.close()
        env = _make(cfg, render_mode="rgb_array")
    actions = env.action_space
    if not isinstance(actions, Discrete) or actions.start != 0:
        raise ValueError(f"{cfg.id}: the action space is {actions}; wanted Discrete, counting from 0.")
    return env


def is_rendered(env: gymnasium.Env, cfg: EnvConfig) -> bool:
    """Whether an environment's frames are what it renders, not what it observes."""
    return cfg.render or not is_picture_space(env.observation_space)


def show_frames(env: gymnasium.Env, cfg: EnvConfig) -> gymnasium.Env:
    """Make an environment return RGB frames of `cfg.frame_size`: its observations, or rendered pictures."""
    if is_rendered(env, cfg):
        return RenderedFrames(env, cfg.frame_size, cfg.id or cfg.game)
    if env.observation_space != frame_space(cfg.frame_size):
        return ResizeFrames(env, cfg.frame_size)
    return env


def what_is_seen(env: gymnasium.Env) -> str:
    """A description of the frames for the user: the source, its size, and the size of the frames."""
    side = env.observation_space.shape[0] if env.observation_space.shape else 0
    layers = list(layers_of(env))
    rendered = next((layer for layer in layers if isinstance(layer, RenderedFrames)), None)
    source = layers[-1].observation_space
    if rendered is not None:
        height, width = rendered.picture_shape
        text = f"what the game renders, {width} x {height}, not {_short(source)}"
    elif source.shape and len(source.shape) >= 2:
        text = f"the game's images, {source.shape[1]} x {source.shape[0]}"
    else:
        return "the game's frames"
    return f"{text}, as {side} x {side} pixels"


def _short(space: gymnasium.Space) -> str:
    """A space in a few characters, such as Box(4,): its kind, and its shape if it has one."""
    return f"{type(space).__name__}{space.shape}" if space.shape else type(space).__name__


def _make(cfg: EnvConfig, **more: str) -> gymnasium.Env:
    """The environment of an id, its keyword arguments and its wrapper, with checked answers."""
    name = cfg.id or ""
    kwargs = parse_kwargs(cfg.kwargs)
    try:
        # Its checks are ours (`answers`), which stop a run where gymnasium's would warn.
        env = gymnasium.make(name, disable_env_checker=True, **{**kwargs, **more})
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"{name} cannot be made: {error}") from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        reason = f"{str(error).rstrip('.')}{_module_hint(name)}"
        raise UnknownGameError(f"There is no gymnasium environment {name!r}: {reason}") from error
    except (Exception, SystemExit) as error:
        made_with = f" with {kwargs}" if kwargs else ""
        raise ValueError(f"{name} cannot be made{made_with}: it raised {explain(error)}") from error
    _check_signature(env, name)
    _check_spaces(env, name)
    env = _check_answers(env)
    return env if cfg.wrapper is None else CheckedAnswers(_wrap(env, cfg.wrapper))


def _module_hint(name: str) -> str:
    """Advice for an id whose module lies in the current folder, which a console script does not search."""
    module, colon, _ = name.partition(":")
    package = module.partition(".")[0]
    for path in (Path(f"{package}.py"), Path(package)):
        if colon and package and path.exists() and find_spec(package) is None:
            return f"; `python -m rem_atari` instead of `rem-atari` finds {path} in the current folder"
    return ""


def _check_signature(env: gymnasium.Env, name: str) -> None:
    """Refuse environments whose `reset` takes no seed, as before gymnasium."""
    parameters = inspect.signature(env.unwrapped.reset).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = [wanted for wanted in ("seed", "options") if wanted not in parameters]
    if missing:
        raise ValueError(
            f"{name}: its reset() takes no {' and no '.join(missing)}; wanted gymnasium's"
            " reset(*, seed=None, options=None)"
        )


def _check_spaces(env: gymnasium.Env, name: str) -> None:
    """An environment may have forgotten its spaces, or have those of gym, gymnasium's forerunner."""
    for attribute in ("observation_space", "action_space"):
        space = getattr(env, attribute, None)
        if not isinstance(space, gymnasium.Space):
            raise ValueError(f"{name}: its {attribute} is {describe(space)}; wanted a gymnasium.Space")


def _check_answers(env: gymnasium.Env) -> gymnasium.Env:
    """Check answers below gymnasium's own wrappers, which would fail with their own messages."""
    layer = env
    while type(layer) in WRAPPER_ATTRIBUTES:
        if type(layer.env) not in WRAPPER_ATTRIBUTES:
            layer.env = CheckedAnswers(layer.env)
            return env
        layer = layer.env
    return CheckedAnswers(env)


def _wrap(env: gymnasium.Env, wrapper: str) -> gymnasium.Env:
    """The environment in the wrapper "module:Name".

    Raises:
        ValueError: there is no such wrapper, or it makes no environment.
    """
    module, _, name = wrapper.partition(":")
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"{error}{_module_hint(wrapper)}"
        raise ValueError(f"env.wrapper is {wrapper!r}; wanted module:Name ({reason})") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"env.wrapper {wrapper} cannot be imported: it raised {explain(error)}") from error
    try:
        wrapped = make(env)
    except (Exception, SystemExit) as error:
        raise ValueError(f"env.wrapper {wrapper} raised {explain(error)}") from error
    if not isinstance(wrapped, gymnasium.Env):
        raise ValueError(f"env.wrapper {wrapper} gave a {type(wrapped).__name__}, wanted a gymnasium.Env")
    return wrapped


class RepeatAction(KeepsNothing, gymnasium.Wrapper):
    """Repeat an action for up to `times` steps; return the sum of rewards and the last observation."""

    def __init__(self, env: gymnasium.Env, times: int) -> None:
        super().__init__(env)
        self._times = times

    def step(self, action: int) -> Step:
        """Take `action` up to `times` times, or until the episode ends."""
        total = 0.0
        for _ in range(self._times):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


class RenderedFrames(KeepsNothing, gymnasium.Wrapper):
    """Show what the environment renders, as RGB at `size` by `size` pixels, in place of its observations.

    It is reset and rendered once at the start, so that a missing package of the renderer is found before the
    run begins.

    Attributes:
        picture_shape: height and width of what it renders.

    Raises:
        ValueError: it cannot be rendered.
    """

    def __init__(self, env: gymnasium.Env, size: int, name: str) -> None:
        super().__init__(env)
        self._size, self._name = size, name
        try:
            env.reset(seed=0)
            self.picture_shape = self._picture().shape[:2]
        except gymnasium.error.DependencyNotInstalled as error:
            raise ValueError(f"{name} cannot be rendered: {error}") from error
        except EnvironmentAnswerError:
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"{name} cannot be reset and rendered: it raised {explain(error)}") from error
        self.observation_space = frame_space(size)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode."""
        _, info = self.env.reset(seed=seed, options=options)
        return resize_frame(self._picture(), self._size), info

    def step(self, action: int) -> Step:
        """Step the environment, then render it."""
        _, reward, terminated, truncated, info = self.env.step(action)
        return resize_frame(self._picture(), self._size), float(reward), terminated, truncated, info

    def _picture(self) -> np.ndarray:
        return to_rgb(self.env.render(), f"{self._name}: render()")
