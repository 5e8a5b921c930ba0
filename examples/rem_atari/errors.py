"""The errors that end a command with one sentence instead of a traceback."""

from __future__ import annotations


class RunError(Exception):
    """A run cannot go on; the message is the one sentence shown to the user (exit code 1)."""


class UsageError(RunError):
    """The command was called wrongly: a bad name, value or folder (exit code 2)."""


class NonFiniteError(RunError):
    """A loss or a gradient is not finite; the update was not applied."""


class StoppedError(RunError):
    """A signal asked the run to stop (exit code 3)."""
