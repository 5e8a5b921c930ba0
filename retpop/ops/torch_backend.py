"""The PyTorch backend: which of its two ways a call takes, and the gradients of the faster one.

In eager PyTorch chunkwise mode and POP run a stretch of blocks at a time, written into place, with gradients
by explicit formulas (`torch_forward`, `torch_backward`). Where somebody else wants to see every operation - a
compiler, a transform of `torch.func`, forward-mode AD, a derivative of a derivative - the plain forms of
`torch_forms` run, as the other modes always do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retpop import position
from retpop.arguments import transforms_are_active
from retpop.ops import packed, torch_backward, torch_forms, torch_forward
from retpop.ops.autocast import without_autocast
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dtypes import Inputs
from retpop.ops.gated_norm import gated_norm as gated_norm
from retpop.ops.rows import PopSpec, join_row, split_row
from retpop.ops.torch_forms import DEFAULT_CHUNK_SIZE, zero_state
from retpop.position import Rotation

NAME = "torch"


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    mode: str,
    state: Tensor | None,
    chunk_size: int | None,
    packing: packed.Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention of inputs (B, T, H, D) in one of the three modes; returns outputs and final state."""
    if packing is not None:
        return packed.retention(
            q, k, v, powers, mode=mode, state=state, chunk_size=chunk_size, packing=packing
        )
    chunk_size = chunk_size or DEFAULT_CHUNK_SIZE
    if mode != "chunkwise" or q.shape[1] < 2 or _is_watched():
        return torch_forms.retention(q, k, v, powers, mode=mode, state=state, chunk_size=chunk_size)
    state = zero_state(q, v, q.shape[0]) if state is None else state
    if _wants_gradients(q, k, v, state):
        out, final = _Retention.apply(powers, chunk_size, q, k, v, state)
        return out, final
    out, final, _ = torch_forward.retention((q, k, v), powers, state=state, chunk_size=chunk_size, keep=False)
    return out, final


def pop(tokens: Sequence[Tensor], state: Tensor | None, spec: PopSpec) -> tuple[Tensor, ...]:
    """POP of three rows, or of the sequence's three tensors and the predictions'; outputs, final state."""
    state = zero_state(tokens[0], tokens[2], tokens[0].shape[0]) if state is None else state
    if _is_watched():
        return _plain_pop(spec, *tokens, state)
    if _wants_gradients(*tokens, state):
        results: tuple[Tensor, ...] = _Pop.apply(spec, *tokens, state)
        return results
    outs, states = torch_forward.pop(tokens, spec, state=state)
    return (*outs, states[-1].clone())


def rotate(
    q: Tensor, k: Tensor, rotation: Rotation, kind: str, spec: PopSpec | None = None
) -> tuple[Tensor, Tensor]:
    """`retpop.position.rotate` of both; with ``spec`` of rows, q perhaps a short one."""
    own = rotation if spec is None else Rotation(*(spec.readers(x) for x in rotation))
    return position.rotate(q, own, kind), position.rotate(k, rotation, kind)


def describe(inputs: Inputs, shape: Sequence[int], mode: str, block_size: int | None) -> str:
    """The form that runs, for people."""
    return f"{mode} form"


def _is_watched() -> bool:
    """Whether somebody else wants to see plain operations: a compiler, a transform, forward-mode AD."""
    return (
        torch.compiler.is_compiling()
        or transforms_are_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def _wants_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


class _Retention(torch.autograd.Function):
    """`torch_forward.retention` with its gradients; what it keeps are its inputs and the chunks' states."""

    @staticmethod
    def forward(ctx: Any, powers: DecayPowers, chunk_size: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *tokens, state = inputs
        out, final, states = torch_forward.retention(
            tokens, powers, state=state, chunk_size=chunk_size, keep=True
        )
        ctx.powers, ctx.chunk_size = powers, chunk_size
        ctx.save_for_backward(*inputs, states)
        if not any(ctx.needs_input_grad[3:]):  # keys, values and state
            ctx.mark_non_differentiable(final)
        return out, final

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        powers, chunk_size, needs = ctx.powers, ctx.chunk_size, ctx.needs_input_grad[2:]
        with without_autocast(states.device):
            if _want_plain_gradients(grad, grad_state):
                plain = partial(_plain_retention, powers, chunk_size)
                found = _plain_gradients(plain, inputs, (grad, grad_state))
            else:
                found = torch_backward.retention(
                    inputs[:-1], grad, grad_state, powers, states=states, chunk_size=chunk_size, needs=needs
                )
        return None, None, *found


class _Pop(torch.autograd.Function):
    """`torch_forward.pop` with its gradients, of rows or of sequence and predictions."""

    @staticmethod
    def forward(ctx: Any, spec: PopSpec, *inputs: Tensor) -> tuple[Tensor, ...]:
        *tokens, state = inputs
        outs, states = torch_forward.pop(tokens, spec, state=state)
        ctx.spec = spec._replace(reset=None)
        ctx.save_for_backward(*inputs, states, spec.reset)  # so that it is noticed if they are written over
        final = states[-1].clone()
        needs = ctx.needs_input_grad[1:]
        carried = needs[1] or needs[2] or needs[-1]  # keys, values and state
        own = [any(needs[3 * i : 3 * i + 3]) for i in range(len(outs))]
        results = zip((*outs, final), (*own, False), strict=True)
        ctx.mark_non_differentiable(*(x for x, needed in results if not (needed or carried)))
        return (*outs, final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states, reset = ctx.saved_tensors
        spec, needs = ctx.spec._replace(reset=reset), ctx.needs_input_grad[1:]
        with without_autocast(states.device):
            if _want_plain_gradients(*grads):
                found = _plain_gradients(partial(_plain_pop, spec), inputs, grads)
            else:
                found = torch_backward.pop(
                    inputs[:-1], grads[:-1], grads[-1], spec, states=states, needs=needs
                )
        return None, *found


def _want_plain_gradients(*grads: Tensor) -> bool:
    """Whether gradients are to have gradients, or come in a batch (of `is_grads_batched`, an older vmap)."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or _is_watched() or any(batched(grad) for grad in grads)


def _plain_retention(powers: DecayPowers, chunk_size: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    q, k, v, state = inputs
    return torch_forms.retention(q, k, v, powers, mode="chunkwise", state=state, chunk_size=chunk_size)


def _plain_pop(spec: PopSpec, *inputs: Tensor) -> tuple[Tensor, ...]:
    if len(inputs) == 7:
        q, k, v, q_pred, k_pred, v_pred, state = inputs
        return torch_forms.pop_retention(q, k, v, q_pred, k_pred, v_pred, state, spec)
    *rows, state = inputs
    (q, q_pred), (k, k_pred), (v, v_pred) = (split_row(x, spec.predictions) for x in rows)
    out, pred, state = torch_forms.pop_retention(q, k, v, q_pred, k_pred, v_pred, state, spec)
    return join_row(out, pred), state


def _plain_gradients(
    plain: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients by autograd through the plain forms, which can be differentiated again."""
    with torch.enable_grad():
        inputs = [x.view_as(x) for x in inputs]  # one each, where the same tensor came twice
        pairs = [pair for pair in zip(plain(*inputs), grads, strict=True) if pair[0].requires_grad]
    if not pairs:  # of no tokens, say
        return [None] * len(inputs)
    wanted = [x for x in inputs if x.requires_grad]
    results, grads = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(results, wanted, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)
    )
    return [next(found) if x.requires_grad else None for x in inputs]
