"""The whole state of a run in progress, to a checkpoint and back."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.models.controller import Carry, reset_carry
from rem_atari.play.collector import Collection
from rem_atari.play.evaluation_state import Evaluation
from rem_atari.play.real_env import RealEnv
from rem_atari.replay.buffer import Replay
from rem_atari.runs.checkpoint import Checkpoint, CheckpointError
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.schedule import UNITS
from rem_atari.training.seeding import RandomSources, RandomState
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.updates import Updates


@dataclass
class RunState:
    """The progress of a run, and everything that it changes.

    Attributes:
        agent: the networks.
        phases: the components' phases, by name.
        replay: the experience.
        env: the environments that collect.
        tokens: the tokens of the replay's frames.
        random: all sources of random numbers.
        epoch: the current epoch, from 0, which is also the number of complete ones.
        phase: its phase under way; None: between two epochs.
        units: all units (steps, updates or games) of the current phase; None: it has not begun.
        collection: results of the current collection so far, and the controller's memory.
        updates: results of the current training phase so far.
        evaluation: results of the current evaluation or random play so far.
        played: environment steps of the evaluations that are done.
        best_return: the highest mean return of an evaluation so far, or None.
        notes: sentences about what a resumption could not restore.
        resumed: whether the run was stopped in `phase` and has not reached it again.
    """

    agent: Agent
    phases: Mapping[str, TrainingPhase]
    replay: Replay
    env: RealEnv
    tokens: TokenCache
    random: RandomSources
    epoch: int = 0
    phase: str | None = None
    units: int | None = None
    collection: Collection = field(default_factory=Collection)
    updates: Updates = field(default_factory=Updates)
    evaluation: Evaluation = field(default_factory=Evaluation)
    played: int = 0
    best_return: float | None = None
    notes: list[str] = field(default_factory=list)
    resumed: bool = False

    def enter(self, phase: str) -> bool:
        """Enter a phase. False: the run was stopped in a later one, to which it has not come back yet."""
        if self.resumed:
            self.resumed = phase != self.phase
            return not self.resumed
        self._change_to(phase)
        return True

    def end_epoch(self) -> None:
        """The epoch under way is complete."""
        self.epoch += 1
        self._change_to(None)

    def _change_to(self, phase: str | None) -> None:
        self.phase = phase
        self.units = None
        self.collection = Collection(carry=self.collection.carry)
        self.updates = Updates()
        self.played += self.evaluation.steps
        self.evaluation = Evaluation()

    @property
    def step(self) -> int:
        """A number that grows with everything that a run does, so that no two states share it.

        Epochs count too, because one may do nothing but evaluate.
        """
        updates = sum(phase.component.updates for phase in self.phases.values())
        return self.epoch + self.replay.num_steps + updates + self.played + self.evaluation.steps

    def checkpoint(self, more: Mapping[str, Any], config: bytes) -> Checkpoint:
        """The state as a checkpoint with a copy of config.json; the replay must be flushed.

        Its JSON data takes in `more` too.
        """
        random = self.random.snapshot()
        components = {name: phase.component for name, phase in self.phases.items()}
        optimizer: dict[str, Tensor] = {}
        for component in components.values():
            optimizer |= component.optimizer_tensors()
        training = {
            **_named("random", random.tensors),
            **_named("tokens", self.tokens.tensors()),
            **_named("updates", self.updates.tensors()),
            **_named("carry", {str(index): part for index, part in enumerate(self.collection.carry or ())}),
            **_named("evaluation", self.evaluation.tensors()),
            "frames": torch.from_numpy(self.env.frames),
        }
        for name, phase in self.phases.items():
            training |= _named(name, phase.tensors())
        state = {
            "epoch": self.epoch,
            "phase": self.phase,
            "units": self.units,
            "env_steps": self.replay.num_steps,
            "updates": {name: component.updates for name, component in components.items()},
            "phases": {name: phase.state() for name, phase in self.phases.items()},
            "best_return": self.best_return,
            "notes": self.notes,
            "collection": self.collection.state(),
            "evaluation": self.evaluation.state(),
            "played": self.played,
            "turn": {"done": self.updates.done, "seconds": self.updates.seconds},
            "shards": [asdict(entry) for entry in self.replay.shards],
            "environments": self.env.resume_states(),
            "random": random.data,
        }
        return Checkpoint(self.step, self.agent.state_dict(), optimizer, {**more, **state}, training, config)

    def load(self, checkpoint: Checkpoint, *, seed: int) -> list[int]:
        """Load a checkpoint; the replay has already been loaded from it.

        Args:
            checkpoint: of a run of the same configuration.
            seed: for the environments that could not be saved and start anew.
        Returns:
            The indices of these environments.
        Raises:
            CheckpointError: it belongs to another configuration, or is no checkpoint of an agent.
        """
        try:
            return self._load(checkpoint, seed)
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch lists every weight
            raise CheckpointError(
                f"checkpoint {checkpoint.step} does not fit this run's configuration: {reason}"
            ) from error

    def _load(self, checkpoint: Checkpoint, seed: int) -> list[int]:
        state, training = checkpoint.state, checkpoint.training
        self.agent.load_state_dict(dict(checkpoint.model))
        for name, phase in self.phases.items():
            phase.component.load_optimizer_tensors(dict(checkpoint.optimizer))
            phase.component.updates = int(state["updates"][name])
            if phase.component.updates > 0 and not phase.component.optimizer_tensors():
                raise ValueError(f"the optimiser of the {name} is missing")
            phase.load_state(state["phases"][name])
            phase.load_tensors(_of(name, training))
        self.tokens.load_tensors(_of("tokens", training))
        self.epoch, self.phase = int(state["epoch"]), state["phase"]
        self.resumed = self.phase is not None
        if self.resumed and self.phase not in UNITS:
            raise ValueError(f"it was saved in a phase {self.phase!r}")
        self.units = None if state["units"] is None else int(state["units"])
        self.best_return, self.notes = state["best_return"], [str(note) for note in state["notes"]]
        self.updates = Updates(int(state["turn"]["done"]), float(state["turn"]["seconds"]))
        self.updates.load_tensors(_of("updates", training))
        if "evaluation" in state:  # checkpoints of earlier versions begin an evaluation anew
            self.played = int(state["played"])
            self.evaluation = Evaluation.from_state(state["evaluation"], _of("evaluation", training))
        restarted = self._load_play(state, training, seed)
        # Last, because building and loading the parts may draw from them.
        self.random.restore(RandomState(_of("random", training), state["random"]))
        return restarted

    def _load_play(self, state: Mapping[str, Any], training: Mapping[str, Tensor], seed: int) -> list[int]:
        """The environments and the controller's memory of them."""
        frames = training["frames"].numpy()
        if frames.shape != (self.env.num_envs, *self.replay.frame_shape) or frames.dtype != np.uint8:
            raise ValueError(f"the environments' frames are {frames.dtype} {frames.shape}")
        restarted = self.env.resume(state["environments"], frames, seed=seed)
        carry = self._load_carry(_of("carry", training), restarted)
        self.collection = Collection.from_state(state["collection"], carry)
        return restarted

    def _load_carry(self, saved: Mapping[str, Tensor], restarted: list[int]) -> Carry | None:
        """The controller's memory, blank for the environments that start anew."""
        if not saved:
            return None
        blank = self.agent.controller.initial_carry(self.env.num_envs)
        carry = tuple(saved[str(index)].to(part) for index, part in enumerate(blank))
        if [part.shape for part in carry] != [part.shape for part in blank]:
            raise ValueError(f"the controller's memory is {[tuple(part.shape) for part in carry]}")
        is_new = torch.zeros(self.env.num_envs, dtype=torch.bool, device=blank[0].device)
        is_new[restarted] = True
        return reset_carry(carry, is_new)


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in a checkpoint."""
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def _of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `_named` gave a checkpoint."""
    prefix = f"{part}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
