"""The interface between the trainer and each component's phase of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from rem_atari.replay.buffer import Replay
from rem_atari.training.component import Component
from rem_atari.training.updates import Lap, Metrics, untimed

PARTS = ("data", "forward", "backward", "optimiser")
"""The parts of an update, in order."""

Batch = TypeVar("Batch")


class TrainingPhase(ABC, Generic[Batch]):
    """A component's turn in each epoch.

    Args:
        component: what trains.
        warn: told, in a sentence, what the user should know.
    """

    def __init__(self, component: Component, warn: Callable[[str], None]) -> None:
        self.component = component
        self.warn = warn

    @property
    def is_over(self) -> bool:
        """Whether the phase has made the last update it will ever make; never, unless a phase says so."""
        return False

    @abstractmethod
    def prepare(self, epoch: int) -> bool:
        """Get ready for an epoch's updates; False: there are none in this epoch, the phase rests."""

    def go_on(self) -> None:
        """Get ready for the rest of an epoch's updates, of which some were made before the run was resumed.

        Nothing, unless `prepare` finds something out that no checkpoint holds.
        """
        return

    def update(self, lap: Lap = untimed) -> Metrics:
        """Make one update, on a batch of its own, and say what it measured.

        Args:
            lap: told as each of `PARTS` ends.
        """
        batch = self.draw()
        lap("data")
        with self.component.autocast():
            loss, metrics = self.loss(batch)
        lap("forward")
        metrics = self.component.apply(loss, metrics, lap)
        self.after_update(metrics)
        lap("optimiser")
        return metrics

    @abstractmethod
    def draw(self) -> Batch:
        """A batch from the replay, on the device, with tokens where the component wants them."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss on a batch, and what was measured on it."""

    def after_update(self, metrics: Metrics) -> None:
        """Do what follows an update; nothing unless a phase does."""
        return

    def more_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the whole turn, given `means` of the updates'; none unless a phase adds some."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the phase remembers from epoch to epoch, plain JSON data; nothing unless a phase does."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """What the phase remembers as tensors; none unless a phase does."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""
        return

    def changed_on_the_way(self) -> list[Tensor]:
        """What `update` may change of the agent before its step is applied, so that it can be undone."""
        return []

    def has_episode(self, replay: Replay, min_real: int) -> bool:
        """Whether an episode of `min_real` steps can be sampled; warns where not."""
        ready = replay.ready(min_real)
        if not ready:
            name = self.component.name.replace("_", " ")
            self.warn(
                f"warning: no episode collected so far has {min_real} steps; the {name} does not train yet"
            )
        return ready
