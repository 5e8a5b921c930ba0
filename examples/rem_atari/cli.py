"""The command ``rem-atari``: runs a subcommand and turns what went wrong into one sentence and an exit code.

====  =========================================================================
code  meaning
====  =========================================================================
0     done
1     failed; the last line of stderr says why
2     wrong use: a bad flag, name, value or folder
3     stopped by a signal
141   nobody reads the output any more, as in ``rem-atari list | head -2``
====  =========================================================================
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rem_atari.errors import StoppedError, UsageError

DONE, FAILED, WRONG_USE, STOPPED = 0, 1, 2, 3
UNREAD = 128 + 13
"""What a shell reports of a program that SIGPIPE, signal 13, has ended."""

HELP = """\
usage: rem-atari COMMAND ...

REM: a world-model agent for Atari that learns to play in its own imagination.

commands:
  train    train an agent on a game, evaluate it, and write a report
  report   write a run's report anew
  list     list the Atari games that can be played

`rem-atari COMMAND --help` shows a command's flags.
Try: rem-atari train --preset tiny --env.game Breakout

exit codes: 0 done, 1 failed, 2 wrong use, 3 stopped by a signal

The commands need the packages of an extra: pip install 'retpop[atari]'"""
"""The overview. It is no work of tyro's, so that it answers where the extra is not installed."""

EXTRA = {
    "ale_py": "ale-py",
    "gymnasium": "gymnasium",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "tyro": "tyro",
}
"""Packages of the extra ``atari``, by the names that they are imported by."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after the program's name; None: those of this process.
    Returns:
        The exit code.
    Raises:
        SystemExit: by tyro, which has then said what is wrong (code 2) or shown a command's help (code 0).
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        with _sigterm_interrupts():
            try:
                return _run_explained(words)
            finally:
                # A reader that went away is to be noticed here, not when the interpreter flushes at its end.
                sys.stdout.flush()
    except BrokenPipeError:
        _discard_unread_output()
        return UNREAD


def _run_explained(words: list[str]) -> int:
    """Run the command; an error becomes one sentence on stderr and an exit code."""
    try:
        return _run(words)
    except KeyboardInterrupt as interrupt:
        return _explain(f"stopped by {str(interrupt) or 'SIGINT'}", STOPPED)
    except StoppedError as error:
        return _explain(str(error), STOPPED)
    except BrokenPipeError:
        raise
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return _explain(_sentence(error), WRONG_USE if isinstance(error, UsageError) else FAILED)


def _run(words: list[str]) -> int:
    if not words:
        print(HELP, file=sys.stderr)
        return WRONG_USE
    if words[0] in ("-h", "--help"):
        print(HELP)
        return DONE
    # Imported here: both need packages of the extra, which may be missing.
    from rem_atari.arguments import parse_arguments
    from rem_atari.commands import run_command

    run_command(parse_arguments(words))
    return DONE


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
        return f"the package {EXTRA[error.name]} is needed and not installed: pip install 'retpop[atari]'"
    return str(error) or type(error).__name__


def _explain(message: str, code: int) -> int:
    """Print a message as one line on stderr; returns the code."""
    print(f"rem-atari: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside it SIGTERM raises KeyboardInterrupt, as SIGINT does; training holds both back for a while."""
    # Python lets only the main thread set handlers; a main() in another one leaves signals alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _discard_unread_output() -> None:
    """Point the streams that nobody reads at nothing: the interpreter flushes them once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
