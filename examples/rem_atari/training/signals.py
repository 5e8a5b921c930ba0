"""Stopping on a signal or a time limit, at a point where the run's state is consistent."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from rem_atari.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers that a signal asked the run to stop; the run asks :meth:`check` between its steps.

    A context manager: inside it the first signal is remembered, and a second one has its usual effect, so
    that a run that hangs can still be ended. Outside of it `check` never raises.

    Args:
        after: seconds inside of it after which the run is to stop too; None: only a signal stops it.
    """

    def __init__(self, after: float | None = None) -> None:
        self._after = after
        self._deadline: float | None = None
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._deadline = None if self._after is None else time.monotonic() + self._after
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._deadline = None
        self._restore()

    def check(self) -> None:
        """Raise where a signal has come or the time is up.

        Raises:
            StoppedError: SIGINT or SIGTERM was received, or `after` seconds have passed.
        """
        if self._received is not None:
            raise StoppedError(f"stopped by {self._received.name}")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise StoppedError(f"stopped after {self._after:g} seconds, as --stop-after asked")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
