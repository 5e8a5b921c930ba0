"""The same work by others: the torch backend, and flash-linear-attention where it can be imported.

Its retention has RetNet's decay built in, so numbers differ from ours where shapes are alike; times do not
depend on the decay. POP is a composition of its calls: a pass a block, and one for all predictions. None is
timed in a CUDA graph: its functions copy the decay from the host at every call, which no graph can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.ops import (
    BF16,
    FP32,
    Entry,
    decoding,
    decoding_sizes,
    long_retention,
    long_sizes,
    separate_pop,
    training_sizes,
)
from benchmarks.peers.flash_linear_attention import FUNCTIONS, compose_pop

PART = "peers"


def torch_backend(clock: Clock) -> Iterator[Entry]:
    """What the kernels replace."""
    dtype = BF16 if clock.on_gpu else FP32
    yield replace(separate_pop(training_sizes(clock), dtype, clock.device, backend="torch"), part=PART)
    for sizes in long_sizes(clock):
        yield replace(long_retention(sizes, dtype, clock.device, backend="torch"), part=PART)


def peers(clock: Clock, fla: Any) -> Iterator[Entry]:
    """The works of `ops`, by flash-linear-attention's functions."""
    dtype = BF16 if clock.on_gpu else FP32
    chunk, _, recurrent = FUNCTIONS
    for sizes in long_sizes(clock):
        for name in FUNCTIONS[:2]:
            if hasattr(fla, name):
                yield _instead(long_retention(sizes, dtype, clock.device), name, getattr(fla, name))
    for sizes in decoding_sizes(clock):
        if hasattr(fla, recurrent):
            yield _instead(decoding(sizes, dtype, clock.device), recurrent, getattr(fla, recurrent))
    if not hasattr(fla, chunk):
        return
    s = training_sizes(clock)
    ours = separate_pop(s, dtype, clock.device)
    tokens = [x for x in ours.work.inputs if x is not None]
    run = partial(compose_pop, getattr(fla, chunk), tokens[:3], tokens[3:], None, s.L, s.offset)
    yield replace(
        ours, part=PART, what=f"fla {chunk}, composed", work=replace(ours.work, run=run), graphable=False
    )


def _instead(ours: Entry, name: str, function: Callable[..., Any]) -> Entry:
    q, k, v, *state = [x for x in ours.work.inputs if x is not None]

    def run() -> tuple[Tensor, ...]:
        out, final = function(q, k, v, initial_state=state[0] if state else None, output_final_state=True)
        return out, final

    return replace(ours, part=PART, what=f"fla {name}", work=replace(ours.work, run=run), graphable=False)
