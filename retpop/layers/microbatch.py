"""A large pass without gradient in microbatches, whose intermediate results stay in a processor's cache.

Their memory is reused, too. A matrix product of REM's decoder that writes into fresh memory, page by page,
takes 1.3 times as long (docs/performance_notes.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from retpop.arguments import values_are_free
from retpop.config import RetNetConfig
from retpop.layers.call import Call

ELEMENTS_AT_ONCE = 2**21
"""Elements per thread that a layer's widest tensor has in one microbatch."""

THREADS = 3
"""Most threads that microbatches grow with. A float32 tensor then stays below 32 MB, the size from which
glibc returns memory to the system, and a microbatch has enough work for the overhead of its calls."""

Layers = Callable[[Tensor, Tensor | None, Call], tuple[Tensor, Tensor]]


def tokens_at_once(cfg: RetNetConfig, x: Tensor) -> int | None:
    """Tokens of (B, T, E) in a microbatch; None: all tokens pass a layer before any passes the next.

    It is None on a GPU, and where a gradient, a compiler or a transform would see the microbatches.
    """
    if torch.is_grad_enabled() or not values_are_free(x):
        return None
    hidden = cfg.ffn_dim * (2 if cfg.ffn == "glu" else 1)
    projected = 2 * ((cfg.key_dim or cfg.embed_dim) + (cfg.value_dim or cfg.embed_dim))
    most = max(1, ELEMENTS_AT_ONCE * min(torch.get_num_threads(), THREADS) // max(hidden, projected))
    return None if x.shape[0] * x.shape[1] <= most else most


def run_in_parts(
    layers: Layers, x: Tensor, kv: Tensor | None, call: Call, most: int
) -> tuple[Tensor, Tensor]:
    """Outputs of ``layers`` from (B, T, E) and states (layers, B, H, Dk, Dv), ``most`` tokens at once.

    Microbatches are rows of the batch; a longer row is split by tokens if the call allows it.
    """
    batch, length = x.shape[:2]
    if batch > 1 and batch * length > most:
        outs, states = [], []
        for rows in even_slices(batch, max(1, most // length)):
            own_kv = None if kv is None else kv[:, rows]
            out, after = run_in_parts(layers, x[rows], own_kv, call.of_rows(rows), most)
            outs.append(out)
            states.append(after)
        return torch.cat(outs), torch.cat(states, dim=1)
    unit = call.tokens_apart
    parts = [slice(None)] if unit is None else even_slices(length, most, unit)
    if len(parts) == 1:
        return layers(x, kv, call)
    outs = []
    for tokens in parts:
        out, kv = layers(x[:, tokens], kv, call.of_tokens(tokens))
        outs.append(out)
    return torch.cat(outs, dim=1), cast(Tensor, kv)


def even_slices(total: int, most: int, unit: int = 1) -> list[slice]:
    """``total`` in slices of about equal size, multiples of ``unit`` except the last.

    Each has at most ``most``, or one ``unit``.
    """
    parts = math.ceil(total / max(unit, most - most % unit))
    size = math.ceil(total / (parts * unit)) * unit
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
