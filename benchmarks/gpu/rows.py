"""A measurement as a row, and rows as lines of JSON in a file that outlives a crash of its writer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, one test, or what kept one from being made.

    Attributes:
        part: the part of the report.
        what: the operation, model or test.
        shape, dtype: of its inputs.
        way: "forward", "forward+backward", or what else was done to it.
        mode: "eager", or "graph" in a CUDA graph; "" where there is one time only.
        seconds: median; None where nothing was timed.
        floor_bytes: bytes that must be moved: each input read once, each output written once.
        floor_flops: multiplications and additions that must be done, by the matrix units of dtype.
        note: what else is to be said.
        failed: whether it is a failure.
    """

    part: str
    what: str
    shape: str = ""
    dtype: str = ""
    way: str = ""
    mode: str = ""
    seconds: float | None = None
    floor_bytes: int = 0
    floor_flops: int = 0
    note: str = ""
    failed: bool = False


def append_row(path: Path, row: Row) -> None:
    """Add one line; what was written stays when the process dies."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where nothing was written. A line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]
