"""Retention by kernels: `retpop::retention_fwd` and its backward, as `torch.library` ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from retpop._torch import check
from retpop.arguments import state_dtype, without_autocast, zero_state
from retpop.ops import torch_backend
from retpop.ops.powers import DecayPowers
from retpop.ops.torch_backend import eager
from retpop.ops.torch_backend.packed import Chunks, Packing
from retpop.ops.torch_backend.plain import DEFAULT_CHUNK_SIZE
from retpop.ops.triton_backend.custom import (
    add_gradient,
    check_tokens,
    final_state,
    kernel_op,
    kernels,
    own,
    refuse_transforms,
)
from retpop.ops.triton_backend.known import KnownCalls

Results = tuple[Tensor, Tensor]
Gradients = list[Tensor | None]


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
) -> Results:
    """Retention of (B, T, H, D), by the same kernels in every mode; they choose their own chunks."""
    refuse_transforms(q, k, v, powers.given, state)
    cu_seqlens = reset = None
    if packing is not None and packing.is_step:
        state = packing.restart(state)
    elif packing is not None:
        cu_seqlens, reset = packing.cu_seqlens, packing.reset
    return retention_fwd(q, k, v, powers.given, state, cu_seqlens, reset, powers.scale, out_dtype)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None = None,
    *,
    with_states: bool = False,
) -> tuple[Tensor | None, ...]:
    launch = kernels("retention_fwd").retention_fwd
    arguments = (q, k, v, log_decay, state, scale, cu_seqlens, reset)
    results: tuple[Tensor | None, ...] = launch(*arguments, out_dtype=out_dtype, with_states=with_states)
    return results


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> Results:
    cut = cu_seqlens is not None or reset is not None
    out, final = torch_backend.retention(
        q,
        k,
        v,
        DecayPowers(log_decay, scale, state_dtype(q.dtype)),
        mode="chunkwise",
        state=state,
        chunk_size=None,
        packing=Packing("retpop::retention_fwd", cu_seqlens, q.shape[1], reset) if cut else None,
        out_dtype=out_dtype,
    )
    return own(out), own(final)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> Results:
    check_tokens(q, k, v, 4)
    rows = q.shape[0]
    if cu_seqlens is not None:
        check(rows == 1, lambda: f"packed q has B={rows}; it must have 1")
        rows = cu_seqlens.shape[0] - 1
    check(
        reset is None or reset.shape == q.shape[:2],
        lambda: f"reset is {None if reset is None else tuple(reset.shape)}; it must be {tuple(q.shape[:2])}",
    )
    return v.new_empty(v.shape, dtype=out_dtype), final_state(q, v, rows, log_decay, state)


retention_fwd = kernel_op(
    "retention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens, Tensor? reset, "
    "float scale, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
    launch=_launch,
    compute=_compute,
    fake=_fake,
)


def _launch_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    states: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> Gradients:
    launch = kernels("retention_bwd").retention_bwd
    wanted = [needs[i] for i in (0, 1, 2, 4)]
    *found, grad_state = launch(
        q, k, v, log_decay, state, scale, cu_seqlens, *grads, reset=reset, states=states, needs=wanted
    )
    decay = None
    if needs[3]:  # no kernel computes it
        only = [i == 3 for i in range(len(needs))]
        with without_autocast(q.device):
            arguments = (q, k, v, log_decay, state, cu_seqlens, reset, grads, None, scale, out_dtype)
            decay = _compute_gradients(*arguments, only)[3]
    return [*found, decay, grad_state]


def _compute_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    states: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> Gradients:
    powers = DecayPowers(log_decay, scale, state_dtype(q.dtype))
    form: torch_backend.Form = eager.Chunks(powers, DEFAULT_CHUNK_SIZE, out_dtype or v.dtype)
    rows = q.shape[0]
    if cu_seqlens is not None or reset is not None:
        packing = Packing("retpop::retention_bwd", cu_seqlens, q.shape[1], reset)
        rows = packing.num_sequences
        if packing.longest:
            form = Chunks(powers, packing.plan(DEFAULT_CHUNK_SIZE), out_dtype or v.dtype)
    state = zero_state(q, v, rows) if state is None else state
    return torch_backend.gradients(form, (q, k, v), state, grads, needs[:5])


add_gradient(
    retention_fwd,
    "retention_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens, Tensor? reset, "
    "Tensor?[] grads, Tensor? states, float scale, ScalarType? out_dtype, bool[] needs) -> Tensor[]",
    launch=_launch_gradients,
    compute=_compute_gradients,
    num_tensors=7,
    keep=partial(_launch, with_states=True),
)

known_retention = KnownCalls(retention_fwd)
