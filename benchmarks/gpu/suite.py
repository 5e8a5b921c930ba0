"""The tests on a GPU as a part of the report: pytest in a process of its own, its JUnit file as rows."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.rows import Row

PART = "tests"

MOST_WORKERS = 12
"""Processes, where pytest-xdist is there: compiling the kernels takes most of the time."""


def command(root: Path, junit: Path, *, dry_run: bool) -> list[str]:
    """Run tests/gpu, from any folder."""
    words = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), f"--rootdir={root}"]
    words += ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    # The project's pythonpath would put the checkout first, where retpop has no kernels.
    words += ["-o", "pythonpath=", "-o", "junit_duration_report=call"]
    if not dry_run and find_spec("xdist") is not None:
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
        words += ["-n", str(workers), "--dist", "loadgroup"]
    return [*words, str(root / "tests" / "gpu")]


def rows(junit: Path) -> list[Row]:
    """A row a test, with its errors against float64; no test that ran is a failure too."""
    if not junit.exists():
        return [Row(part=PART, what="pytest", note="it left no report", failed=True)]
    found = [_row(case) for case in ElementTree.parse(junit).iter("testcase")]
    if not any(not row.note.startswith("skipped") for row in found):
        found.append(Row(part=PART, what="pytest", note="no test ran", failed=True))
    return found


def _row(case: ElementTree.Element) -> Row:
    problem = next((x for x in case if x.tag in ("failure", "error")), None)
    skipped = case.find("skipped")
    errors = [f"{p.get('name')} {p.get('value')}" for p in case.iter("property")]
    note = "; ".join(errors)
    if problem is not None:
        note = (problem.get("message") or problem.tag).splitlines()[0]
    elif skipped is not None:
        note = f"skipped: {skipped.get('message')}"
    return Row(
        part=PART,
        what=case.get("name", ""),
        seconds=float(case.get("time", "nan")),
        note=note,
        failed=problem is not None,
    )
