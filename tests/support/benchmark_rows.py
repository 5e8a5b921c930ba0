"""A measurement that was never made, to change for a test."""

from __future__ import annotations

from benchmarks.measurements import Measurement

ROW = Measurement(
    machine="a machine",
    commit="abc123",
    date="2026-01-02T03:04:05",
    torch="2.13.0",
    op="pop",
    shape="rem_train",
    mode="pop",
    dtype="float32",
    backend="torch",
    direction="forward",
    sizes="B4",
    samples=(2.0, 1.0, 3.0),
    flops=1_000,
    matrix_rate=2_000.0,
    verdict="right",
    note="output 1.0e-07 of 5.0e-06",
)
