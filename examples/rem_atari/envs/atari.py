"""Atari games with the preprocessing of Atari 100K, as the published agent has it.

The game runs as the *NoFrameskip-v4* environments do: every raw frame, no sticky actions, the smallest set of
actions. Around it, from the inside out:

- `NoopStart`: a game starts with no-ops (training: 1 to 30 raw frames, evaluation: exactly 1);
- `SkipFrames`: an action lasts four raw frames; the observation is the maximum of the last two, each *resized
  first* (gymnasium's AtariPreprocessing takes the maximum first, which gives other frames);
- `LifeLossEndsEpisode` (training only): the episode that is stored ends with a life, the game goes on.

Rewards are raw. The bound on a game's raw frames is the emulator's own, so it counts every frame from the
game's start: no-ops, skipped frames, all lives. All randomness comes from the environment's `np_random`.

Source: arXiv 2402.05643 and the Atari 100K protocol, arXiv 1903.00374.
"""

from __future__ import annotations

import difflib
import re
from collections import deque
from typing import Any

import gymnasium
import numpy as np

from rem_atari.config import EnvConfig
from rem_atari.envs.env_state import KeepsNothing
from rem_atari.envs.errors import UnknownGameError, needs_extra
from rem_atari.envs.frames import frame_space, resize_frame

NOOP = 0
"""The action that does nothing; `make_atari` checks that the game's actions begin with it."""

Info = dict[str, Any]
Step = tuple[np.ndarray, float, bool, bool, Info]


def register_games() -> None:
    """Make ale-py's games known to gymnasium.

    Raises:
        MissingExtraError: ale-py is not installed.
    """
    with needs_extra("atari"):
        import ale_py
    # Otherwise the emulator prints a banner on stderr.
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)


def list_games() -> list[str]:
    """Names of the games in ale-py, sorted, for example Breakout or MsPacman.

    Raises:
        MissingExtraError: ale-py is not installed.
    """
    register_games()
    matches = (re.fullmatch(r"ALE/(\w+)-v5", name) for name in gymnasium.registry)
    return sorted(match[1] for match in matches if match)


def make_atari(cfg: EnvConfig, *, training: bool) -> gymnasium.Env:
    """The game `cfg.game` with Atari 100K's preprocessing; frames (S, S, 3) uint8, S = `cfg.frame_size`.

    `info` holds ale-py's entries; in training the outermost layer is a `LifeLossEndsEpisode`.

    Args:
        cfg: the game and its preprocessing.
        training: whether a life loss ends an episode, and which starts and bounds apply.

    Raises:
        UnknownGameError: ale-py has no such game, or the game has no no-op action.
        MissingExtraError: ale-py is not installed.
        ValueError: a number in `cfg` is below 1.
    """
    games = list_games()
    if cfg.game not in games:
        raise UnknownGameError(_unknown_game(cfg.game, games))
    max_frames = cfg.max_raw_frames if training else cfg.eval_max_raw_frames
    _check_at_least_one("max_raw_frames" if training else "eval_max_raw_frames", max_frames)
    for name in ("frame_size", "frame_skip", "noop_max"):
        _check_at_least_one(name, getattr(cfg, name))
    env = gymnasium.make(
        f"ALE/{cfg.game}-v5",
        obs_type="rgb",
        frameskip=1,
        repeat_action_probability=0.0,
        full_action_space=False,
        max_num_frames_per_episode=max_frames,
        disable_env_checker=True,
    )
    if env.unwrapped.get_action_meanings()[NOOP] != "NOOP":
        raise UnknownGameError(f"The game {cfg.game} has no no-op action, which the preprocessing needs.")
    env = NoopStart(env, most=cfg.noop_max if training else 1)
    env = SkipFrames(env, cfg.frame_skip, cfg.frame_size)
    return LifeLossEndsEpisode(env) if training else env


