"""flash-linear-attention: retention by its kernels, where it is installed.

It has RetNet's decays built in, 1 - 2^(-5-h), which is what it is compared with. None of it is timed in a
CUDA graph: its functions copy the decays from the host at every call, which no graph can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def functions() -> Any:
    """Its module of retention, whose functions are not the same in every version; None: not installed."""
    try:
        return import_module("fla.ops.retention")
    except ImportError:
        return None


def retentions() -> dict[str, Callable[..., Tensor]]:
    """Its ways to compute retention of (B, T, H, D), by name."""
    names = ("chunk_retention", "fused_chunk_retention")
    return {f"fla, {name}": partial(_plain, function) for name, function in _there(*names)}


def steps() -> dict[str, Callable[..., Any]]:
    """Its function for single tokens, by name."""
    return {f"fla, {name}": function for name, function in _there("fused_recurrent_retention")}


def compositions() -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """POP composed of its calls, by name."""
    found = _there("chunk_retention")
    return {"fla, composed": partial(compose_pop, found[0][1])} if found else {}


def _there(*names: str) -> list[tuple[str, Any]]:
    found = functions()
    return [(name, getattr(found, name)) for name in names if hasattr(found, name)]


def _plain(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    out: Tensor = function(q, k, v)[0]
    return out


def compose_pop(
    chunk_retention: Callable[..., Any],
    main: Sequence[Tensor],
    pred: Sequence[Tensor],
    state: Tensor | None,
    block_size: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Block after block, then all predictions at once; (B, T, H, D) and (B, P, M, H, D)."""
    rows, num_preds = pred[0].shape[:2]
    if state is None:
        B, _, H, D = main[0].shape
        state = main[0].new_zeros(B, H, D, main[2].shape[-1], dtype=torch.float32)
    outs, states = [], [state]
    for block in zip(*(x.split(block_size, dim=1) for x in main), strict=True):
        out, state = chunk_retention(*block, initial_state=state, output_final_state=True)
        outs.append(out)
        states.append(state)
    starts = torch.stack(states[offset : offset + num_preds], dim=1).flatten(0, 1)
    flat = (x.flatten(0, 1) for x in pred)
    predicted, _ = chunk_retention(*flat, initial_state=starts, output_final_state=False)
    return torch.cat(outs, dim=1), predicted.unflatten(0, (rows, num_preds))
