"""Tests and timings on a GPU, each part in a process of its own with a time limit of its own.

Run by benchmarks/gpu_report.sh, which says what it takes and what it leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu import floors, suite
from benchmarks.gpu.rows import Row, read_rows
from benchmarks.kernel_audit import commit, print_table

ROOT = Path(__file__).parents[2]

LIMITS = {
    "floors": 40,
    "tests": 210,
    "pop": 60,
    "retention": 60,
    "token-wise": 40,
    "decoder": 50,
    "rem_atari": 90,
    "compiled decoder": 100,
    "peers": 60,
}
"""Seconds that each part may take, in the order in which they run: what is missed least comes last."""

WHOLE = 455
"""Seconds that all parts together may take."""

GRACE = 20
"""Seconds in which a part that is stopped may write down what it has; pytest does, for the tests so far."""

LOG_LINES = 25
"""Lines of a failed part's output that are shown."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a part's process ended.

    Attributes:
        status: its exit status; None: it was stopped at its limit.
        seconds: that it took.
    """

    status: int | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report. Returns 0; 1 if the tests did not pass; 2 if they did but another part failed."""
    options = _parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_report.sh: torch sees no GPU here; --dry-run walks through it on the CPU")
    work = Path(os.environ["RETPOP_REPORT_FOLDER"])
    started = time.monotonic()
    found: list[Row] = []
    for part in options.parts:
        left = WHOLE - (time.monotonic() - started)
        found += _run_part(part, min(LIMITS[part], left), work, dry_run=options.dry_run)
    path = options.out / f"gpu_{_slug(_device_name(options.dry_run))}_{_slug(_commit())}.csv"
    write_csv(path, found, options.dry_run)
    print_report(found)
    print(f"\n{len(found)} rows in {path}; {time.monotonic() - started:.0f} s")
    failed = {row.part for row in found if row.failed}
    return 1 if suite.PART in failed else 2 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_report.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny sizes")
    parser.add_argument(
        "--parts", type=_part_names, default=list(LIMITS), metavar="A,B", help=f"{list(LIMITS)}"
    )
    parser.add_argument("--out", type=Path, help="folder of the CSV; else $OUT, else benchmarks/results")
    options = parser.parse_args(arguments)
    if options.out is None:
        # A rehearsal's times are no results.
        default = os.environ["RETPOP_REPORT_FOLDER"] if options.dry_run else ROOT / "benchmarks" / "results"
        options.out = Path(os.environ.get("OUT") or default)
    return options


def _part_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(LIMITS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(LIMITS)}")
    return names


def _run_part(part: str, limit: float, work: Path, *, dry_run: bool) -> list[Row]:
    if limit <= 0:
        print(f"{part}: not started, no time is left", flush=True)
        return [Row(part=part, what=part, note="not started: no time was left", failed=True)]
    slug = _slug(part)
    path, junit, log = (work / f"{slug}{suffix}" for suffix in (".jsonl", ".xml", ".log"))
    command = [sys.executable, "-m", "benchmarks.gpu.worker", part, "--rows", str(path)]
    command += ["--dry-run"] if dry_run else []
    if part == suite.PART:
        command = suite.command(ROOT, junit, dry_run=dry_run)
    ended = run_limited(command, limit, log, _environment(dry_run))
    found = suite.rows(junit) if part == suite.PART else read_rows(path)
    if ended.status is None:
        found.append(Row(part=part, what=part, note=f"stopped after {limit:.0f} s", failed=True))
    elif ended.status and not any(row.failed for row in found):
        found.append(Row(part=part, what=part, note=f"ended with status {ended.status}", failed=True))
    failures = sum(row.failed for row in found)
    print(f"{part}: {len(found)} rows, {failures} failed, {ended.seconds:.0f} s", flush=True)
    if failures:
        print("\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]), flush=True)
    return found


def _environment(dry_run: bool) -> dict[str, str]:
    # Triton and tests/conftest.py look at the first, tests/gpu at the second.
    extra = {"TRITON_INTERPRET": "1" if dry_run else "0"}
    extra |= {"RETPOP_GPU_TESTS": "interpreter"} if dry_run else {}
    return {**os.environ, **extra}


def _heed_interrupts() -> None:
    """In a new process: do not inherit that a shell's background job ignores this signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_limited(command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command and all it starts, its output in ``log``, for at most ``limit`` seconds and `GRACE`."""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        finally:
            # Also what the process has left running; at most nothing is there any more.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status=status, seconds=time.monotonic() - started)


def print_report(found: Sequence[Row]) -> None:
    """Failures, the timings against their floors, and the tests in one line; short, for it is read last."""
    ceilings = floors.Ceilings(list(found))
    for row in found:
        if row.failed:
            print(f"FAILED {row.part}: {row.what} {row.shape} {row.dtype} {row.note}".rstrip())
    print()
    print_table(
        ["what", "shape", "dtype", "way", "eager", "in a graph", "of floor", ""],
        [
            _line(rows, ceilings)
            for rows in _grouped([row for row in found if row.part != suite.PART and not row.failed])
        ],
    )
    tests = [row for row in found if row.part == suite.PART]
    skipped = sum(row.note.startswith("skipped") for row in tests)
    failed = sum(row.failed for row in tests)
    if tests:
        print(f"\ntests: {len(tests) - skipped - failed} passed, {failed} failed, {skipped} skipped")


def _grouped(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows by mode, those of the same work together."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.part, row.what, row.shape, row.dtype, row.way), {})[row.mode] = row
    return list(groups.values())


def _line(rows: Mapping[str, Row], ceilings: floors.Ceilings) -> list[str]:
    """The share is that of the graph: it is the kernels', and not Python's."""
    eager = next(iter(rows.values()))
    graph = rows.get("graph")
    times = [_duration(eager.seconds), "" if graph is None else _duration(graph.seconds)]
    return [
        eager.what,
        eager.shape,
        eager.dtype,
        eager.way,
        *times,
        _share(graph or eager, ceilings),
        eager.note,
    ]


def _share(row: Row, ceilings: floors.Ceilings) -> str:
    if row.part == floors.PART and row.seconds:
        rate = 1e-12 * (row.floor_bytes or row.floor_flops) / row.seconds
        return f"{rate:.3g} TB/s" if row.floor_bytes else f"{rate:.3g} TFLOP/s"
    share = ceilings.fraction(row)
    return "" if share is None else f"{share:.0%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("h", 3600.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"


def write_csv(path: Path, found: Sequence[Row], dry_run: bool) -> None:
    """All rows, each with the GPU, the versions and the commit that it holds for."""
    key = {"gpu": _device_name(dry_run), "commit": _commit()}
    key |= {name: _version(name) for name in ("torch", "triton")}
    ceilings = floors.Ceilings(list(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        names = [*key, *Row.__dataclass_fields__, "of_floor"]
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        for row in found:
            share = ceilings.fraction(row)
            writer.writerow(key | asdict(row) | {"of_floor": "" if share is None else f"{share:.4f}"})


def _device_name(dry_run: bool) -> str:
    if dry_run:
        return "rehearsal"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    """RETPOP_COMMIT, for a copy without git, or else the checkout's own."""
    return os.environ.get("RETPOP_COMMIT") or commit()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
