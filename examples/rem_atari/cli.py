"""The command ``rem-atari``: runs a subcommand and turns what went wrong into one sentence and an exit code.

====  =========================================================================
code  meaning
====  =========================================================================
0     done
1     failed; the last line of stderr gives the reason
2     wrong use: a bad flag, name, value or folder
3     stopped by a signal, or after the time that ``--stop-after`` gave it
141   the reader closed the output, as in ``rem-atari list | head -2``
====  =========================================================================
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import Any

from rem_atari.errors import RunWarning, StoppedError, UsageError, describe_os_error

DONE, FAILED, WRONG_USE, STOPPED = 0, 1, 2, 3
UNREAD = 128 + 13
"""The exit code that a shell reports for a program that SIGPIPE, signal 13, ended."""

HELP = """\
usage: rem-atari COMMAND ...

REM: a world-model agent for Atari that learns to play in its own imagination.

commands:
  train      train an agent on a game, evaluate it, and write a report
  resume     go on with a run that was stopped
  evaluate   play whole games with a trained agent: scores and films
  blind      measure policies that see nothing of a game
  record     film the game, its reconstruction and the imagination side by side
  export     write a trained agent into a small folder, to keep and share
  play       play in the agent's dream, beside the real game, in the browser
  report     write a run's report anew
  diagnose   say why a run does not learn, from its metrics and report
  retrain    train a fresh controller in the dreams of a run
  scores     aggregate runs over games and seeds, beside the published agents
  sweep      train a run for each of many games and seeds, on Ray
  benchmark  measure this machine: how long would a run take?
  weights    fetch the weights of the perceptual loss, once
  list       list the games, the presets and the agents of the package

`rem-atari COMMAND --help` shows a command's flags, an example, and what it writes;
`rem-atari --version` the version.
Try: rem-atari train --preset tiny --env.game Breakout

exit codes: 0 done, 1 failed, 2 wrong use, 3 stopped by a signal or --stop-after

The commands need the packages of an extra: pip install 'retpop[atari]'"""
"""The overview; it needs no tyro, so it also works without the extra."""

SPELLINGS = {
    "±": "+-",
    "−": "-",
    "–": "-",
    "—": "-",
    "×": "x",
    "…": "...",
    "∞": "inf",
    "“": '"',
    "”": '"',
    "’": "'",
}
"""Replacements for characters that the terminal lacks; all others become a question mark."""

EXTRAS = {
    "atari": {
        "ale_py": "ale-py",
        "gymnasium": "gymnasium",
        "imageio_ffmpeg": "imageio-ffmpeg",
        "matplotlib": "matplotlib",
        "numpy": "numpy",
        "PIL": "pillow",
        "rich": "rich",
        "safetensors": "safetensors",
        "tensorboard": "tensorboard",
        "tyro": "tyro",
    },
    "play": {
        "anyio": "anyio",
        "starlette": "starlette",
        "uvicorn": "uvicorn",
        "websockets": "websockets",
    },
    "scores": {
        "pandas": "pandas",
        "rliable": "rliable",
    },
    "sweep": {
        "ray": "ray",
    },
}
"""Packages of the extras, by the names that they are imported by."""


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
    _spell_out_what_terminals_cannot_show()
    try:
        with _sigterm_interrupts(), _plain_warnings():
            try:
                return _run_explained(words)
            finally:
                # Flush here to notice a closed pipe now and not when the interpreter exits.
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
    if words[0] == "--version":
        print(f"rem-atari {version('retpop')}")
        return DONE
    # Imported here because both need packages of the extra, which may be missing.
    from rem_atari.commands import run_command
    from rem_atari.parsing import parse_arguments

    run_command(parse_arguments(words))
    return DONE


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        for extra, packages in EXTRAS.items():
            if error.name in packages:
                package = packages[error.name]
                return f"the package {package} is needed and not installed: pip install 'retpop[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(error)
    return str(error) or type(error).__name__


def _explain(message: str, code: int) -> int:
    """Print a message as one line on stderr; returns the code."""
    print(f"rem-atari: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does; training defers both."""
    # Only the main thread may set handlers; main() in another thread leaves signals unchanged.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print this package's warnings as lines for the user; other warnings keep Python's format."""
    with warnings.catch_warnings():
        by_default = warnings.showwarning
        # Every occurrence, not once per line of code.
        warnings.filterwarnings("always", category=RunWarning)

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, RunWarning):
                print(f"rem-atari: warning: {message}", file=sys.stderr, flush=True)
            else:
                by_default(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _spell_out_what_terminals_cannot_show() -> None:
    """Let output continue on a terminal of another encoding (LANG=C), or with a path in no encoding."""
    codecs.register_error("rem_atari.spell_out", _spell_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="rem_atari.spell_out")


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """The replacement for characters that cannot be written, and the position after them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SPELLINGS.get(character, "?") for character in text), error.end


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _discard_unread_output() -> None:
    """Redirect closed streams to the null device, because the interpreter flushes them again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
