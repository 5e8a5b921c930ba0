"""Environments: Atari games with Atari 100K's preprocessing, MinAtar, Catch, any gymnasium game with pixels.

Whatever the game, observations are frames, Box uint8 (S, S, 3) with S = `EnvConfig.frame_size`, and actions
are Discrete. An episode is what the agent stores; a *game* may span several (Atari's lives). Where they
differ, see `atari.LifeLossEndsEpisode`. The `info` of an environment is never read.
"""

from __future__ import annotations

import re

from rem_atari.envs.errors import MissingExtraError, UnknownGameError, needs_extra

with needs_extra("atari"):
    import gymnasium
    from gymnasium.wrappers import TimeLimit

    from rem_atari.envs.atari import list_games, make_atari, register_games
    from rem_atari.envs.gym_pixels import RepeatAction, make_gym_pixels, show_frames
    from rem_atari.envs.minatar import NAMESPACE as MINATAR
    from rem_atari.envs.minatar import make_minatar

from rem_atari.config import EnvConfig

__all__ = ["MissingExtraError", "UnknownGameError", "env_name", "list_games", "make_env"]

gymnasium.register(id="rem_atari/Catch-v0", entry_point="rem_atari.envs.catch:Catch")
gymnasium.register(id="rem_atari/Catch8-v0", entry_point="rem_atari.envs.catch:Catch", kwargs={"cells": 8})


def make_env(cfg: EnvConfig, *, training: bool) -> gymnasium.Env:
    """The environment that `cfg` describes.

    `cfg.id` names MinAtar's games or any gymnasium environment with pixels; without it, `cfg.game` names an
    Atari game (`atari.make_atari`). An environment named by id is played as it is, without no-ops or a
    maximum over frames: its actions may be repeated, its frames are resized where their size differs, and the
    bound on raw frames holds for its steps.

    Args:
        cfg: the game and its preprocessing.
        training: whether it is for collecting experience (True) or for evaluation.

    Raises:
        UnknownGameError: there is no such game or id; the message names close ones.
        MissingExtraError: the extra that the game needs is not installed.
        ValueError: observations or actions are of a kind that the agent does not take.
    """
    if cfg.id is None or cfg.id.startswith(MINATAR):
        _check_unused(cfg)
    if cfg.id is None:
        return make_atari(cfg, training=training)
    if cfg.id.startswith("ALE/"):
        register_games()
    if cfg.id.startswith(MINATAR):
        env = make_minatar(cfg.id, cfg.minatar, frame_size=cfg.frame_size)
    else:
        env = make_gym_pixels(cfg)
    env = TimeLimit(env, cfg.max_raw_frames if training else cfg.eval_max_raw_frames)
    if cfg.action_repeat > 1:
        env = RepeatAction(env, cfg.action_repeat)
    return show_frames(env, cfg)


def _check_unused(cfg: EnvConfig) -> None:
    """Refuse options of gymnasium's environments where they would be ignored."""
    for name, value in (("kwargs", cfg.kwargs), ("wrapper", cfg.wrapper), ("render", cfg.render)):
        if value:
            raise ValueError(
                f"env.{name} is {value!r}, but the game {cfg.id or cfg.game} takes none; it is for other"
                " environments named by env.id"
            )


def env_name(cfg: EnvConfig) -> str:
    """The game's short name, for titles: Breakout, Catch for rem_atari/Catch-v0, MinAtar-Breakout for
    MinAtar's.

    It may contain any character; replace those that a path does not allow before use in a file name.
    """
    if cfg.id is None:
        return cfg.game
    name = re.sub(r"-v\d+$", "", cfg.id.split(":")[-1].split("/")[-1])
    return f"MinAtar-{name}" if cfg.id.startswith(MINATAR) else name
