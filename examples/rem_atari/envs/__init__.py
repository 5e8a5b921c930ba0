"""Environments: Atari games with Atari 100K's preprocessing, Catch, and any gymnasium game made of pixels.

Whatever the game, observations are frames, Box uint8 (S, S, 3) with S = `EnvConfig.frame_size`, and actions
are Discrete. An episode is what the agent stores; a *game* may span several (Atari's lives). Where they
differ, `info["game_over"]` says so (`atari.LifeLossEndsEpisode`); `vector.VectorEnv` reads it.
"""

from __future__ import annotations

import re

from rem_atari.envs.errors import MissingExtraError, UnknownGameError, needs_atari_extra

with needs_atari_extra():
    import gymnasium
    from gymnasium.wrappers import TimeLimit

    from rem_atari.envs.atari import list_games, make_atari, register_games
    from rem_atari.envs.frames import ResizeFrames, check_pixel_env

from rem_atari.config import EnvConfig

__all__ = ["MissingExtraError", "UnknownGameError", "env_name", "list_games", "make_env"]

gymnasium.register(id="rem_atari/Catch-v0", entry_point="rem_atari.envs.catch:Catch")


def make_env(cfg: EnvConfig, *, training: bool) -> gymnasium.Env:
    """The environment that `cfg` describes.

    `cfg.id` names any gymnasium environment with pixels; without it, `cfg.game` names an Atari game
    (`atari.make_atari`). An environment named by id is played as it is, without frame skip or no-ops: only
    its frames are resized where their size differs, and the bound on raw frames holds for its steps.

    Args:
        cfg: the game and its preprocessing.
        training: whether it is for collecting experience (True) or for evaluation.

    Raises:
        UnknownGameError: there is no such game or id; the message names close ones.
        MissingExtraError: the extra ``atari`` is not installed.
        ValueError: observations or actions are of a kind that the agent does not take.
    """
    if cfg.id is None:
        return make_atari(cfg, training=training)
    if cfg.id.startswith("ALE/"):
        register_games()
    try:
        env = gymnasium.make(cfg.id)
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv, ModuleNotFoundError) as error:
        raise UnknownGameError(f"There is no gymnasium environment {cfg.id!r}: {error}") from error
    check_pixel_env(env, cfg.id)
    if env.observation_space.shape != (cfg.frame_size, cfg.frame_size, 3):
        env = ResizeFrames(env, cfg.frame_size)
    return TimeLimit(env, cfg.max_raw_frames if training else cfg.eval_max_raw_frames)


def env_name(cfg: EnvConfig) -> str:
    """The game's short name, for titles: Breakout, or Catch for rem_atari/Catch-v0.

    Any character may be in it: whoever names a file after the game replaces what a path cannot bear.
    """
    if cfg.id is None:
        return cfg.game
    return re.sub(r"-v\d+$", "", cfg.id.split(":")[-1].split("/")[-1])
