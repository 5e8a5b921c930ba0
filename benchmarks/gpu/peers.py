"""The same work by others: the torch backend, and flash-linear-attention where it can be imported.

Its retention has RetNet's decay built in, so numbers differ from ours where shapes are alike; times do not
depend on the decay. POP is a composition of its calls: a pass a block, and one for all predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.ops import BF16, FP32, Sizes, Work, decoding, long_retention, long_sizes, separate_pop
from benchmarks.gpu.ops import training_sizes as rem_sizes

PART = "peers"

FUNCTIONS = ("chunk_retention", "fused_chunk_retention", "fused_recurrent_retention")
"""Of flash-linear-attention; not every version has all."""


def torch_backend(clock: Clock) -> Iterator[Work]:
    """What the kernels replace."""
    dtype = BF16 if clock.on_gpu else FP32
    yield replace(separate_pop(rem_sizes(clock), dtype, clock.device, backend="torch"), part=PART)
    for B, T, H, D in long_sizes(clock):
        yield replace(long_retention(B, T, H, D, dtype, clock.device, backend="torch"), part=PART)


def flash_linear_attention() -> Any:
    """Its module of retention; ImportError where it is not installed."""
    return import_module("fla.ops.retention")


def peers(clock: Clock, fla: Any) -> Iterator[Work]:
    """The works of `ops`, by flash-linear-attention's functions."""
    dtype = BF16 if clock.on_gpu else FP32
    for B, T, H, D in long_sizes(clock):
        ours = long_retention(B, T, H, D, dtype, clock.device)
        for name in FUNCTIONS[:2]:
            if hasattr(fla, name):
                yield _instead(ours, f"fla {name}", getattr(fla, name))
    for B, H, D in [(64, 4, 64), (256, 16, 128)] if clock.on_gpu else [(2, 1, 16)]:
        if hasattr(fla, FUNCTIONS[2]):
            yield _instead(
                decoding(B, H, D, dtype, clock.device), f"fla {FUNCTIONS[2]}", getattr(fla, FUNCTIONS[2])
            )
    if not hasattr(fla, FUNCTIONS[0]):
        return
    sizes = rem_sizes(clock)
    ours = separate_pop(sizes, dtype, clock.device)
    yield replace(
        ours,
        part=PART,
        what="fla chunk_retention, composed",
        run=lambda: composed(fla.chunk_retention, sizes, [x for x in ours.inputs if x is not None]),
    )


def _instead(ours: Work, name: str, function: Callable[..., Any]) -> Work:
    q, k, v, *state = [x for x in ours.inputs if x is not None]

    def run() -> tuple[Tensor, ...]:
        out, final = function(q, k, v, initial_state=state[0] if state else None, output_final_state=True)
        return out, final

    return replace(ours, part=PART, what=name, run=run)


def composed(chunk_retention: Callable[..., Any], s: Sizes, tokens: list[Tensor]) -> tuple[Tensor, ...]:
    """POP of N blocks and N predictions: block after block, and then all predictions at once."""
    main, pred = tokens[:3], tokens[3:]
    state = main[0].new_zeros(s.B, s.H, s.D, s.D, dtype=torch.float32)
    outs, states = [], []
    for n in range(s.N):
        states.append(state)
        block = (x[:, n * s.L : (n + 1) * s.L] for x in main)
        out, state = chunk_retention(*block, initial_state=state, output_final_state=True)
        outs.append(out)
    before = torch.stack(states, dim=1).flatten(0, 1)
    rows = (x.flatten(0, 1) for x in pred)
    predicted, _ = chunk_retention(*rows, initial_state=before, output_final_state=False)
    return torch.cat(outs, dim=1), predicted.unflatten(0, (s.B, s.N)), state
