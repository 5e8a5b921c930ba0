"""Tests and timings on a GPU, each part in a process of its own with a time limit of its own.

Run by benchmarks/gpu_report.sh, which describes its options and its output.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch

from benchmarks import __main__ as command_line
from benchmarks import runner
from benchmarks.machine import ROOT, commit, environment_with, origin, slug, version_of
from benchmarks.measurements import FAILED, IN_GRAPH, RESULTS, RIGHT, WRONG, Measurement, append, read
from benchmarks.text import duration, print_table
from benchmarks.timing import Effort


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the report.

    Attributes:
        limit: its time limit in seconds.
        ops, backends: of `python -m benchmarks run`; no ops for the tests.
        shapes, modes, dtypes: of the same; empty for all.
    """

    limit: float
    ops: str = ""
    backends: str = ""
    shapes: str = ""
    modes: str = ""
    dtypes: str = ""

    def command(self, csv: Path, *, dry_run: bool) -> list[str]:
        """Measures it; its rows are in the file as soon as they are measured."""
        words = [sys.executable, "-m", "benchmarks", "run", "--op", self.ops, "--csv", str(csv)]
        words += ["--backend", self.backends] if self.backends else []
        words += ["--mode", self.modes] if self.modes else []
        if dry_run:
            return [*words, "--dry-run", "--dtype", "fp32"]
        words += ["--shape", self.shapes] if self.shapes else []
        words += ["--dtype", self.dtypes] if self.dtypes else []
        return [*words, "--device", "cuda"]

    def selection(self) -> runner.Selection:
        """What it measures on a GPU."""
        options = command_line.parser().parse_args(self.command(Path(), dry_run=False)[3:])
        return runner.Selection(**command_line.selected(options, on_gpu=True, tiny=False))

    @property
    def projected(self) -> float:
        """The seconds that it is expected to take on a GPU, its kernels compiled: a count, never measured."""
        if not self.ops or set(self.ops.split(",")) & set(runner.DIRECT):
            return self.limit
        effort = Effort()
        runs = sum(len(group.contenders) * len(group.passes) for group in self.selection().groups())
        each = PER_RUN + 2 * effort.rounds * effort.sample_seconds  # eager, and in a graph
        return min(self.limit, PER_PART + runs * each)


PER_PART, PER_RUN = 12.0, 1.0
"""Seconds to start a part's process, and to check and warm up a pass of a contender: guesses, on the safe
side."""

COMPILE, TESTS = "compile", "tests"

_LONG = "paper_train,paper_imagine,long_64,long_128,token_64,token_128"
_DECODER = {
    "ops": "decoder,imagination,step",
    "shapes": "paper_train,rem_64,paper_token",
    "modes": "pop,step,recurrent",
    "dtypes": "bf16",
}

PARTS = {
    "floors": Part(limit=30, ops="floors"),
    COMPILE: Part(limit=60),
    TESTS: Part(limit=150),
    "pop": Part(limit=60, ops="pop", backends="triton", shapes=_LONG),
    "retention": Part(limit=60, ops="retention", backends="triton", shapes=_LONG),
    "token-wise": Part(limit=40, ops="token_wise", backends="triton", dtypes="bf16"),
    "peers": Part(limit=60, ops="pop,retention", backends="torch,fla", shapes=_LONG, dtypes="bf16"),
    "rem_atari": Part(limit=90, ops="rem_atari"),
    "decoder": Part(limit=50, backends="triton", **_DECODER),
    "compiled decoder": Part(limit=100, backends="triton-compile", **_DECODER),
}
"""The parts in the order in which they run, the most telling first, after what they need. Where time runs
out, parts that would not fit are skipped, and later ones that fit are not."""

WHOLE = 455
"""Time limit in seconds for all parts together."""

REHEARSED = 4
"""Factor on time limits for a rehearsal's interpreted kernels."""

GRACE = 20
"""Seconds for a stopped part to write its results so far, as pytest does."""

LOG_LINES = 25
"""Lines of a failed part's output that are shown."""

MOST_WORKERS = 12
"""Processes of the tests, where pytest-xdist is there: compiling the kernels takes most of the time."""

