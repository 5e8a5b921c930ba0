"""The command ``rem-atari``: runs a subcommand and turns what went wrong into one sentence and an exit code.

====  =========================================================================
code  meaning
====  =========================================================================
0     done
1     failed; the last line of stderr says why
2     wrong use: a bad flag, name, value or folder
3     stopped by a signal
====  =========================================================================
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from rem_atari.errors import StoppedError, UsageError

DONE, FAILED, WRONG_USE, STOPPED = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after the program's name; None: those of this process.
    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        return _explain("stopped by SIGINT", STOPPED)
    except StoppedError as error:
        return _explain(str(error), STOPPED)
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        code = WRONG_USE if isinstance(error, UsageError) else FAILED
        return _explain(str(error) or type(error).__name__, code)


def _run(words: list[str]) -> int:
    # Imported here, so that a missing package of the extra ends in a sentence, not in a traceback.
    try:
        from rem_atari.arguments import parse_arguments
    except ModuleNotFoundError as error:
        raise ImportError(
            f"rem-atari needs the package {error.name}, which is not installed: pip install 'retpop[atari]'"
        ) from error
    from rem_atari.commands import run_command

    run_command(parse_arguments(words))
    return DONE


def _explain(message: str, code: int) -> int:
    """Print a message as one line on stderr; returns the code."""
    print(f"rem-atari: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
