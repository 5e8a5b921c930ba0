"""Operations that a graph holds whole, because the number of their steps depends on the data.

`retpop::chunkwise` is chunkwise mode in an exported program whose length is left open: a graph cannot express
its loop over chunks. `retpop::packed` is retention of packed sequences and of episodes in a compiled or an
exported program: boundaries and resets decide how tokens are cut into chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retpop.arguments import state_dtype
from retpop.ops.powers import DecayPowers
from retpop.ops.torch_backend import eager
from retpop.ops.torch_backend.packed import Chunks, Packing


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
    form = eager.Chunks(DecayPowers(log_decay, scale, state_dtype(q.dtype)), chunk_size, out_dtype)
    (out,), final, _ = form.forward((q, k, v), state, keep=False)
    return out, final


@chunkwise.register_fake
def _fake_chunkwise(
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


@torch.library.custom_op("retpop::packed", mutates_args=())
def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Retention of (B, T, H, D) from states (S, H, Dk, Dv): the outputs and the states after them."""
    form = _packed_form(q, log_decay, cu_seqlens, reset, scale, chunk_size, out_dtype)
    if form is None:
        return torch.empty_like(v, dtype=out_dtype), state.clone()
    (out,), final, _ = form.forward((q, k, v), state, keep=False)
    return out, final


@packed.register_fake
def _fake_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape, dtype=out_dtype), torch.empty_like(state)


@torch.library.custom_op("retpop::packed_bwd", mutates_args=())
def packed_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    grad_out: Tensor,
    grad_state: Tensor,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """The gradients of q, k, v and the states, from those of the results of `packed`."""
    form = _packed_form(q, log_decay, cu_seqlens, reset, scale, chunk_size, out_dtype)
    if form is None:
        return [*(torch.zeros_like(x) for x in (q, k, v)), grad_state.clone()]
    _, _, states = form.forward((q, k, v), state, keep=True)
    found = form.gradients((q, k, v), (grad_out, grad_state), states, [True] * 4)
    return [x for x in found if x is not None]  # all of them


@packed_bwd.register_fake
def _fake_packed_bwd(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, state)]


def _packed_form(
    q: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> Chunks | None:
    """The form that computes; None without tokens."""
    packing = Packing("retention()", cu_seqlens, q.shape[1], reset)
    if packing.longest == 0:
        return None
    powers = DecayPowers(log_decay, scale, state_dtype(q.dtype))
    return Chunks(powers, packing.plan(chunk_size), out_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.scale, ctx.chunk_size, ctx.out_dtype = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    found = packed_bwd(*ctx.saved_tensors, grad_out, grad_state, ctx.scale, ctx.chunk_size, ctx.out_dtype)
    return *found, *[None] * 6


packed.register_autograd(_differentiate, setup_context=_save)
