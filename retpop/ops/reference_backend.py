"""The reference as a backend: `retpop.ops.reference` with the functions that every backend has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retpop.arguments import Inputs
from retpop.ops import reference
from retpop.ops.powers import DecayPowers
from retpop.ops.rows import PopSpec, join_row, split_row
from retpop.ops.torch_backend import gated_norm as gated_norm
from retpop.ops.torch_backend import rotate as rotate
from retpop.ops.torch_backend import rotation as rotation
from retpop.ops.torch_backend.packed import Packing

NAME = "reference"


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    mode: str,
    state: Tensor | None,
    chunk_size: int | None,
    packing: Packing | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention token by token, in every mode."""
    bounds = None if packing is None or packing.cu_seqlens is None else packing.bounds
    reset = None if packing is None else packing.reset
    q, k, v = (x.to(out_dtype or x.dtype) for x in (q, k, v))  # it computes in float32 anyway
    return reference.retention(
        q, k, v, powers.log_decay, state=state, scale=powers.scale, bounds=bounds, reset=reset
    )


def pop(tokens: Sequence[Tensor], state: Tensor | None, spec: PopSpec) -> tuple[Tensor, ...]:
    """POP block by block, for every token; the outputs that a short row leaves out are dropped afterwards."""
    if len(tokens) == 3:
        q, k, v = tokens
        (q, q_pred), (k, k_pred), (v, v_pred) = (
            split_row(x, spec.predictions) for x in (spec.all_tokens(q), k, v)
        )
        out, pred, final = pop((q, k, v, q_pred, k_pred, v_pred), state, spec)
        return spec.readers(join_row(out, pred)), final
    q, k, v, q_pred, k_pred, v_pred = (x.to(spec.out_dtype or x.dtype) for x in tokens)
    return reference.pop_retention(
        q,
        k,
        v,
        q_pred,
        k_pred,
        v_pred,
        spec.powers.log_decay,
        block_size=spec.block_size,
        offset=spec.offset,
        state=state,
        scale=spec.powers.scale,
        reset=spec.reset,
    )


def describe(inputs: Inputs, shape: Sequence[int], mode: str, block_size: int | None) -> str:
    """The form that runs, for people."""
    return "token-by-token form"
