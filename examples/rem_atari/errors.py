"""The errors that end a command with one sentence instead of a traceback."""

from __future__ import annotations

import errno


class RunError(Exception):
    """A run cannot go on; the message is the one sentence shown to the user (exit code 1)."""


class UsageError(RunError):
    """The command was called wrongly: a bad name, value or folder (exit code 2)."""


class NonFiniteError(RunError):
    """A loss or a gradient is not finite; the update was not applied."""


class StoppedError(RunError):
    """A signal, or the end of the time it was given, asked the run to stop (exit code 3)."""


class RunWarning(RuntimeWarning):
    """Something went wrong and the run goes on; the message is the one sentence shown to the user."""


class EnvironmentDiedError(RunError):
    """An environment raised, died or did not answer in time."""


class EnvironmentAnswerError(RunError, ValueError):
    """An environment answered what none may; another one in its place would do the same."""


def describe_os_error(error: OSError) -> str:
    """What the operating system refused, and for which file, as one sentence for the user.

    A full disk gets a word more: what was there before is still whole, and there is something to do about it.
    """
    reason = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {where}{reason}; nothing that was saved before is lost: make room and try again"
    return f"{where}{reason}"


def explain(error: BaseException) -> str:
    """An error that nobody foresaw in a few words, for a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
