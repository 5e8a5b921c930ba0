"""Updates: the arguments and results of one, the loop over them, and the means of their metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Metrics = Mapping[str, Tensor | float]
"""What one update measured: scalars by name; NaN where this update had nothing to measure it on."""

Lap = Callable[[str], None]
"""How work that is timed says where its parts end: called with a part's name, as the next one begins."""


def untimed(part: str) -> None:
    """The `Lap` of work that nothing times."""


@dataclass
class Updates:
    """A training phase's updates in one epoch, as far as they have come; interrupted ones go on from here.

    Attributes:
        done: updates made.
        seconds: wall time.
        measured: what each of them measured, by name.
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
        """What was measured, each metric as one tensor (n,), float32."""
        return {name: torch.stack(values) for name, values in self.measured.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` said."""
        self.measured = defaultdict(list, {name: list(values) for name, values in tensors.items()})


def run_updates(
    update: Callable[[], Metrics],
    updates: Updates,
    *,
    count: int,
    max_seconds: float | None,
    after_update: Callable[[], None],
) -> None:
    """Make updates until there are `count`, fewer where the time is up, at least one.

    Args:
        update: makes one update and says what it measured.
        updates: those made so far, none or an interrupted part; it grows with every update.
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
