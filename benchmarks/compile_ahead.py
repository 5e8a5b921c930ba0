"""Compile ahead, in parallel, what parts of the GPU report launch, so that it lies in Triton's cache.

    python -m benchmarks.compile_ahead --csv rows.csv tests pop retention

Each operation of a part runs once on tensors without memory, and its launches are recorded. Then a pool of
processes compiles each kernel once. Triton finds a kernel by its source, what it is specialised for, its
options and the target. All are those of the launch itself, so the part that follows finds it on the disk.
The GPU is only asked for its name. Prints, and adds to the CSV, a row a part.

--dry-run takes an H200 for the GPU, records and does not compile. Left out are decoders and the agent, which
tensors without memory cannot run under autocast: most of their kernels are those of the operations.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.gpu_report import PARTS, TESTS
from benchmarks.kernel_audit.compiled import TARGETS, Compilation, recorded
from benchmarks.machine import ROOT, origin
from benchmarks.measurements import FAILED, RIGHT, Measurement, append
from benchmarks.text import first_line
from benchmarks.work import BOTH, FORWARD
from retpop.kernels import launch
from retpop.kernels.launch import Target, target_of
from retpop.ops.triton_backend import custom, known

INTERPRETED = target_of(torch.device("cpu"))

META = torch.device("meta")

BACKEND = "triton"

OPERATIONS = ("pop", "retention", "token_wise")
"""The groups that run without memory."""

Call = Callable[[], object]

_TO_COMPILE: list[Compilation] = []
"""What the processes of a pool compile. They are forked: a kernel cannot be sent to another process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; returns 1 if a kernel does not compile or a call fails, else 0."""
    options = _parse(arguments)
    target = INTERPRETED if options.dry_run else target_of_gpu()
    done: set[str] = set()
    rows = []
    for part in options.parts:
        row = _row(part, done, target, options)
        print(f"{part}: {row.note}", flush=True)
        if options.csv is not None:
            append(options.csv, [row])
        rows.append(row)
    return int(any(row.verdict == FAILED for row in rows))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_ahead", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of the pool")
    parser.add_argument("--dry-run", action="store_true", help="record for an H200, and do not compile")
    parser.add_argument("--csv", type=Path, help="where to add the rows")
    return parser.parse_args(arguments)


def target_of_gpu() -> Target:
    """The GPU's; a process that has asked for it could not fork others, so another one asks."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_ask)


def _ask() -> Target:
    target = target_of(torch.device("cuda"))
    if target.architecture not in TARGETS:
        raise ValueError(f"the GPU is {target.architecture}; kernels are compiled for {', '.join(TARGETS)}")
    return target


def _row(part: str, done: set[str], target: Target, options: argparse.Namespace) -> Measurement:
    """Compile what a part launches, but for the keys in ``done``, which it adds to."""
    started = time.monotonic()
    found, failures = kernels_of(part, target)
    new = {key: kernel for key, kernel in found.items() if key not in done}
    done |= new.keys()
    note = f"{len(new)} kernels"
    if not options.dry_run:
        outcomes = compile_in_parallel(list(new.values()), options.workers)
        failures += [outcome for outcome in outcomes if isinstance(outcome, str)]
        work = sum(outcome for outcome in outcomes if not isinstance(outcome, str))
        note += f", {work:.0f} s of compiling by {options.workers} processes"
    return Measurement(
        **origin(torch.device("cpu")),
        op="compile",
        mode=part,
        samples=(time.monotonic() - started,),
        verdict=FAILED if failures else RIGHT,
        note=failures[0] if failures else note,
    )


def compile_in_parallel(kernels: Sequence[Compilation], workers: int) -> list[float | str]:
    """Compile each; returns the seconds that each took, or why it failed."""
    if not kernels:
        return []
    _TO_COMPILE[:] = kernels
    with multiprocessing.get_context("fork").Pool(min(workers, len(kernels))) as pool:
        return pool.map(_compile, range(len(kernels)), chunksize=1)


def _compile(number: int) -> float | str:
    kernel = _TO_COMPILE[number]
    started = time.monotonic()
    try:
        triton.compile(kernel.source, target=TARGETS[kernel.architecture], options=kernel.options)
    except Exception as error:  # any error of the compiler is a result
        return f"{kernel.name}: {first_line(error)}"
    return time.monotonic() - started


def kernels_of(part: str, target: Target) -> tuple[dict[str, Compilation], list[str]]:
    """The kernels that a part launches, by Triton's key; and why calls failed."""
    calls = calls_of_tests() if part == TESTS else calls_of_groups(part)
    failures = []
    with recording(target) as launches:
        for call in calls:
            try:
                call()
            except Exception as error:  # the others are compiled all the same
                failures.append(f"{part}: {first_line(error)}")
    return {found.key: found for found in launches}, failures


@contextmanager
def recording(target: Target) -> Iterator[list[Compilation]]:
    """Let tensors without memory be on a GPU, whose launches are recorded."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "_target_of", return_value=target))
        for module in (custom, known):
            stack.enter_context(mock.patch.object(module, "run_kernels", return_value=True))
        yield stack.enter_context(recorded(target.architecture))


def calls_of_groups(part: str) -> Iterator[Call]:
    """A call for each pass of each group of a part by the kernels."""
    for group in PARTS[part].selection().groups() if PARTS[part].ops else ():
        passes = [direction for direction in (FORWARD, BOTH) if direction in group.passes]
        if group.op in OPERATIONS and BACKEND in group.contenders and passes:
            make = group.contenders[BACKEND].make
            yield partial(_run_passes, make, group.problem, passes)


def _run_passes(make: Callable[..., Any], problem: Callable[..., Any], passes: Sequence[str]) -> None:
    for found in make(problem(META)).passes(passes).values():
        found.run()


def calls_of_tests() -> Iterator[Call]:
    """Retention and POP, forward and backward, at the sizes and in the dtypes of tests/gpu."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("support", "gpu")]
    import gpu_cases
    import test_numbers
    from retention_cases import PopCase, RetentionCase

    for dtype, (B, T, H, Dk, Dv) in product(gpu_cases.DTYPES, test_numbers.RETENTION.values()):
        yield partial(_run_case, RetentionCase(**_tokens(B, T, H, Dk, Dv, dtype)))
    for dtype, made in product(gpu_cases.DTYPES, test_numbers.POP.values()):
        B, N, L, P, M, H, Dk, Dv = made["sizes"]
        tokens = _tokens(B, N * L, H, Dk, Dv, dtype)
        twins = {f"{n}_pred": _empty(B, P, M, H, Dv if n == "v" else Dk, dtype=dtype) for n in "qkv"}
        if not made.get("with_state", True):
            tokens["state"] = None
        reset = _empty(B, N, dtype=torch.bool) if made.get("with_reset") else None
        blocks = {"block_size": L, "offset": made.get("offset", 0), "reset": reset}
        yield partial(_run_case, PopCase(**tokens, **twins, **blocks))


def _tokens(B: int, T: int, H: int, Dk: int, Dv: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    tokens = {name: _empty(B, T, H, Dv if name == "v" else Dk, dtype=dtype) for name in "qkv"}
    return {**tokens, "log_decay": _empty(H), "state": _empty(B, H, Dk, Dv)}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _run_case(case: Any) -> None:
    leaves = case.for_gradients()
    results = leaves.run(backend=BACKEND)
    torch.autograd.grad(results, leaves.leaves(), [torch.empty_like(x) for x in results], allow_unused=True)


if __name__ == "__main__":
    sys.exit(main())
