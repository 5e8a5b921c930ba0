"""Figures and tables for readers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """For example "1.23 ms"."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"


def size_of(count: int) -> str:
    """Bytes, for example "1.5 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def first_line(error: BaseException) -> str:
    """An error in one line, for example "ValueError: no such shape"."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def print_table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Columns two spaces apart."""
    lines = [heading, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def markdown_table(heading: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a bar inside a cell becomes a slash."""
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
