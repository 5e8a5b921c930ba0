#!/usr/bin/env bash
# Prove and measure the kernels on a GPU: the tests of tests/gpu, every operation against this GPU's own
# ceilings, the decoder, and REM's training where rem_atari can be imported. Under 8 minutes.
#
#   benchmarks/gpu_report.sh [--dry-run] [--parts A,B] [--out FOLDER]
#
# Needs a Python with torch, triton, einops, pytest, hypothesis and numpy (PYTHON=..., default python3), and
# installs nothing: retpop, its kernels and rem_atari are found through links in a temporary folder. pytest-xdist,
# flash-linear-attention, gymnasium and ale-py are used where they are. All processors compile first, ahead of time,
# what the parts then launch (benchmarks/compile_ahead.py). A part that is not expected to fit in the time left is
# skipped and named, and counts as failed.
#
# Prints a line a part as it ends, then failures, and a table last: median times, and the floor's share of them
# (1 is as fast as the GPU copies and multiplies); then, for each dtype, the test that came nearest to its bound.
# All rows, with every test's errors against float64, go to gpu_<GPU>_<commit>.csv in --out, else $OUT, else
# benchmarks/results, as they are measured: a report that is killed leaves them. RETPOP_COMMIT names the commit
# of a copy without git. Exit status: 0; 1: the tests did not pass; 2: they did, but another part failed or was
# stopped.
#
# --dry-run walks the same way on a CPU: Triton's interpreter, tiny shapes, no result that means anything. It prints
# how long each part is expected to take on a GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The working folder, which may be a checkout, must not come before the root.
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu_report "$@"
