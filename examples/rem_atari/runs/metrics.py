"""A run's metrics, written as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rem_atari.errors import RunWarning
from rem_atari.runs.durable import replace_file
from rem_atari.runs.reading import read_json_lines

LINE_FIELDS = ("epoch", "env_steps", "seconds", "cpu_seconds", "phase")
"""What every line begins with."""

MetricValue = float | int | Sequence[float]
"""A number, or a list of numbers (returns); lists are left out of TensorBoard."""


class MetricsLog:
    """Writes one line of metrics for each phase of each epoch.

    Each line is a JSON object on its own, written out at once, so that a killed run keeps all of them.
    Numbers that are not finite become null, because JSON has none.

    A resumed run keeps the lines up to its checkpoint and writes the later ones again: they are removed here,
    and TensorBoard's event files are written anew from the remaining lines.

    Args:
        path: the file of JSON lines.
        tensorboard: folder of TensorBoard's event files.
        keep: how many existing lines to keep.
        seconds: how long the run has taken so far.
        cpu_seconds: how much CPU time it has taken so far.
    """

    def __init__(
        self, path: Path, tensorboard: Path, *, keep: int = 0, seconds: float = 0.0, cpu_seconds: float = 0.0
    ) -> None:
        self._started = time.monotonic() - seconds
        self._cpu_started = time.process_time() - cpu_seconds
        lines = _cut(path, keep)
        self.num_lines = len(lines)
        """Lines in the file."""
        for old in tensorboard.glob("events.out.tfevents.*"):
            old.unlink()
        self._file = path.open("a", encoding="utf-8")
        try:
            self._writer = SummaryWriter(str(tensorboard))
        except OSError:
            self._file.close()
            raise
        # The time at which a rewritten point was measured, as if the run had never paused.
        start = time.time() - seconds
        for line in lines:
            try:
                entry = json.loads(line)
                when = start + entry["seconds"]
                self._show(entry["phase"], entry["epoch"], entry.items(), when=when)
            except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
                continue  # not written by this class

    @property
    def seconds(self) -> float:
        """How long the run has taken, the time before it was resumed included."""
        return time.monotonic() - self._started

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the run over all threads, without environments in processes of their own."""
        return time.process_time() - self._cpu_started

    def write(self, phase: str, *, epoch: int, env_steps: int, values: Mapping[str, MetricValue]) -> None:
        """Write one line.

        Args:
            phase: name of the phase.
            epoch: the epoch, from 0.
            env_steps: environment steps collected so far.
            values: the metrics by name.
        """
        line = {
            "epoch": epoch,
            "env_steps": env_steps,
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "phase": phase,
        }
        clean = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line | clean, allow_nan=False) + "\n")
        self._file.flush()
        self.num_lines += 1
        self._show(phase, epoch, clean.items(), when=None)

    def sync(self) -> None:
        """Wait until the lines are on the disk, because a checkpoint counts on them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        try:
            self._file.close()
        finally:
            self._writer.close()

    def _show(self, phase: str, epoch: int, values: Iterable[tuple[str, Any]], *, when: float | None) -> None:
        """Write the numbers among the values to TensorBoard; `when` in seconds of the clock, None: now."""
        for name, value in values:
            if name not in LINE_FIELDS and isinstance(value, int | float):
                self._writer.add_scalar(f"{phase}/{name}", value, global_step=epoch, walltime=when)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, oldest first; a last line cut short by a kill is left out.

    Any other line that is not a JSON object is also left out, with a warning that names it.
    """
    lines, damaged = read_json_lines(path)
    last = None if _ends_with_a_line(path) else len(lines) + len(damaged)
    for number in damaged:
        if number != last:
            warnings.warn(f"{path}, line {number} cannot be read and is left out", RunWarning, stacklevel=2)
    return lines


def _ends_with_a_line(path: Path) -> bool:
    return path.read_bytes().endswith(b"\n")


def _cut(path: Path, keep: int) -> list[bytes]:
    """Truncate a file after its first `keep` whole lines, in one step; returns these."""
    if not path.exists():
        return []
    # Only a newline ends a line, for every reader of the file; text after the last one is half a line.
    *lines, rest = path.read_bytes().split(b"\n")
    if rest or keep < len(lines):
        replace_file(path, b"".join(line + b"\n" for line in lines[:keep]))
    return lines[:keep]


def _finite(value: MetricValue) -> MetricValue | list[float | None] | None:
    """The value with every number that is not finite replaced by None."""
    if isinstance(value, Sequence):
        return [entry if math.isfinite(entry) else None for entry in value]
    return value if math.isfinite(value) else None
