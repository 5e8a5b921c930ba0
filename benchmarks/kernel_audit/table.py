"""The audit's rows: its CSV, a row for each kernel of a case with the commit it was made on, and as printed.

A case that is audited again takes the place of its earlier rows. Rows of other cases stay, with the commit
that they name, so the audit can be made part by part; what another Triton compiled goes, and so do cases that
are no longer audited. The targets are judged over all rows of the file.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.kernel_audit.calls import MULTIPROCESSORS
from benchmarks.kernel_audit.cases import PARTS
from benchmarks.kernel_audit.targets import Row, Verdict, judge
from benchmarks.text import print_table

_TEXTS = ("commit", "triton", "torch", "part", "op", "shape", "dtype", "architecture", "kernel", "failure")
_LISTS = ("grid", "overflows", "hazards")


def merge(path: Path, rows: Sequence[Row], versions: Mapping[str, str]) -> None:
    """Put all rows of some cases into the file; ``versions``: of the checkout, "triton" and "torch"."""
    new = [{**versions, **row} for row in rows]
    replaced = {_case(row) for row in new}
    earlier = [row for row in read(path) if row["triton"] == versions["triton"]]
    places = _places()
    kept = [row for row in earlier if _case(row) not in replaced and _case(row) in places] + new
    kept.sort(key=lambda row: places[_case(row)])
    records = [{name: text(value) for name, value in row.items()} for row in kept]
    for verdict in judge(kept):
        judged = {
            "part": "target",
            "target": verdict.target.name,
            "limit": f"{verdict.target.limit:g}",
            "worst": f"{verdict.worst:.6g}",
            "where": verdict.where,
            "verdict": "met" if verdict.met else "missed",
        }
        records.append({**versions, **judged})
    names = list(dict.fromkeys(name for record in records for name in record))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    beside.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of the file, without the targets; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        found = [record for record in csv.DictReader(file) if record["part"] != "target"]
    return [
        {name: _value(name, written) for name, written in record.items() if written or name == "failure"}
        | {name: _value(name, record[name]) for name in _LISTS if name in record}
        for record in found
    ]


def text(value: object) -> str:
    """A figure as text for a cell."""
    if isinstance(value, list):
        return (" x " if all(isinstance(x, int) for x in value) else "; ").join(map(str, value))
    return str(value)


def _value(name: str, written: str) -> Any:
    """The inverse of `text`."""
    if name in _TEXTS:
        return written
    if name in _LISTS:
        parts = written.split(" x " if name == "grid" else "; ") if written else []
        return [int(part) for part in parts] if name == "grid" else parts
    if written in ("True", "False"):
        return written == "True"
    return float(written) if "." in written or "e" in written else int(written)


def _places() -> dict[tuple[str, ...], int]:
    """The order of the cases in the file: by part, then by architecture."""
    cases = (
        (part, case.op, case.shape, str(case.dtype).removeprefix("torch."), architecture)
        for part, cases in PARTS.items()
        for architecture in MULTIPROCESSORS
        for case in cases
    )
    return {case: place for place, case in enumerate(cases)}


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("part", "op", "shape", "dtype", "architecture"))


# ---- as printed ----

HEADING = ("op", "shape", "dtype")
COMPILED = {
    "architecture": "arch",
    "kernel": "kernel",
    "num_warps": "warps",
    "num_stages": "stages",
    "registers": "regs",
    "stack": "stack",
    "shared": "shared",
    "hgmma": "hgmma",
    "hmma": "hmma",
    "async_copies": "async",
    "loop_mma": "mma/loop",
    "loop_async_copies": "async/loop",
    "loop_instructions": "sass/loop",
    "instructions": "sass",
    "seconds": "cpu s",
    "hazards": "hazards",
    "failure": "failure",
}
COUNTED = {
    "launches": "launches",
    "bytes": "bytes",
    "floor_bytes": "floor",
    "bytes_ratio": "ratio",
    "flops": "flops",
    "yardstick_flops": "yardstick",
    "flops_ratio": "ratio",
    "failure": "failure",
}
HUGE = {
    "architecture": "arch",
    "kernel": "kernel",
    "grid": "grid",
    "overflows": "leave 32 bits",
    "failure": "failure",
}


def print_rows(rows: Sequence[Row]) -> None:
    """The figures, a table a part."""
    for title, part, columns in (
        ("Compiled ahead of time", "compile", COMPILED),
        ("Above 2^31 elements", "huge", HUGE),
        ("Counted in the interpreter, sm_90's configurations, one row of the batch", "traffic", COUNTED),
    ):
        heading = {name: name for name in HEADING} | columns
        body = [[text(row.get(name, "")) for name in heading] for row in rows if row["part"] == part]
        print(f"\n{title} (Triton {version('triton')})\n")
        print_table(list(heading.values()), body)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """The targets."""
    print("\nTargets\n")
    body = [
        [
            "met" if verdict.met else "MISSED",
            verdict.target.name,
            f"{'>=' if verdict.target.at_least else '<='} {verdict.target.limit:g}",
            f"{verdict.worst:.4g}",
            verdict.where,
        ]
        for verdict in verdicts
    ]
    print_table(["", "target", "limit", "worst", "where"], body)
