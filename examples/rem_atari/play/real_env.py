"""The real game as an environment of tokens, which records every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rem_atari.envs.vector import GameReturn, VectorEnv, VectorStep
from rem_atari.models.base_tokenizer import BaseTokenizer
from rem_atari.play.rollout import TokenStep
from rem_atari.replay.buffer import Replay


class RealEnv:
    """The real game as a `TokenEnv`: frames go through the tokenizer, every step into the replay.

    Args:
        env: E environments; `reset` starts them.
        tokenizer: turns frames into codes, in its current state.
        replay: where steps are recorded, or None.
        device: the device of the tokenizer and of the codes.
        show: what the controller sees of tokens, as `Agent.show`; None: their codes.
        stop_recording_when_full: a full replay ends the recording, for a sample of an evaluation's episodes;
            otherwise it is an error, for experience that must not be lost.
    """

    def __init__(
        self,
        env: VectorEnv,
        tokenizer: BaseTokenizer,
        replay: Replay | None,
        *,
        device: torch.device | str = "cpu",
        show: Callable[[Tensor], Tensor] | None = None,
        stop_recording_when_full: bool = False,
    ) -> None:
        self._env = env
        self._tokenizer = tokenizer
        self._replay = replay
        self._device = torch.device(device)
        self._show = tokenizer.embed if show is None else show
        self._stop_recording_when_full = stop_recording_when_full
        self._frames: np.ndarray | None = None
        self.last_frames: Mapping[int, np.ndarray] = {}
        """The last frame of each episode that ended with the last step, by environment."""
        self._finished_games: list[GameReturn] = []

    @property
    def num_envs(self) -> int:
        """Number of environments E."""
        return self._env.num_envs

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self._env.num_actions

    @property
    def is_started(self) -> bool:
        """Whether the environments were started or resumed."""
        return self._frames is not None

    @property
    def frames(self) -> np.ndarray:
        """The frames to act on, (E, S, S, 3) uint8.

        Raises:
            RuntimeError: `reset` was not called yet.
        """
        if self._frames is None:
            raise RuntimeError("RealEnv: reset() comes first.")
        return self._frames

    def reset(self) -> Tensor:
        """Restart all environments, end open episodes, and return the observation, as `observe`."""
        self._frames = self._env.reset()
        if self._replay is not None:
            self._replay.cut()
        return self.observe()

    def observe(self) -> Tensor:
        """The controller's view of the current frames, by the tokenizer's current state."""
        frames = torch.from_numpy(self.frames).to(self._device)
        return self._show(self._tokenizer.encode(frames))

    def step(self, actions: Tensor) -> TokenStep:
        """Take and record one step in every environment; `actions` (E,) int64."""
        step = self.play(actions.cpu().numpy())
        terminated, truncated = torch.from_numpy(step.terminated), torch.from_numpy(step.truncated)
        return TokenStep(
            seen=self.observe(),
            rewards=torch.from_numpy(step.rewards).to(self._device),
            ended=terminated.to(self._device),
            truncated=truncated.to(self._device),
            restarted=(terminated | truncated).to(self._device),
        )

    def play(self, actions: np.ndarray) -> VectorStep:
        """`step` in terms of frames, without the tokenizer; `actions` (E,) integers."""
        acted_on = self.frames
        self._close_full_replay()
        step = self._env.step(actions)
        if self._replay is not None:
            columns = zip(acted_on, actions, step.rewards, step.terminated, step.truncated, strict=True)
            for env_index, (frame, action, reward, terminated, truncated) in enumerate(columns):
                if step.lost[env_index]:
                    self._replay.cut(env_index)  # the action's result is unknown
                    continue
                self._replay.append(
                    env_index, frame, int(action), float(reward), bool(terminated), bool(truncated)
                )
        self._frames, self.last_frames = step.frames, step.last_frames
        self._finished_games.extend(step.game_returns)
        return step

    def take_finished_games(self) -> list[GameReturn]:
        """The games that ended since the last call, oldest first."""
        finished, self._finished_games = self._finished_games, []
        return finished

    def open_games(self) -> list[GameReturn]:
        """The unfinished games, one per environment."""
        return self._env.open_games()

    def resume_states(self) -> list[dict[str, Any] | None]:
        """The environments' states for `resume`, plain JSON data; None for one that cannot be saved."""
        return self._env.resume_states()

    def resume(self, states: list[dict[str, Any] | None], frames: np.ndarray, *, seed: int) -> list[int]:
        """Resume the environments, in place of the first `reset`.

        An environment that could not be saved starts anew; its open episode in the replay ends as truncated.

        Args:
            states: from `resume_states`.
            frames: the earlier `frames`.
            seed: for the environments that start anew.
        Returns:
            The indices of those that start anew.
        Raises:
            ValueError: the states are those of other environments.
        """
        first_frames = self._env.resume(states, seed=seed)
        restarted = [index for index, frame in enumerate(first_frames) if frame is not None]
        self._frames = frames.copy()
        for index in restarted:
            self._frames[index] = first_frames[index]
            if self._replay is not None:
                self._replay.cut(index)
        return restarted

    def close(self) -> None:
        """Close the environments."""
        self._env.close()

    def _close_full_replay(self) -> None:
        """Stop recording if the next step would not fit and `stop_recording_when_full` is set."""
        if self._replay is None or not self._stop_recording_when_full:
            return
        if self._replay.room < self.num_envs:
            self._replay.cut()
            self._replay = None
