"""Host time of the Triton backend's operations, measured without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmark_rows import ROW

from benchmarks.machine import ROOT
from benchmarks.measurements import RIGHT, read
from benchmarks.targets import DISPATCH, HOST, HOST_LIMITS, NOTHING, Results
from benchmarks.work import BOTH, FORWARD


def test_every_operation_has_rows(tmp_path: Path) -> None:
    """In a process of its own, because here Triton interprets."""
    path = tmp_path / "host.csv"
    command = [sys.executable, "-m", "benchmarks", "run", "--op", "host", "--quick", "--csv", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = read(path)
    modes = {"retention", "token", "pop", "pop of rows", "gated norm", "rotation", NOTHING}
    sides = {(mode, d, side) for mode in modes for d in HOST_LIMITS for side in (DISPATCH, "triton")}
    assert {(m.mode, m.direction, m.backend) for m in rows} == sides
    assert all(m.verdict == RIGHT and min(m.samples) > 0 for m in rows)


def test_the_worst_operation_is_judged() -> None:
    unit = replace(ROW, op="host", backend=DISPATCH, direction=FORWARD, samples=(1.0, 1.0, 1.0))
    rows = []
    for mode, units in ((NOTHING, 90.0), ("token", 7.0), ("pop", 9.0)):
        taken = replace(unit, mode=mode, backend="triton", samples=(units,) * 3)
        rows += [replace(unit, mode=mode), taken]
    forward, both = (target.judge(Results(host=rows)) for target in HOST)
    assert forward.figure is not None
    assert forward.figure.text == "9.00x (9.00 to 9.00), pop"
    assert forward.verdict.startswith("**missed**")
    assert both.target.name.count(BOTH) == 1
    assert both.verdict.startswith("not measured")
