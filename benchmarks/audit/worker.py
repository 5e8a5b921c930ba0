"""One part of the audit in a process of its own, for `benchmarks.kernel_audit`: a line of JSON a case.

    python -m benchmarks.audit.worker compile|huge|traffic [--arch ...] [--op ...] [--shape ...] [--core]

Triton reads TRITON_INTERPRET when it decorates a kernel: `traffic` needs it set, the other two need it unset.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.audit.case import Case, floor_bytes, on_architecture
from benchmarks.audit.cases import CORE, PARTS

GRID_LIMITS = (2**31 - 1, 65535, 65535)
"""Programs along each axis that CUDA launches."""


def main() -> None:
    """Run one part over the chosen cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=AUDITS)
    parser.add_argument("--arch", nargs="+", default=["sm_90"])
    parser.add_argument("--op", nargs="*", default=[])
    parser.add_argument("--shape", nargs="*", default=[])
    parser.add_argument("--core", action="store_true")
    arguments = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (arguments.part == "traffic"):
        raise RuntimeError(f"{arguments.part}: TRITON_INTERPRET=1 is wanted by `traffic` and by nothing else")
    for architecture in arguments.arch:
        for case in PARTS[arguments.part]:
            if _is_chosen(case, arguments):
                heading = {"part": arguments.part, **_heading(case, architecture)}
                rows = _rows(arguments.part, case, architecture)
                print(json.dumps([{**heading, **row} for row in rows]), flush=True)


def _is_chosen(case: Case, arguments: argparse.Namespace) -> bool:
    return (
        (not arguments.op or case.op in arguments.op)
        and (not arguments.shape or case.shape in arguments.shape)
        and (not arguments.core or case.name in CORE[arguments.part])
    )


def _rows(part: str, case: Case, architecture: str) -> list[dict[str, Any]]:
    """The rows of a case; if it cannot be audited, one row that says why."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Triton prints all of a kernel that ptxas refuses
            return [{**row, "failure": ""} for row in AUDITS[part](case, architecture)]
    except Exception as error:  # whatever a launcher, a compiler or the interpreter raises is a result
        traceback.print_exc(limit=-2)
        return [{"failure": f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]}]


def _heading(case: Case, architecture: str) -> dict[str, Any]:
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "head_dim": case.head_dim,
        "architecture": architecture,
    }


def compile_case(case: Case, architecture: str) -> Iterator[dict[str, Any]]:
    """The figures of every kernel that the case launches, compiled."""
    from benchmarks.audit.compiled import compile_for
    from benchmarks.audit.launches import recorded

    with on_architecture(architecture, case.op), recorded(architecture) as compilations:
        case.call(torch.device("meta"), case.batch)
    for compilation in {compilation.key: compilation for compilation in compilations}.values():
        figures = dataclasses.asdict(compile_for(architecture, compilation))
        options = {name: compilation.options[name] for name in ("num_warps", "num_stages")}
        yield {"kernel": compilation.name, "grid": compilation.grid, **options, **figures}


def overflows_of_case(case: Case, architecture: str) -> Iterator[dict[str, Any]]:
    """Offsets that leave 32 bits and grids that CUDA does not launch, at a huge shape."""
    from benchmarks.audit.launches import recorded
    from benchmarks.audit.offsets import overflows, ttir_of

    with on_architecture(architecture, case.op), recorded(architecture) as compilations:
        case.call(torch.device("meta"), case.batch)
    for compilation in compilations:
        yield {
            "kernel": compilation.name,
            "grid": compilation.grid,
            "grid_fits": all(
                size <= limit for size, limit in zip(compilation.grid, GRID_LIMITS, strict=True)
            ),
            "overflows": overflows(
                ttir_of(architecture, compilation),
                compilation.arguments,
                compilation.grid,
                counters(compilation.arguments),
            ),
        }


def counters(arguments: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What kernels count, by their arguments: boundaries n, the tiles t of one, chunks and stretches."""
    boundaries = max((arguments.get(name, 0) for name in ("num_boundaries", "num_blocks", "N")), default=0)
    tokens, stretch = arguments.get("T", 0), max(1, arguments.get("stretch", 1))
    return {
        "n": (-1, boundaries),
        "t": (0, arguments.get("L", 0) + arguments.get("M", 0)),
        "num_chunks": (0, tokens // 16 + 1),  # no tile is shorter
        "i_stretch": (0, tokens // stretch),
    }


def count_case(case: Case, architecture: str) -> Iterator[dict[str, Any]]:
    """Bytes and flops of one row of the batch on as small a part of the GPU; a faulty access raises."""
    from benchmarks.audit.traffic import audit

    with on_architecture(architecture, case.op, fraction=1 / case.batch), audit() as counts:
        inputs, outputs = case.call(torch.device("cpu"), 1)
    yield {
        "launches": counts.launches,
        "programs": counts.programs,
        "bytes": counts.bytes,
        "floor_bytes": floor_bytes([*inputs, *outputs]),
        "flops": counts.flops,
        "yardstick_flops": case.flops,
    }


AUDITS = {"compile": compile_case, "huge": overflows_of_case, "traffic": count_case}

if __name__ == "__main__":
    main()
