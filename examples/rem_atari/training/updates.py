"""The loop of every training phase: so many updates, bounded by time, and the means of their metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Metrics = Mapping[str, Tensor | float]
"""What one update measured: scalars by name; NaN where this update had nothing to measure it on."""


def run_updates(
    update: Callable[[], Metrics],
    *,
    count: int,
    max_seconds: float | None,
    after_update: Callable[[], None],
) -> dict[str, float]:
    """Make `count` updates, fewer where the time is up, at least one.

    Args:
        update: makes one update and says what it measured.
        count: updates wanted, at least 1.
        max_seconds: no update starts later than this; None: no bound.
        after_update: called after each update; may raise to stop the run.
    Returns:
        The mean of each metric over the updates that measured it (NaN if none did), and ``updates``,
        ``phase_seconds`` and ``rate`` (updates a second).
    """
    measured: defaultdict[str, list[Tensor]] = defaultdict(list)
    started = time.monotonic()
    done = 0
    while done < count and (done == 0 or max_seconds is None or time.monotonic() - started < max_seconds):
        for name, value in update().items():
            measured[name].append(torch.as_tensor(value, dtype=torch.float32))
        done += 1
        after_update()
    seconds = time.monotonic() - started
    means = {name: torch.stack(values).nanmean().item() for name, values in measured.items()}
    return means | {"updates": done, "phase_seconds": seconds, "rate": done / max(seconds, 1e-9)}
