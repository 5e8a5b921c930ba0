"""Numbers, names and fragments of HTML in the page's format."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from html import escape

MINUS = "−"

PHASE_NAMES = {
    "random": "random play",
    "collect_random": "collect at random",
    "collect": "collect",
    "tokenizer": "train tokenizer",
    "world_model": "train world model",
    "controller": "train controller",
    "evaluate": "evaluate",
    "other": "everything else",
}
"""Names of the phases in the page."""


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits and a true minus sign; a dash for None, NaN as such."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    if abs(value) >= 1e15:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}" if decimals <= 6 else f"{value:.{digits - 1}e}"
    return text.replace("-", MINUS)


def percent(value: float) -> str:
    """A share as a percentage, with one decimal place."""
    return "not a number" if math.isnan(value) else f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """A duration in the two units that matter: 48 s, 3 min 48 s, 2 h 5 min."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(num_bytes: int) -> str:
    """A file's size: 812 B, 4.1 kB, 3.2 MB."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def count(amount: int, noun: str) -> str:
    """A counted noun: 1 episode, 3,000 episodes."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def section(title: str, content: str) -> str:
    """A section of the page; `content` is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table(
    titles: Sequence[str], rows: str, *, numeric: Collection[str] = (), style: str | None = None
) -> str:
    """A table, which scrolls where the page is too narrow for it.

    Args:
        titles: of its columns.
        rows: HTML of them all.
        numeric: the titles of columns of numbers.
        style: its class in the style sheet.
    """
    cells = (
        f'<th class="number">{title}</th>' if title in numeric else f"<th>{title}</th>" for title in titles
    )
    opening = "<table>" if style is None else f'<table class="{style}">'
    head = f"<thead><tr>{''.join(cells)}</tr></thead>"
    return f'<div class="scroll">{opening}{head}<tbody>{rows}</tbody></table></div>'
