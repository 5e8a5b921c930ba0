"""The dream as an environment: a trained world model behind gymnasium's interface, for any agent."""

from __future__ import annotations

from os import PathLike
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rem_atari.checks import check_count, check_temperature, is_integer
from rem_atari.envs.frames import frame_space
from rem_atari.inference.agent import LoadedAgent
from rem_atari.inference.dream import Dream
from rem_atari.inference.loading import load_agent
from rem_atari.replay.starts import Starts

RENDER_MODES = ("rgb_array",)


class DreamEnv(gymnasium.Env[np.ndarray, int]):
    """A trained agent's world model as an environment.

    An episode begins at a real frame and goes on in imagination. Observations are decoded frames. Rewards and
    ends are drawn from the world model, which knows only the signs of rewards, unless it was trained with
    `world_model.reward_bins`. After `horizon` steps the episode is truncated.

    Args:
        agent: a loaded agent, or the argument of `load_agent`: the folder of a run or of an exported agent,
            or the name of one that comes with the package.
        horizon: most steps of an episode, at least 1.
        starts: the starts of episodes; None: the agent's own real frames.
        temperature: of the draws; 0: always the most likely future.
        render_mode: "rgb_array", whose picture is the frame itself, or None.

    Attributes:
        dream: the moment before the next step. Keep it, and set it again to rewind.

    Raises:
        ValueError: a value is out of its range, or there is no such agent.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 5}  # noqa: RUF012 (gymnasium's attribute)

    def __init__(
        self,
        agent: LoadedAgent | str | PathLike[str],
        *,
        horizon: int = 50,
        starts: Starts | None = None,
        temperature: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *RENDER_MODES):
            raise ValueError(f"DreamEnv: render_mode is {render_mode!r}; wanted 'rgb_array' or None.")
        self.agent, self.starts = _prepare("DreamEnv", agent, starts, horizon, temperature)
        self.observation_space = frame_space(self.agent.frame_shape[0])
        self.action_space = Discrete(self.agent.num_actions)
        self.render_mode = render_mode
        self.dream: Dream | None = None
        self._horizon, self._temperature = horizon, temperature

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin at a random start, or at number `options["start"]`; the info gives the number.

        Raises:
            ValueError: there is no such start.
        """
        super().reset(seed=seed)
        number = int(self.np_random.integers(len(self.starts)))
        number = (options or {}).get("start", number)
        if not is_integer(number) or not 0 <= number < len(self.starts):
            raise ValueError(
                f"DreamEnv.reset(): options['start'] is {number!r}; wanted an integer from 0 to"
                f" {len(self.starts) - 1}."
            )
        seed_of_dream = int(self.np_random.integers(2**31))
        self.dream = self.agent.dream(self.starts.select([number]), seed=seed_of_dream)
        return self._frame(self.dream), {"start": int(number)}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Imagine what follows an action.

        Raises:
            RuntimeError: `reset` was not called yet.
            ValueError: there is no such action.
        """
        if self.dream is None:
            raise RuntimeError("DreamEnv.step() before the first reset().")
        dream = self.agent.imagine(self.dream, action, temperature=self._temperature)
        self.dream = dream
        is_over = bool(dream.ended[0])
        return self._frame(dream), float(dream.rewards[0]), is_over, dream.steps >= self._horizon, {}

    def render(self) -> np.ndarray | None:
        """The frame, if the render mode asks for it and there is one."""
        return None if self.render_mode is None or self.dream is None else self._frame(self.dream)

    def get_action_meanings(self) -> list[str]:
        """The game's names of the actions, in capitals, as in ale-py's environments."""
        return [name.upper() for name in self.agent.action_names]

    def _frame(self, dream: Dream) -> np.ndarray:
        return self.agent.decode(dream.tokens)[0]


class DreamVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Several dreams side by side, with one pass of the world model for all of them.

    Each is as in `DreamEnv`. The step after an episode's last one begins the next episode, with reward 0 and
    whatever action (gymnasium's autoreset mode "next step").

    Args:
        agent, horizon, starts, temperature: as in `DreamEnv`.
        num_envs: number of dreams, at least 1.

    Attributes:
        dream: the moment before the next step.

    Raises:
        ValueError: a value is out of its range, or there is no such agent.
    """

    metadata = {  # noqa: RUF012 (gymnasium's attribute)
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        agent: LoadedAgent | str | PathLike[str],
        num_envs: int,
        *,
        horizon: int = 50,
        starts: Starts | None = None,
        temperature: float = 1.0,
    ) -> None:
        check_count("DreamVectorEnv", "num_envs", num_envs)
        self.agent, self.starts = _prepare("DreamVectorEnv", agent, starts, horizon, temperature)
        self.num_envs = num_envs
        self.single_observation_space = frame_space(self.agent.frame_shape[0])
        self.single_action_space = Discrete(self.agent.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.dream: Dream | None = None
        self._horizon, self._temperature = horizon, temperature
        self._ages = np.zeros(num_envs, dtype=np.int64)
        self._is_over = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Restart all dreams."""
        super().reset(seed=seed)
        self.dream = self._begin(self.num_envs)
        self._ages[:] = 0
        self._is_over[:] = False
        return self.agent.decode(self.dream.tokens), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Imagine what follows actions (num_envs,).

        Raises:
            RuntimeError: `reset` was not called yet.
            ValueError: there are no such actions.
        """
        if self.dream is None:
            raise RuntimeError("DreamVectorEnv.step() before the first reset().")
        dream = self.agent.imagine(self.dream, actions, temperature=self._temperature)
        self._ages += 1
        if self._is_over.any():
            dream = self._restart(dream, np.flatnonzero(self._is_over))
        self.dream = dream
        truncated = self._ages >= self._horizon
        self._is_over = dream.ended | truncated
        return self.agent.decode(dream.tokens), dream.rewards.copy(), dream.ended.copy(), truncated, {}

    def _begin(self, count: int) -> Dream:
        starts = self.starts.select(self.np_random.integers(len(self.starts), size=count))
        return self.agent.dream(starts, seed=int(self.np_random.integers(2**31)))

    def _restart(self, dream: Dream, rows: np.ndarray) -> Dream:
        """The dreams with new ones in some rows."""
        order = np.arange(self.num_envs)
        order[rows] = self.num_envs + np.arange(len(rows))
        self._ages[rows] = 0
        return Dream.cat([dream, self._begin(len(rows))]).select(order)


def _prepare(
    caller: str,
    agent: LoadedAgent | str | PathLike[str],
    starts: Starts | None,
    horizon: int,
    temperature: float,
) -> tuple[LoadedAgent, Starts]:
    """The agent and its starts, after a check of the numbers."""
    check_count(caller, "horizon", horizon)
    check_temperature(caller, temperature)
    agent = agent if isinstance(agent, LoadedAgent) else load_agent(agent)
    starts = agent.starts if starts is None else starts
    if not isinstance(starts, Starts):
        raise TypeError(f"{caller}: starts is a {type(starts).__name__}; wanted Starts or None.")
    if len(starts) == 0:
        raise ValueError(f"{caller}: starts is empty; wanted at least one.")
    if starts.frames.shape[2:] != agent.frame_shape:
        raise ValueError(
            f"{caller}: the frames of starts are {starts.frames.shape[2:]}; wanted {agent.frame_shape}."
        )
    return agent, starts
