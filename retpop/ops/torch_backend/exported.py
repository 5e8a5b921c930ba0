"""`retpop::chunkwise`: chunkwise mode as one operation, in an exported program whose length is left open.

The loop over chunks runs once per chunk, and a graph of open length cannot express that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retpop.arguments import state_dtype
from retpop.ops.powers import DecayPowers
from retpop.ops.torch_backend.eager import Chunks


@torch.library.custom_op("retpop::chunkwise", mutates_args=())
def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Retention of (B, T, H, D) from a state: the outputs and the state after them. It has no gradient."""
    form = Chunks(DecayPowers(log_decay, scale, state_dtype(q.dtype)), chunk_size, out_dtype)
    (out,), final, _ = form.forward((q, k, v), state, keep=False)
    return out, final


@chunkwise.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape, dtype=out_dtype), torch.empty_like(state)
