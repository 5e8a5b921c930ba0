"""The state of an evaluation, from which a stopped run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rem_atari.envs.vector import GameReturn
from rem_atari.models.controller import Carry


@dataclass(frozen=True)
class Pause:
    """The state of the games and their player when an evaluation was interrupted.

    Attributes:
        environments: from `VectorEnv.resume_states`.
        frames: the frames to act on, uint8 (E, S, S, 3).
        generator: state of the random numbers of the actions.
        carry: the controller's memory; None for random play.
        heldout: the rows recorded so far by column (`Replay.columns`); empty where nothing is recorded.
    """

    environments: list[dict[str, Any] | None]
    frames: np.ndarray
    generator: Tensor
    carry: Carry | None
    heldout: Mapping[str, np.ndarray]


@dataclass
class Evaluation:
    """An evaluation so far; an interrupted one continues from here.

    Attributes:
        games: the games that count so far, in the order in which they ended.
        steps: environment steps so far, all environments together.
        seconds: wall time so far.
        pause: the state to continue from; None: the beginning.
    """

    games: list[GameReturn] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    pause: Pause | None = None

    def state(self) -> dict[str, Any]:
        """Everything but the tensors, plain JSON data."""
        return {
            "games": [asdict(game) for game in self.games],
            "steps": self.steps,
            "seconds": self.seconds,
            "environments": None if self.pause is None else self.pause.environments,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; none unless it was interrupted."""
        if self.pause is None:
            return {}
        return {
            "frames": torch.from_numpy(self.pause.frames),
            "generator": self.pause.generator,
            **{f"carry/{index}": part for index, part in enumerate(self.pause.carry or ())},
            **{f"heldout/{name}": torch.from_numpy(rows) for name, rows in self.pause.heldout.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Evaluation:
        """The evaluation of a `state` and its `tensors`."""
        evaluation = cls([GameReturn(**game) for game in state["games"]], state["steps"], state["seconds"])
        if state["environments"] is not None:
            carry = tuple(tensors[name] for name in sorted(tensors) if name.startswith("carry/"))
            rows = {name: rows.numpy() for name, rows in tensors.items() if name.startswith("heldout/")}
            evaluation.pause = Pause(
                environments=state["environments"],
                frames=tensors["frames"].numpy(),
                generator=tensors["generator"],
                carry=carry or None,
                heldout={name.removeprefix("heldout/"): column for name, column in rows.items()},
            )
        return evaluation