Rows = list[Measurement]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report. Returns 0; 1 if the tests did not pass; 2 if they did but another part failed."""
    options = _parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_report.sh: torch sees no GPU here; --dry-run walks through it on the CPU")
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        environment = _environment(Path(folder), dry_run=options.dry_run)
        device = "rehearsal" if options.dry_run else torch.cuda.get_device_name()
        path = options.out / f"gpu_{slug(device)}_{slug(commit())}.csv"
        path.unlink(missing_ok=True)
        found: dict[str, Rows] = {}
        for part in options.parts:
            left = WHOLE * (REHEARSED if options.dry_run else 1) - (time.monotonic() - started)
            command = command_of(part, options.parts, path, Path(folder), dry_run=options.dry_run)
            found[part] = _run_part(part, command, left, path, Path(folder), environment)
    if options.dry_run:
        print_projection(options.parts)
    print_report(found)
    versions = ", ".join(
        f"{name} {version_of(name)}" for name in ("torch", "triton", "flash-linear-attention")
    )
    print(f"{sum(map(len, found.values()))} rows in {path}; {time.monotonic() - started:.0f} s; {versions}")
    failed = {part for part, rows in found.items() if any(map(_failed, rows))}
    return 1 if TESTS in failed else 2 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_report.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny sizes")
    parser.add_argument(
        "--parts", type=_part_names, default=list(PARTS), metavar="A,B", help=", ".join(PARTS)
    )
    parser.add_argument("--out", type=Path, help="folder of the CSV; else $OUT, else benchmarks/results")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(os.environ.get("OUT") or RESULTS)
    return options


def _part_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    return names


def _environment(folder: Path, *, dry_run: bool) -> dict[str, str]:
    # Triton and tests/conftest.py look at the first, tests/gpu at the second.
    extra = {"TRITON_INTERPRET": "1" if dry_run else "0"}
    extra |= {"RETPOP_GPU_TESTS": "interpreter"} if dry_run else {}
    packages = folder / "packages"
    packages.mkdir()
    return environment_with(ROOT, packages) | extra


def command_of(part: str, parts: Sequence[str], csv: Path, folder: Path, *, dry_run: bool) -> list[str]:
    """The command that runs a part, for a report of these parts."""
    if part == TESTS:
        return pytest_command(junit_of(folder), dry_run=dry_run)
    if part != COMPILE:
        return PARTS[part].command(csv, dry_run=dry_run)
    words = [sys.executable, "-m", "benchmarks.compile_ahead", "--csv", str(csv)]
    return [*words, *(["--dry-run"] if dry_run else []), *(name for name in parts if name != COMPILE)]


def junit_of(folder: Path) -> Path:
    """Where the tests' report goes."""
    return folder / f"{TESTS}.xml"


