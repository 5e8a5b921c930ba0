"""The real side of the page: a live game that can go back, and recorded games that can be entered."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np

from rem_atari.config import Config
from rem_atari.envs.vector import VectorEnv
from rem_atari.evaluation import make_test_envs
from rem_atari.replay.buffer import Replay
from rem_atari.replay.starts import Starts
from rem_atari.training.seeding import derive_seed


@dataclass(frozen=True, eq=False)
class Answer:
    """What a game answers to an action.

    Attributes:
        frame: the frame that follows, uint8 (S, S, 3); of a game that is over the one that it ended with.
        reward: the raw reward.
        over: the game has ended or was truncated.
        place: the game's state, for its next `step`.
    """

    frame: np.ndarray
    reward: float
    over: bool
    place: Any


class Game(Protocol):
    """A real game, as a function of its state and the action."""

    why_unknown: str
    """The reason for a missing answer of `step`, for the player."""

    def step(self, place: Any, action: int) -> Answer | None:
        """The answer to `action` at a place from this game; None if it is unknown."""
        ...


class Recorded(Game, Protocol):
    """Recorded frames at which a player can enter."""

    def __len__(self) -> int: ...

    def frames(self, first: int, count: int) -> np.ndarray:
        """At most `count` frames from number `first` on, uint8 (n, S, S, 3)."""
        ...

    def enter(self, index: int) -> tuple[Starts, Any]:
        """Frame number `index` with the frames before it, N = 1, and its place."""
        ...


@dataclass(frozen=True, eq=False)
class Place:
    """The state of a live game: its saved state, or None if its environment cannot be saved."""

    saved: dict[str, Any] | None


class LiveGame:
    """The environment of an evaluation, which goes back to any place that its environment can save.

    Args:
        config: the game.
        seed: seed of the games, each of which has a fresh environment.
    """

    why_unknown = "This game cannot go back. The dream can, and goes on alone."

    def __init__(self, config: Config, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._games = count()
        self._envs: VectorEnv | None = None
        self._here: Place | None = None

    def start(self) -> tuple[np.ndarray, Place]:
        """Begin another game: its first frame, uint8 (S, S, 3), and its place."""
        envs = self._make(derive_seed(self._seed, next(self._games)))
        return envs.reset()[0], self._arrive(envs)

    def step(self, place: Place, action: int) -> Answer | None:
        """See `Game.step`."""
        envs = self._envs
        if envs is None or place is not self._here:
            if place.saved is None:
                return None
            # Saved states are for environments that have not been played.
            envs = self._make(self._seed)
            envs.resume([place.saved], seed=self._seed)
        step = envs.step([action])
        here = self._arrive(envs)
        if step.lost[0]:
            return None
        over = bool(step.terminated[0] or step.truncated[0])
        return Answer(step.last_frames.get(0, step.frames[0]), float(step.rewards[0]), over, here)

    def close(self) -> None:
        """Close the environment."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None

    def _make(self, seed: int) -> VectorEnv:
        self.close()
        self._envs = make_test_envs(self._config, 1, seed)
        return self._envs

    def _arrive(self, envs: VectorEnv) -> Place:
        self._here = Place(envs.resume_states()[0])
        return self._here


class ReplayedGames:
    """The games of a replay: each step is known as long as the recorded actions are taken.

    Args:
        replay: of a run.
        length: the most frames given to a player on entering.
    """

    why_unknown = "The recording took another action here. The dream goes on alone."

    def __init__(self, replay: Replay, length: int) -> None:
        self._replay = replay
        self._length = length
        self._rows = replay.rows_by_episode()

    def __len__(self) -> int:
        return len(self._rows)

    def frames(self, first: int, count: int) -> np.ndarray:
        """See `Recorded.frames`; episode after episode."""
        return self._replay.frames_at(self._rows[first : first + count]).numpy()

    def enter(self, index: int) -> tuple[Starts, int]:
        """See `Recorded.enter`."""
        row = int(self._rows[index])
        steps = self._replay.segments_at(np.array([row]), self._length)
        return Starts(steps.frames.numpy(), steps.actions.numpy(), steps.mask.numpy()), row

    def step(self, place: int, action: int) -> Answer | None:
        """See `Game.step`. No frame is recorded after an episode's last step: its frame stands still."""
        steps = self._replay.sequences_at(np.array([place]), 2)
        ended, goes_on = bool(steps.ended[0, 0]), bool(steps.mask[0, 1])
        if int(steps.actions[0, 0]) != action or not (ended or goes_on):
            return None
        row = int(steps.rows[0, 1]) if goes_on else place
        return Answer(steps.frames[0, int(goes_on)].numpy(), float(steps.rewards[0, 0]), ended, row)


class KeptStarts:
    """The frames that come with an exported agent; the steps after them are unknown.

    Args:
        starts: of the agent.
    """

    why_unknown = "Only this one frame was recorded. The dream goes on alone."

    def __init__(self, starts: Starts) -> None:
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    def frames(self, first: int, count: int) -> np.ndarray:
        """See `Recorded.frames`."""
        return self._starts.frames[first : first + count, -1]

    def enter(self, index: int) -> tuple[Starts, None]:
        """See `Recorded.enter`."""
        return self._starts.select([index]), None

    def step(self, place: None, action: int) -> None:
        """See `Game.step`."""
        return
