"""What a run measures, written as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

MetricValue = float | int | Sequence[float]
"""A number, or a list of numbers (returns); lists are left out of TensorBoard."""


class MetricsLog:
    """Writes one line of metrics for each phase of each epoch.

    Each line is a JSON object on its own, written out at once, so that a killed run keeps all of them.
    Numbers that are not finite become null, which JSON can say.

    Args:
        path: the file of JSON lines; appended to.
        tensorboard: folder of TensorBoard's event files.
    """

    def __init__(self, path: Path, tensorboard: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(tensorboard))
        self._started = time.monotonic()

    def write(self, phase: str, *, epoch: int, env_steps: int, values: Mapping[str, MetricValue]) -> None:
        """Write one line.

        Args:
            phase: name of the phase.
            epoch: the epoch, from 0.
            env_steps: environment steps collected so far.
            values: the metrics by name.
        """
        seconds = time.monotonic() - self._started
        line = {"epoch": epoch, "env_steps": env_steps, "seconds": round(seconds, 3), "phase": phase}
        clean = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line | clean, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in clean.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{phase}/{name}", value, global_step=epoch)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file, oldest first; a last line cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _finite(value: MetricValue) -> MetricValue | list[float | None] | None:
    """The value with every number that is not finite replaced by None."""
    if isinstance(value, Sequence):
        return [entry if math.isfinite(entry) else None for entry in value]
    return value if math.isfinite(value) else None
