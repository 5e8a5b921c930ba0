"""JSON files of a run's folder, read without trust in their content."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rem_atari.runs.folder import RunFolder

SUMMARY_FILE, EPISODES_FILE = "summary.json", "episodes.csv"

MOST_JSON_BYTES = 1_000_000

NUMBERS = ("step", "epoch", "episodes", "mean_return", "temperature")
"""Numbers that a valid summary must hold."""

_STEP = re.compile(r"step-([0-9]{8,18})")


def newest_summary(run: RunFolder) -> Mapping[str, Any] | None:
    """The summary of the newest evaluated checkpoint, damaged ones skipped, or None.

    It holds the numbers `NUMBERS`; its other content is not checked.
    """
    if not run.evaluation.is_dir():
        return None
    matches = [(_STEP.fullmatch(folder.name), folder) for folder in run.evaluation.iterdir()]
    folders = sorted(((int(match[1]), folder) for match, folder in matches if match), reverse=True)
    summaries = (read_summary(folder / SUMMARY_FILE) for _, folder in folders)
    return next((summary for summary in summaries if summary is not None), None)


def read_summary(path: Path) -> Mapping[str, Any] | None:
    """The summary that `rem-atari evaluate` wrote, or None if it is missing or not whole."""
    summary = read_json(path)
    if summary is None or not all(is_number(summary.get(name)) for name in NUMBERS):
        return None
    return summary


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none, or the file is a link or too large to be ours."""
    try:
        if path.is_symlink() or path.stat().st_size > MOST_JSON_BYTES:
            return None
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a file that are JSON objects, oldest first, and the numbers, from 1, of the others.

    A killed run may leave half a line, and a full disk any kind of line. A missing file has no lines.
    """
    if not path.is_file():
        return [], []
    # Only a newline ends a line: a text within one may hold other characters that split lines.
    texts = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    parsed = [(number, _parse(text)) for number, text in enumerate(texts, start=1) if text]
    lines = [line for _, line in parsed if isinstance(line, dict)]
    return lines, [number for number, line in parsed if not isinstance(line, dict)]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_number(value: object) -> bool:
    """Whether `value` is an int or float that is a finite float (True and False are not)."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
