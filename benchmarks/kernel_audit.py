"""Judge the Triton kernels without a GPU: what they compile to, what they move, which targets they meet.

    python -m benchmarks.kernel_audit [--part compile] [--arch sm_90] [--op pop_fwd] [--shape ...] [--csv ...]

Three parts, each in a process of its own (`benchmarks.audit.worker`): every launch of every case compiled
ahead of time, the TTIR of launches of more than 2^31 elements, and bytes and flops counted in the
interpreter with the configurations of sm_90. Prints figures and targets; exits with 1 if a target is missed.
The figures hold for the compiler of one version of Triton, which the CSV names. Each case's rows go into the
CSV as they come, in place of that case's rows of before, with the commit that their part began on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.audit.cases import OPS, PARTS
from benchmarks.audit.table import merge, text
from benchmarks.audit.targets import Row, Verdict, judge
from benchmarks.machine import ROOT, commit

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit; returns the exit status."""
    options = _parse(arguments)
    rows: list[Row] = []
    for part in options.part:
        versions = {"commit": commit(), "triton": version("triton"), "torch": version("torch")}
        for found in _run(part, options):
            rows += found
            if options.csv is not None:
                merge(options.csv, found, versions)
    verdicts = judge(rows)
    _print_all(rows, verdicts)
    return int(not all(verdict.met for verdict in verdicts))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_audit", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", type=_names(ARCHITECTURES), default=list(ARCHITECTURES), metavar="A,B")
    parser.add_argument("--op", type=_names(OPS), default=list(OPS), metavar="A,B")
    parser.add_argument("--shape", action="append", default=[], help="only this shape; may be repeated")
    parser.add_argument("--part", type=_names(list(PARTS)), default=list(PARTS), metavar="A,B")
    parser.add_argument("--core", action="store_true", help="only the cases that `make test` runs")
    parser.add_argument("--csv", type=Path, help="merge the rows into this file, as they come")
    return parser.parse_args(arguments)


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
        return names

    return parse


def _run(part: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of a part, case by case, from a process of its own; huge and traffic are sm_90's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if part == "traffic":
        environment["TRITON_INTERPRET"] = "1"
    architectures = options.arch if part == "compile" else ["sm_90"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.audit.worker",
        part,
        "--arch",
        *architectures,
        "--op",
        *options.op,
    ]
    command += ["--core"] if options.core else []
    command += ["--shape", *options.shape] if options.shape else []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        for line in worker.stdout or ():
            yield [_with_ratios(row) for row in json.loads(line)]
    if worker.returncode:
        raise subprocess.CalledProcessError(worker.returncode, command)


def _with_ratios(row: Row) -> Row:
    if row["part"] == "traffic" and not row["failure"]:
        row["bytes_ratio"] = round(row["bytes"] / row["floor_bytes"], 4)
        row["flops_ratio"] = round(row["flops"] / row["yardstick_flops"], 4) if row["yardstick_flops"] else ""
    return row


def _print_all(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    for title, part, columns in (
        ("Compiled ahead of time", "compile", COMPILED),
        ("Above 2^31 elements", "huge", HUGE),
        ("Counted in the interpreter, sm_90's configurations, one row of the batch", "traffic", COUNTED),
    ):
        heading = {name: name for name in HEADING} | columns
        body = [[text(row.get(name, "")) for name in heading] for row in rows if row["part"] == part]
        print(f"\n{title} (Triton {version('triton')})\n")
        print_table(list(heading.values()), body)
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


def print_table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Columns under each other, two spaces apart."""
    lines = [heading, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
