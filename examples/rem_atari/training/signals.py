"""Stopping on SIGINT and SIGTERM where the run is consistent, not where the signal happens to hit."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from rem_atari.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers that a signal asked the run to stop; the run asks :meth:`check` between its steps.

    A context manager: inside it the first signal is remembered, and a second one acts as it would without us,
    so that a run that hangs can still be ended. Outside of it nothing ever stops.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raise where a signal has come.

        Raises:
            StoppedError: SIGINT or SIGTERM was received.
        """
        if self._received is not None:
            raise StoppedError(f"stopped by {self._received.name}")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
