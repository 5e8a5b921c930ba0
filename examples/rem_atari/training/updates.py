"""Updates: the arguments and results of one, the loop over them, and the means of their metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Metrics = Mapping[str, Tensor | float]
"""One update's metrics: scalars by name; NaN if the update had no data for one."""

Lap = Callable[[str], None]
"""Called with a part's name as the part ends, by work that is timed."""


def untimed(part: str) -> None:
    """The `Lap` of work that is not timed."""


@dataclass
class Updates:
    """A training phase's updates in one epoch so far; an interrupted phase continues from here.

    Attributes:
        done: updates made.
        seconds: wall time.
        measured: their metrics, by name.
    """

    done: int = 0
    seconds: float = 0.0
    measured: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def means(self) -> dict[str, float]:
        """The mean of each metric over the updates that measured it (NaN if none did), and ``updates``,
        ``phase_seconds`` and ``rate`` (updates a second)."""
        means = {name: values.nanmean().item() for name, values in self.tensors().items()}
        rate = self.done / max(self.seconds, 1e-9)
        return means | {"updates": self.done, "phase_seconds": self.seconds, "rate": rate}

    def tensors(self) -> dict[str, Tensor]:
        """The metrics, each as one tensor (n,), float32."""
        return {name: torch.stack(values) for name, values in self.measured.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what :meth:`tensors` returned."""
        self.measured = defaultdict(list, {name: list(values) for name, values in tensors.items()})


def run_updates(
    update: Callable[[], Metrics],
    updates: Updates,
    *,
    count: int,
    max_seconds: float | None,
    after_update: Callable[[], None],
) -> None:
    """Make updates until there are `count` or the time is up, at least one.

    Args:
        update: makes one update and returns its metrics.
        updates: those made so far (none, or those before an interruption); extended by each update.
        count: updates wanted, at least 1.
        max_seconds: no update starts later than this; None: no bound.
        after_update: called after each update; may raise to stop the run, and `updates` holds all that was
            done.
    """
    started = time.monotonic() - updates.seconds
    while updates.done < count:
        if updates.done > 0 and max_seconds is not None and updates.seconds >= max_seconds:
            break
        for name, value in update().items():
            updates.measured[name].append(torch.as_tensor(value, dtype=torch.float32))
        updates.done += 1
        updates.seconds = time.monotonic() - started
        after_update()
