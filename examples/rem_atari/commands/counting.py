"""Progress of a command other than training: a count and its total."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rem_atari.runs.progress import format_duration

LINES = 4
"""Most lines of progress where the output is not a terminal."""


@contextmanager
def counting(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a growing count on stderr: a bar on a terminal, else a few lines.

    Args:
        title: what is going on.
        total: the count at the end.
        unit: what is counted, in the plural.
    Returns:
        A function to call with how many more are done.
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda more: bar.advance(task, more)
        return
    started, done, said = time.monotonic(), 0, 0

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        if done * LINES // total > said:
            said = done * LINES // total
            tell(f"{title}: {done} of {total} {unit} in {format_duration(time.monotonic() - started)}")

    yield advance


def tell(text: str) -> None:
    """Print a line on stderr, apart from results."""
    print(text, file=sys.stderr, flush=True)
