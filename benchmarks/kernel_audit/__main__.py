"""Judge the Triton kernels without a GPU: their machine code, their memory traffic, and their targets.

    python -m benchmarks.kernel_audit [--part compile] [--arch sm_90] [--op pop_fwd] [--shape ...] [--csv ...]

Three parts: every launch of every case compiled ahead of time, the TTIR of launches of more than 2^31
elements, and bytes and flops counted in the interpreter with the configurations of sm_90. Prints figures and
targets; exits with 1 if a target is missed. The figures hold for one version of Triton, which the CSV names.
Each case's rows replace its earlier rows in the CSV at once, with the commit at which their part began.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors import floor_bytes
from benchmarks.kernel_audit.calls import MULTIPROCESSORS, Case, on_architecture
from benchmarks.kernel_audit.cases import CORE, OPS, PARTS
from benchmarks.kernel_audit.targets import Row, Verdict, judge, merge, text
from benchmarks.machine import ROOT, commit
from benchmarks.text import print_table
from retpop.ops.dispatch import interpreting

GRID_LIMITS = (2**31 - 1, 65535, 65535)
"""Programs along each axis that CUDA launches."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit; returns the exit status."""
    options = _parse(arguments)
    if options.json:
        for part in options.part:
            for found in _rows_of(part, options):
                print(json.dumps(found), flush=True)
        return 0
    rows: list[Row] = []
    for part in options.part:
        versions = {"commit": commit(), "triton": version("triton"), "torch": version("torch")}
        for found in _rows_of(part, options):
            rows += found
            if options.csv is not None:
                merge(options.csv, found, versions)
    verdicts = judge(rows)
    print_rows(rows)
    print_verdicts(verdicts)
    return int(not all(verdict.met for verdict in verdicts))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_audit", description=__doc__.splitlines()[0]
    )
    architectures = list(MULTIPROCESSORS)
    parser.add_argument("--arch", type=_names(architectures), default=architectures, metavar="A,B")
    parser.add_argument("--op", type=_names(OPS), default=list(OPS), metavar="A,B")
    parser.add_argument("--shape", action="append", default=[], help="only this shape; may be repeated")
    parser.add_argument("--part", type=_names(list(PARTS)), default=list(PARTS), metavar="A,B")
    parser.add_argument("--core", action="store_true", help="only the cases that `make test` runs")
    parser.add_argument("--csv", type=Path, help="merge the rows into this file, as they come")
    parser.add_argument("--json", action="store_true", help="print only the rows, a line of JSON a case")
    return parser.parse_args(arguments)


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
        return names

    return parse


def _rows_of(part: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of a part, case by case.

    Triton reads TRITON_INTERPRET when it decorates a kernel: `traffic` needs it, the other two parts must not
    have it. A part that needs the other value runs in a process of its own.
    """
    if (part == "traffic") == interpreting():
        # `huge` and `traffic` are audited for sm_90 alone.
        for architecture in options.arch if part == "compile" else ["sm_90"]:
            for case in PARTS[part]:
                if _is_chosen(case, part, options):
                    yield _rows_of_case(part, case, architecture)
        return
    environment = os.environ | {"TRITON_INTERPRET": "1" if part == "traffic" else "0"}
    command = [sys.executable, "-m", "benchmarks.kernel_audit", "--json", "--part", part]
    command += ["--arch", ",".join(options.arch), "--op", ",".join(options.op)]
    command += ["--core"] if options.core else []
    command += [f"--shape={shape}" for shape in options.shape]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            yield json.loads(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _is_chosen(case: Case, part: str, options: argparse.Namespace) -> bool:
    return (
        case.op in options.op
        and (not options.shape or case.shape in options.shape)
        and (not options.core or case.name in CORE[part])
    )


def _rows_of_case(part: str, case: Case, architecture: str) -> list[Row]:
    """The rows of a case; if it cannot be audited, one row that says why."""
    heading = {
        **{"part": part, "op": case.op, "shape": case.shape},
        **{"dtype": str(case.dtype).removeprefix("torch."), "head_dim": case.head_dim},
        "architecture": architecture,
    }
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Triton prints all of a kernel that ptxas refuses
            return [{**heading, **row, "failure": ""} for row in AUDITS[part](case, architecture)]
    except Exception as error:  # any error of a launcher, the compiler or the interpreter is a result
        traceback.print_exc(limit=-2)
        return [{**heading, "failure": f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]}]


# ---- the audits ----


def compile_case(case: Case, architecture: str) -> Iterator[Row]:
    """The figures of every kernel that the case launches, compiled."""
    from benchmarks.kernel_audit.compiled import compile_for, recorded

    with on_architecture(architecture, case.op), recorded(architecture) as compilations:
        case.call(torch.device("meta"), case.batch)
    for compilation in {compilation.key: compilation for compilation in compilations}.values():
        figures = dataclasses.asdict(compile_for(architecture, compilation))
        options = {name: compilation.options[name] for name in ("num_warps", "num_stages")}
        yield {"kernel": compilation.name, "grid": list(compilation.grid), **options, **figures}


def overflows_of_case(case: Case, architecture: str) -> Iterator[Row]:
    """Offsets that leave 32 bits and grids that CUDA does not launch, at a huge shape."""
    from benchmarks.kernel_audit.compiled import recorded, ttir_of
    from benchmarks.kernel_audit.triton_ir import overflows

    with on_architecture(architecture, case.op), recorded(architecture) as compilations:
        case.call(torch.device("meta"), case.batch)
    for compilation in compilations:
        arguments, grid = compilation.arguments, compilation.grid
        yield {
            "kernel": compilation.name,
            "grid": list(grid),
            "grid_fits": all(size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)),
            "overflows": overflows(ttir_of(architecture, compilation), arguments, grid, counters(arguments)),
        }


def counters(arguments: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The ranges of kernels' counters (boundaries n, tiles t, chunks, stretches) under these arguments."""
    boundaries = max((arguments.get(name, 0) for name in ("num_boundaries", "num_blocks", "N")), default=0)
    tokens, stretch = arguments.get("T", 0), max(1, arguments.get("stretch", 1))
    return {
        "n": (-1, boundaries),
        "t": (0, arguments.get("L", 0) + arguments.get("M", 0)),
        "num_chunks": (0, tokens // 16 + 1),  # no tile is shorter
        "i_stretch": (0, tokens // stretch),
    }


def count_case(case: Case, architecture: str) -> Iterator[Row]:
    """Bytes and flops of one row of the batch on as small a part of the GPU; a faulty access raises."""
    from benchmarks.kernel_audit.traffic import audit

    with on_architecture(architecture, case.op, fraction=1 / case.batch), audit() as counts:
        inputs, outputs = case.call(torch.device("cpu"), 1)
    floor = floor_bytes([*inputs, *outputs])
    yield {
        **{"launches": counts.launches, "programs": counts.programs},
        **{"bytes": counts.bytes, "floor_bytes": floor, "flops": counts.flops, "yardstick_flops": case.flops},
        "bytes_ratio": round(counts.bytes / floor, 4),
        "flops_ratio": round(counts.flops / case.flops, 4) if case.flops else "",
    }


AUDITS = {"compile": compile_case, "huge": overflows_of_case, "traffic": count_case}

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


if __name__ == "__main__":
    sys.exit(main())
