"""One part of the GPU report, in a process of its own: `python -m benchmarks.gpu.worker PART --rows FILE`.

Each row is in the file as soon as it is measured. What one case raises costs that case; an error of the
device itself ends the part, because nothing after it can be believed.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import agent, decoders, floors, ops, peers
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.rows import Row, append_row
from benchmarks.peers import flash_linear_attention

Entries = Callable[[Clock], Iterator[ops.Entry]]

AGENT_SECONDS = 4.0
"""A part of a REM run is timed no longer than this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one part; returns 1 if something in it failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=Path, required=True, help="file that rows are added to")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    clock = Clock(torch.device("cpu" if options.dry_run else "cuda"))
    torch.manual_seed(0)
    failed = False
    for row in PARTS[options.part](clock):
        append_row(options.rows, row)
        failed |= row.failed
    return int(failed)


def time_entries(entries: Entries, clock: Clock, part: str) -> Iterator[Row]:
    """The rows of entries, one after another; a failure is a row too."""
    made = entries(clock)
    while True:
        entry = None
        try:
            entry = next(made, None)
            if entry is None:
                return
            yield from ops.timed(entry, clock)
        except Exception as error:
            traceback.print_exc()
            yield _failure(part, entry, error)
            if entry is None or is_fatal(error):
                return


def is_fatal(error: Exception) -> bool:
    """Whether the device itself failed: from then on every call of this process does."""
    return isinstance(error, torch.AcceleratorError) or any(
        words in str(error) for words in ("CUDA error", "Triton Error [CUDA]")
    )


def _failure(part: str, entry: ops.Entry | None, error: Exception) -> Row:
    first = (str(error).splitlines() or [""])[0]
    note = f"{type(error).__name__}: {first}"
    if entry is None:
        return Row(part=part, what=part, note=note, failed=True)
    dtype = str(entry.dtype).removeprefix("torch.")
    return Row(part=part, what=entry.what, shape=entry.shape, dtype=dtype, note=note, failed=True)


def _guarded(part: str, measure: Callable[[Clock], Iterator[Row]], clock: Clock) -> Iterator[Row]:
    try:
        yield from measure(clock)
    except Exception as error:
        traceback.print_exc()
        yield _failure(part, None, error)


def _measure_peers(clock: Clock) -> Iterator[Row]:
    yield from time_entries(peers.torch_backend, clock, peers.PART)
    try:
        fla = flash_linear_attention.functions()
    except ImportError as error:
        yield Row(part=peers.PART, what="flash-linear-attention", note=f"not measured: {error}")
        return
    yield from time_entries(partial(peers.peers, fla=fla), clock, peers.PART)
    for name in flash_linear_attention.FUNCTIONS:
        if not hasattr(fla, name):
            yield Row(part=peers.PART, what=f"fla {name}", note="not measured: this version has none")


PARTS: dict[str, Callable[[Clock], Iterator[Row]]] = {
    "floors": partial(_guarded, "floors", floors.measure),
    "pop": lambda clock: time_entries(ops.pop, clock, "pop"),
    "retention": lambda clock: time_entries(ops.retention, clock, "retention"),
    "token-wise": lambda clock: time_entries(ops.token_wise, clock, "token-wise"),
    "peers": _measure_peers,
    "decoder": partial(_guarded, "decoder", partial(decoders.measure, compiled=False)),
    "compiled decoder": partial(_guarded, "compiled decoder", partial(decoders.measure, compiled=True)),
    "rem_atari": partial(_guarded, "rem_atari", partial(agent.measure, max_seconds=AGENT_SECONDS)),
}
"""The parts that measure, by name."""


if __name__ == "__main__":
    sys.exit(main())