def _unknown_game(game: str, games: list[str]) -> str:
    by_lower_name = {name.lower(): name for name in games}
    wanted = re.sub(r"[^a-z0-9]", "", game.lower())
    close = [by_lower_name[name] for name in difflib.get_close_matches(wanted, by_lower_name, n=3)]
    hint = f"did you mean {' or '.join(close)}?" if close else "`rem-atari list` names the games there are."
    return f"There is no Atari game {game!r}; {hint}"


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"env.{name} is {value}; it must be at least 1.")


class NoopStart(KeepsNothing, gymnasium.Wrapper):
    """Begin every game with 1 to `most` no-ops, so that games of the deterministic emulator differ.

    The reward of these frames is dropped. If one of them ends the game, a new game begins and gets the
    remaining no-ops.
    """

    def __init__(self, env: gymnasium.Env, most: int) -> None:
        super().__init__(env)
        self._most = most

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Start a game; its number of no-ops is drawn from `np_random`."""
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.np_random.integers(1, self._most, endpoint=True)):
            frame, _, terminated, truncated, info = self.env.step(NOOP)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
        return frame, info


class SkipFrames(KeepsNothing, gymnasium.Wrapper):
    """Repeat an action for `skip` raw frames and show the maximum of the last two, each resized first.

    The maximum removes the flicker of games that draw half of their objects on every other frame. A game that
    ends within the action shows the maximum of its last two frames, or its only frame in this action. Frames
    of an earlier action never enter, and nothing is kept between steps.
    """

    def __init__(self, env: gymnasium.Env, skip: int, size: int) -> None:
        super().__init__(env)
        self.observation_space = frame_space(size)
        self._skip = skip
        self._size = size

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Start a game; the observation is its first frame, resized."""
        frame, info = self.env.reset(seed=seed, options=options)
        return resize_frame(frame, self._size), info

    def step(self, action: int) -> Step:
        """Take `action` for up to `skip` raw frames; the reward is their sum."""
        total = 0.0
        last_two: deque[np.ndarray] = deque(maxlen=2)
        for _ in range(self._skip):
            frame, reward, terminated, truncated, info = self.env.step(action)
            last_two.append(frame)
            total += float(reward)
            if terminated or truncated:
                break
        shown = np.maximum.reduce([resize_frame(frame, self._size) for frame in last_two])
        return shown, total, terminated, truncated, info


class LifeLossEndsEpisode(gymnasium.Wrapper):
    """End an episode (terminated) with each life while the game goes on; its next `reset` is one no-op.

    That no-op is one action, so it lasts as many raw frames as any other. A reset with a seed, or in the
    middle of a life, starts a new game.

    Attributes:
        game_over: after a step: the game itself ended or was cut short, so the next reset starts a new one;
            after a reset: the no-op ended the game, and the observation is of a new one already.
        reset_reward: the raw reward of the last reset's no-op, which belongs to the game's return; else 0.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.game_over = False
        self.reset_reward = 0.0
        self._lives = 0
        self._game_goes_on = False

    def step(self, action: int) -> Step:
        """Step the game; `terminated` if it ended or a life was lost."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        # Some games count down to 0 a few frames before they are over: that last life ends with the game.
        life_lost = 0 < info["lives"] < self._lives
        self._lives = info["lives"]
        self._game_goes_on = life_lost and not self.game_over
        return frame, float(reward), terminated or life_lost, truncated, info

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Continue the game after a life loss, or start a new one."""
        starts_anew = seed is not None or not self._game_goes_on
        self.reset_reward, self.game_over = 0.0, False
        if not starts_anew:
            frame, reward, terminated, truncated, info = self.env.step(NOOP)
            self.reset_reward, self.game_over = float(reward), terminated or truncated
        if starts_anew or self.game_over:
            frame, info = self.env.reset(seed=seed, options=options)
        self._lives = info["lives"]
        self._game_goes_on = False
        return frame, info

    def get_resume_state(self) -> Info:
        """The last number of lives, and whether the next `reset` continues the game."""
        return {"lives": self._lives, "game_goes_on": self._game_goes_on}

    def set_resume_state(self, state: Info) -> None:
        """Go on from a `get_resume_state`."""
        self._lives = int(state["lives"])
        self._game_goes_on = bool(state["game_goes_on"])
