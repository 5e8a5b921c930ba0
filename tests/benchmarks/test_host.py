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
    modes = {"retention", "token", "pop", "pop of rows", "gated norm", "rotation"}
    sides = {(mode, d, side) for mode in modes for d in HOST_LIMITS for side in (DISPATCH, "triton")}
    sides |= {(mode, BOTH, NOTHING) for mode in modes}
    assert {(m.mode, m.direction, m.backend) for m in rows} == sides
    assert all(m.verdict == RIGHT and min(m.samples) > 0 for m in rows)


def test_the_worst_operation_is_judged() -> None:
    unit = replace(ROW, op="host", backend=DISPATCH, direction=FORWARD, samples=(1.0, 1.0, 1.0))
    rows = []
    for mode, units in (("token", 7.0), ("pop", 9.0)):
        taken = replace(unit, mode=mode, backend="triton", samples=(units,) * 3)
        rows += [replace(unit, mode=mode), taken]
    forward, both, beyond = (target.judge(Results(host=rows)) for target in HOST)
    assert forward.figure is not None
    assert forward.figure.text == "9.00x (9.00 to 9.00), pop"
    assert forward.verdict.startswith("**missed**")
    assert both.target.name.count(BOTH) == 1
    assert both.verdict.startswith("not measured")
    assert beyond.verdict.startswith("not measured")


def test_what_a_function_that_does_nothing_takes_is_subtracted() -> None:
    unit = replace(ROW, op="host", mode="pop", backend=DISPATCH, direction=BOTH, samples=(2.0, 2.0, 2.0))
    times = {"triton": (90.0, 100.0, 95.0), NOTHING: (30.0, 40.0, 45.0)}
    rows = [unit, *(replace(unit, backend=side, samples=samples) for side, samples in times.items())]
    found = HOST[2].judge(Results(host=rows)).figure
    assert found is not None
    assert found.text == "30.00x (27.50 to 30.00), pop"