def _run_part(
    part: str, command: Sequence[str], left: float, csv: Path, folder: Path, environment: Mapping[str, str]
) -> Rows:
    """Run a part; its rows go to ``csv`` as they come, so that a report that is killed leaves them.

    Args:
        part: its name.
        command: runs it.
        left: seconds left for the whole report; a part that is expected to take longer is skipped.
        csv, folder: where its rows go, and its output.
        environment: its variables; Triton's interpreter is on in a rehearsal.
    """
    dry_run, is_tests = environment["TRITON_INTERPRET"] == "1", part == TESTS
    slower = REHEARSED if dry_run else 1
    if left < PARTS[part].projected:
        wanted = f"it is expected to take {PARTS[part].projected:.0f} s, and {max(0.0, left):.0f} s are left"
        print(f"{part}: skipped, {wanted}", flush=True)
        late = [_failure(part, f"skipped: {wanted}")]
        append(csv, late)
        return late
    limit = min(PARTS[part].limit * slower, left)
    junit, log = junit_of(folder), folder / f"{slug(part)}.log"
    before = read(csv)
    if part == COMPILE:
        environment = {**environment, "TRITON_INTERPRET": "0", "RETPOP_GPU_TESTS": ""}
    ended = run_limited(command, limit, log, environment)
    measured = [] if is_tests else [row for row in read(csv) if row not in before]
    found = rows_of_tests(junit) if is_tests else []
    if ended.status is None:
        found.append(_failure(part, f"stopped after {limit:.0f} s"))
    elif ended.status and not any(map(_failed, measured + found)):
        found.append(_failure(part, f"ended with status {ended.status}"))
    append(csv, found)
    found = measured + found
    failures = sum(map(_failed, found))
    print(f"{part}: {len(found)} rows, {failures} failed, {ended.seconds:.0f} s", flush=True)
    if failures:
        print("\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]), flush=True)
    return found


def _failure(part: str, note: str) -> Measurement:
    return Measurement(**origin(_device()), op=part, mode=part, verdict=FAILED, note=note)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _failed(row: Measurement) -> bool:
    """Whether it counts as a failure: only our own contenders must be right."""
    return row.verdict == FAILED or (row.verdict == WRONG and row.is_ours)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a part's process ended.

    Attributes:
        status: its exit status; None: it was stopped at its limit.
        seconds: its duration.
    """

    status: int | None
    seconds: float


def _heed_interrupts() -> None:
    """Let a new process react to this signal, which background jobs of a shell ignore."""
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
            # Also end what the process has left running; usually nothing is left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status=status, seconds=time.monotonic() - started)


def pytest_command(junit: Path, *, dry_run: bool) -> list[str]:
    """Runs tests/gpu, from any folder, and leaves a JUnit file."""
    words = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    words += ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    # The project's pythonpath would put the checkout first, where retpop has no kernels.
    words += ["-o", "pythonpath=", "-o", "junit_duration_report=call"]
    if not dry_run and find_spec("xdist") is not None:
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
        words += ["-n", str(workers), "--dist", "loadgroup"]
    return [*words, str(ROOT / "tests" / "gpu")]


def rows_of_tests(junit: Path) -> Rows:
    """A row a test, with its errors against float64; no test that ran is a failure too."""
    if not junit.exists():
        return [_failure(TESTS, "pytest left no report")]
    found = [_test_row(case) for case in ElementTree.parse(junit).iter("testcase")]
    if all(row.note.startswith("skipped") for row in found):
        found.append(_failure(TESTS, "no test ran"))
    return found


def _test_row(case: ElementTree.Element) -> Measurement:
    problem = next((x for x in case if x.tag in ("failure", "error")), None)
    skipped = case.find("skipped")
    note = "; ".join(f"{p.get('name')} {p.get('value')}" for p in case.iter("property"))
    if problem is not None:
        note = (problem.get("message") or problem.tag).splitlines()[0]
    elif skipped is not None:
        note = f"skipped: {skipped.get('message')}"
    return Measurement(
        **origin(_device()),
        op=TESTS,
        mode=case.get("name", ""),
        samples=(float(case.get("time", "nan")),),
        verdict=RIGHT if problem is None else FAILED,
        note=note,
    )


def print_projection(parts: Sequence[str]) -> None:
    """Print the seconds that each part is expected to take on a GPU."""
    print("\nExpected on a GPU, by count:", end=" ")
    times = {part: PARTS[part].projected for part in parts}
    print(", ".join(f"{part} {seconds:.0f} s" for part, seconds in times.items()), end="")
    print(f"; {sum(times.values()):.0f} s of {WHOLE}")


def print_report(found: Mapping[str, Rows]) -> None:
    """Print failures, the timings against their floors, and the tests in one line."""
    rows = [row for rows in found.values() for row in rows]
    for row in filter(_failed, rows):
        words = (row.op, row.mode, row.shape, row.dtype, row.backend, row.direction)
        print(f"FAILED {' '.join(filter(None, words))}: {row.note}")
    print()
    heading = ["what", "shape", "dtype", "by", "pass", "eager", "in a graph", "of floor", ""]
    print_table(heading, _lines(row for row in rows if row.op != TESTS and not _failed(row)))
    tests = found.get(TESTS, [])
    skipped, failed = sum(row.note.startswith("skipped") for row in tests), sum(map(_failed, tests))
    if tests:
        print()
        for line in worst_errors(tests):
            print(line)
        print(f"tests: {len(tests) - skipped - failed} passed, {failed} failed, {skipped} skipped")


def worst_errors(tests: Rows) -> list[str]:
    """For each dtype the error that comes nearest to what is allowed, of the tests that record errors."""
    worst: dict[str, tuple[float, str]] = {}
    for row in tests:
        dtype = re.search(r"torch\.(\w+)", row.mode)
        for what, error, limit in re.findall(r"([^;]+?) (\S+) of ([^\s;]+)(?:;|$)", row.note):
            share, words = float(error) / float(limit), f"{what.strip()} of {row.mode}"
            name = dtype[1] if dtype else "other dtypes"
            worst[name] = max(worst.get(name, (0.0, "")), (share, words))
    return [
        f"worst error, {name}: {share:.0%} of the bound, {words}" for name, (share, words) in worst.items()
    ]


def _lines(rows: Iterable[Measurement]) -> list[list[str]]:
    """A line for a call and its graph; the graph's share of the floor excludes Python's time."""
    pairs: dict[object, dict[bool, Measurement]] = {}
    for row in rows:
        plain = replace(row, backend=row.backend.removesuffix(IN_GRAPH))
        pairs.setdefault(plain.key, {})[row.backend.endswith(IN_GRAPH)] = row
    lines = []
    for pair in pairs.values():
        row = next(iter(pair.values()))
        share = pair.get(True, row).fraction
        times = [duration(pair[x].seconds) if x in pair and pair[x].samples else "" for x in (False, True)]
        who, note = row.backend.removesuffix(IN_GRAPH), "" if row.flops or row.floor_bytes else row.note
        lines.append(
            [
                f"{row.op}, {row.mode}",
                f"{row.shape} {row.sizes}".strip(),
                row.dtype,
                who,
                row.direction,
                *times,
                "" if share is None else f"{share:.0%}",
                note if row.verdict == RIGHT else f"{row.verdict}: {row.note}",
            ]
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
