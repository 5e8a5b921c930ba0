"""The progress that a user sees: the current phase, its rate, and the time left of the run.

A terminal shows one moving bar; a file or a pipe gets a plain line for each finished phase, and one a minute
while a phase goes on.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichBar

from rem_atari.training.schedule import UNITS, Work

BAR_SECONDS = 0.2
"""Minimum seconds between updates of a bar's numbers."""

LINE_SECONDS = 60.0
"""Minimum seconds between the plain lines of one phase."""


class TimeLeft:
    """Estimates the time left of a run from its pace so far.

    Args:
        plan: all work of the run, in order.
    """

    def __init__(self, plan: Sequence[Work]) -> None:
        self._waiting = list(plan)
        self.pace: dict[str, float] = {}
        """Seconds per unit of each measured phase."""

    def begin(self, epoch: int, phase: str) -> None:
        """Remove this work, and all work planned before it, from the waiting work."""
        for index, work in enumerate(self._waiting):
            if (work.epoch, work.phase) == (epoch, phase):
                del self._waiting[: index + 1]
                return

    def drop(self, phase: str) -> None:
        """Remove all waiting work of a phase that will not run again."""
        self._waiting = [work for work in self._waiting if work.phase != phase]

    def measure(self, phase: str, units: int, seconds: float) -> None:
        """Record the phase's pace, from `units` done in `seconds`."""
        if units > 0:
            self.pace[phase] = seconds / units

    def describe(self, phase: str, units: int) -> str:
        """The time left as text: for `units` more of the running phase and for all waiting work.

        It begins with "about", or with "at least" while a waiting phase was never measured.
        """
        total, complete = units * self.pace.get(phase, 0.0), phase in self.pace
        for work in self._waiting:
            pace = self.pace.get(work.phase)
            bounds = [] if work.max_seconds is None else [work.max_seconds]
            if pace is not None:
                bounds.append(work.units * pace)
            complete = complete and bool(bounds)
            total += min(bounds, default=0.0)
        return f"{'about' if complete else 'at least'} {format_duration(total)} left"


class Progress(ABC):
    """Shows the progress of a run.

    Args:
        plan: all work of the run.
        epochs: number of epochs.
        refresh_seconds: minimum time between two views of a running phase.
    """

    def __init__(self, plan: Sequence[Work], epochs: int, *, refresh_seconds: float) -> None:
        self.time_left = TimeLeft(plan)
        self.epochs = epochs
        self.refresh_seconds = refresh_seconds
        self._phase = ""
        self._units = 0
        self._done = 0
        self._done_before = 0
        self._started = 0.0
        self._refreshed = 0.0

    @contextmanager
    def phase(self, epoch: int, phase: str, units: int, *, done: int = 0) -> Iterator[None]:
        """Show a phase while it runs.

        Args:
            epoch: the epoch, from 0.
            phase: its name.
            units: its expected amount of work.
            done: the part of it done before the run was resumed.
        """
        self.time_left.begin(epoch, phase)
        self._phase, self._units = phase, units
        self._started = self._refreshed = time.monotonic()
        self._done = self._done_before = done
        self._begin(f"epoch {epoch + 1}/{self.epochs}  {phase.replace('_', ' ')}")
        yield
        # The time limit dropped the undone work.
        self._units = self._done
        self._finish(*self._measure())

    def advance(self, units: int = 1) -> None:
        """Add to the work done in the running phase."""
        self._done += units
        now = time.monotonic()
        if now - self._refreshed >= self.refresh_seconds:
            self._refreshed = now
            self._refresh(*self._measure())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def say(self, text: str) -> None:
        """Show a line that stays."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more will come."""

    @abstractmethod
    def _begin(self, title: str) -> None: ...

    @abstractmethod
    def _refresh(self, rate: str, left: str) -> None: ...

    @abstractmethod
    def _finish(self, rate: str, left: str) -> None: ...

    def _measure(self) -> tuple[str, str]:
        """Rate of the running phase and time left of the run, as text."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        done = self._done - self._done_before
        self.time_left.measure(self._phase, done, seconds)
        rate = f"{done / seconds:.1f} {UNITS[self._phase]}/s"
        return rate, self.time_left.describe(self._phase, max(self._units - self._done, 0))


class LineProgress(Progress):
    """Plain lines, for files and pipes: one for each finished phase, and one a minute while a phase goes on.

    Args:
        plan: all work of the run.
        epochs: number of epochs.
        stream: where the lines go.
    """

    def __init__(self, plan: Sequence[Work], epochs: int, stream: TextIO) -> None:
        super().__init__(plan, epochs, refresh_seconds=LINE_SECONDS)
        self._stream = stream
        self._title = ""

    def say(self, text: str) -> None:
        """Write a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to do."""

    def _begin(self, title: str) -> None:
        self._title = title

    def _refresh(self, rate: str, left: str) -> None:
        self.say(f"{self._title}: {self._done} of {self._units} {UNITS[self._phase]} ({rate}), {left}")

    def _finish(self, rate: str, left: str) -> None:
        seconds = format_duration(time.monotonic() - self._started)
        self.say(f"{self._title}: {self._done} {UNITS[self._phase]} in {seconds} ({rate}), {left}")


class BarProgress(Progress):
    """One bar that moves; for terminals.

    Args:
        plan: all work of the run.
        epochs: number of epochs.
        stream: the terminal.
    """

    def __init__(self, plan: Sequence[Work], epochs: int, stream: TextIO) -> None:
        super().__init__(plan, epochs, refresh_seconds=BAR_SECONDS)
        self._bar = RichBar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[left]}"),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("starting", total=None, rate="", left="")
        self._bar.start()

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def _begin(self, title: str) -> None:
        self._bar.reset(self._task, total=self._units, description=f"{title:<24}", rate="", left="")

    def _refresh(self, rate: str, left: str) -> None:
        self._bar.update(self._task, completed=self._done, rate=f"{rate:>18}", left=left)

    def _finish(self, rate: str, left: str) -> None:
        self._refresh(rate, left)


def make_progress(plan: Sequence[Work], epochs: int, stream: TextIO) -> Progress:
    """A bar if the stream is a terminal, else plain lines."""
    return (BarProgress if stream.isatty() else LineProgress)(plan, epochs, stream)


def format_duration(seconds: float) -> str:
    """Seconds as 1:02:03, or as 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
