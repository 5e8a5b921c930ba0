"""`retpop::retention_fwd`, `retention_step` and their backward, as `torch.library` ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retpop.ops import packed, torch_backend, torch_backward, torch_forms, torch_forward
from retpop.ops.custom import (
    check_log_decay,
    check_state,
    check_tokens,
    gradient_op,
    gradients_like,
    kernel_op,
    kernels,
    own,
    selected,
    spread,
)
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dtypes import state_dtype

Results = tuple[Tensor, Tensor]


def _launch_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Results:
    launch = kernels("retention_fwd").retention_fwd
    return launch(q, k, v, log_decay, state, scale, cu_seqlens)


def _compute_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Results:
    powers = DecayPowers(log_decay, scale, state_dtype(q.dtype))
    if cu_seqlens is None:
        out, final = torch_backend.retention(q, k, v, powers, mode="chunkwise", state=state, chunk_size=None)
    else:
        packing = packed.Packing("retpop::retention_fwd", cu_seqlens, q.shape[1])
        out, final = packed.retention(
            q, k, v, powers, mode="chunkwise", state=state, chunk_size=None, packing=packing
        )
    return out.contiguous(), own(final, state)


def _fake_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Results:
    check_tokens(q, k, v, 4)
    check_log_decay(log_decay, q.shape[2])
    rows = q.shape[0]
    if cu_seqlens is not None:
        torch._check(rows == 1, lambda: f"packed q has B={rows}; it must have 1")
        rows = cu_seqlens.shape[0] - 1
    shape = (rows, q.shape[2], q.shape[3], v.shape[3])
    check_state(state, shape)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=state_dtype(q.dtype))


retention_fwd = kernel_op(
    "retention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens, float scale) "
    "-> (Tensor, Tensor)",
    launch=_launch_retention,
    compute=_compute_retention,
    fake=_fake_retention,
)


def _compute_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    tokens = q, k, v
    inputs = (*tokens, state)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = torch_forms.zero_state(q, v, rows) if state is None else state
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    grad_state = torch.zeros_like(state) if grad_state is None else grad_state
    powers = DecayPowers(log_decay, scale, state.dtype)
    chunk_size = torch_forms.DEFAULT_CHUNK_SIZE
    if cu_seqlens is None:
        _, _, states = torch_forward.retention(tokens, powers, state=state, chunk_size=chunk_size, keep=True)
        found = torch_backward.retention(
            tokens, grad_out, grad_state, powers, states=states, chunk_size=chunk_size, needs=needs
        )
    else:
        packing = packed.Packing("retpop::retention_bwd", cu_seqlens, q.shape[1])
        found = torch_backward.packed_retention(
            tokens, grad_out, grad_state, powers, state=state, chunk_size=chunk_size, packing=packing
        )
    return selected(found, inputs, needs)


def _launch_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    launch = kernels("retention_bwd").retention_bwd
    found = launch(q, k, v, log_decay, state, scale, cu_seqlens, grad_out, grad_state, needs=needs)
    return [grad for grad in found if grad is not None]


def _fake_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, *rest: Any
) -> list[Tensor]:
    return gradients_like((q, k, v, state), rest[-1])


retention_bwd = gradient_op(
    "retention_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens, Tensor? grad_out, "
    "Tensor? grad_state, float scale, bool[] needs) -> Tensor[]",
    launch=_launch_gradients,
    compute=_compute_gradients,
    fake=_fake_gradients,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = retention_bwd(*ctx.saved_tensors, grad_out, grad_state, ctx.scale, needs)
    dq, dk, dv, dstate = spread(grads, needs)
    return dq, dk, dv, None, dstate, None, None


retention_fwd.register_autograd(_differentiate, setup_context=_save)


def _launch_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, scale: float
) -> Results:
    launch = kernels("retention_step").retention_step
    return launch(q, k, v, log_decay, state, scale)


def _compute_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, scale: float
) -> Results:
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    out, final = _compute_retention(q, k, v, log_decay, state, None, scale)
    return out.squeeze(1), final


def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, scale: float
) -> Results:
    check_tokens(q, k, v, 3)
    check_log_decay(log_decay, q.shape[1])
    shape = (*q.shape, v.shape[2])
    check_state(state, shape)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=state_dtype(q.dtype))


retention_step = kernel_op(
    "retention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, float scale) -> (Tensor, Tensor)",
    launch=_launch_step,
    compute=_compute_step,
    fake=_fake_step,
)


def _differentiate_step(
    ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """A step is a sequence of one token."""
    q, k, v, log_decay, state = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = retention_bwd(
        *(x.unsqueeze(1) for x in (q, k, v)),
        log_decay,
        state,
        None,
        None if grad_out is None else grad_out.unsqueeze(1),
        grad_state,
        ctx.scale,
        needs,
    )
    *tokens, dstate = spread(grads, needs)
    dq, dk, dv = (None if x is None else x.squeeze(1) for x in tokens)
    return dq, dk, dv, None, dstate, None


retention_step.register_autograd(_differentiate_step, setup_context=_save)
