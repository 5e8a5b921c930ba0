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
    """A component's phase in each epoch.

    Args:
        component: the part that is trained.
        warn: called with a sentence for the user.
    """

    def __init__(self, component: Component, warn: Callable[[str], None]) -> None:
        self.component = component
        self.warn = warn

    @property
    def is_over(self) -> bool:
        """Whether the phase will make no further update in the whole run; by default False."""
        return False

    @abstractmethod
    def prepare(self, epoch: int) -> bool:
        """Prepare an epoch's updates; False: the phase makes none in this epoch."""

    def go_on(self) -> None:
        """Prepare the rest of an epoch's updates after a resumption in the middle of them.

        Does nothing by default; a phase overrides it if `prepare` computes what no checkpoint holds.
        """
        return

    def update(self, lap: Lap = untimed) -> Metrics:
        """Make one update on a new batch, and return its metrics.

        Args:
            lap: called as each of `PARTS` ends.
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
        """A batch from the replay, on the device, with tokens if the component needs them."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss on a batch, and its metrics."""

    def after_update(self, metrics: Metrics) -> None:
        """Called after an update; does nothing by default."""
        return

    def more_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the whole phase, given the `means` of the updates'; none by default."""
        return {}

    def state(self) -> dict[str, Any]:
        """The phase's state between epochs, as plain JSON data; empty by default."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """The phase's state as tensors; none by default."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""
        return

    def changed_on_the_way(self) -> list[Tensor]:
        """Tensors that `update` may change before its step is applied; they are restored if it fails."""
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
