"""`retpop::chunkwise`: retention that a graph holds whole, because its number of steps depends on the data.

A graph cannot express the loop over chunks if the length is left open, nor boundaries and resets that decide
how tokens are cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retpop.arguments import state_dtype
from retpop.ops.powers import DecayPowers
from retpop.ops.torch_backend import eager, packed


@torch.library.custom_op("retpop::chunkwise", mutates_args=())
def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Retention of (B, T, H, D) from states (S, H, Dk, Dv): the outputs and the states after them."""
    form = _form(q, log_decay, cu_seqlens, reset, scale, chunk_size, out_dtype)
    (out,), final, _ = form.forward((q, k, v), state, keep=False)
    return out, final


@chunkwise.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape, dtype=rest[-1]), torch.empty_like(state)


@torch.library.custom_op("retpop::chunkwise_bwd", mutates_args=())
def chunkwise_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    grad_out: Tensor,
    grad_state: Tensor,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of the first five, from those of the results of `chunkwise`."""
    form = _form(q, log_decay, cu_seqlens, reset, scale, chunk_size, out_dtype)
    _, _, states = form.forward((q, k, v), state, keep=True)
    found = form.gradients((q, k, v), (grad_out, grad_state), states, needs)
    return [x for x in found if x is not None]


@chunkwise_bwd.register_fake
def _fake_bwd(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *rest: Any) -> list[Tensor]:
    pairs = zip((q, k, v, log_decay, state), rest[-1], strict=True)
    return [x.new_empty(x.shape) for x, need in pairs if need]


def _form(
    q: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> eager.Chunks | packed.Chunks:
    powers = DecayPowers(log_decay, scale, state_dtype(q.dtype))
    if cu_seqlens is not None or reset is not None:
        packing = packed.Packing("retention()", cu_seqlens, q.shape[1], reset)
        if packing.longest:
            return packed.Chunks(powers, packing.plan(chunk_size), out_dtype)
    return eager.Chunks(powers, chunk_size, out_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.scale, ctx.chunk_size, ctx.out_dtype = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:5]
    numbers = ctx.scale, ctx.chunk_size, ctx.out_dtype
    found = iter(chunkwise_bwd(*ctx.saved_tensors, *grads, *numbers, needs))
    return *(next(found) if need else None for need in needs), *[None] * 5


chunkwise.register_autograd(_differentiate, setup_context=_save)
