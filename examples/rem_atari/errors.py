"""The errors that end a command with one sentence instead of a traceback."""

from __future__ import annotations

import errno


class RunError(Exception):
    """A run cannot continue; the message is the sentence shown to the user (exit code 1)."""


class UsageError(RunError, ValueError):
    """Wrong use, of a command (exit code 2) or a function: a bad name, value or folder."""


class NonFiniteError(RunError):
    """A loss or a gradient is not finite; the update was not applied."""


class StoppedError(RunError):
    """A signal or a time limit stopped the run (exit code 3)."""


class RunWarning(RuntimeWarning):
    """Something failed and the run continues; the message is the sentence shown to the user."""


class EnvironmentDiedError(RunError):
    """An environment raised, died or did not answer in time."""


class EnvironmentAnswerError(RunError, ValueError):
    """An environment gave an invalid answer; a replacement would do the same."""


def describe_os_error(error: OSError) -> str:
    """An error of the operating system and its file as one sentence for the user.

    For a full disk it adds that earlier files are whole and what to do.
    """
    reason = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {where}{reason}; nothing that was saved before is lost: make room and try again"
    return f"{where}{reason}"


def explain(error: BaseException) -> str:
    """An unexpected error in a few words, for use in a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
