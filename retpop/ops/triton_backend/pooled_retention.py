"""Decoding in place by a kernel: `retpop::pooled_retention`, as a `torch.library` op without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from retpop._torch import check
from retpop.arguments import state_dtype
from retpop.ops import torch_backend
from retpop.ops.pool import through_states
from retpop.ops.powers import DecayPowers
from retpop.ops.triton_backend.custom import check_tokens, kernel_op, kernels, refuse_transforms


def pooled_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    states: Tensor,
    index: Tensor,
    count: Tensor | None,
) -> Tensor:
    """Outputs (B, T, H, Dv); ``states`` is changed in place."""
    refuse_transforms(q, k, v, powers.given, states)
    out: Tensor = _op(q, k, v, powers.given, states, index, count, powers.scale)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    index: Tensor,
    count: Tensor | None,
    scale: float,
) -> Tensor:
    out: Tensor = kernels("pooled_retention").pooled_retention(
        q, k, v, log_decay, states, index, count, scale
    )
    return out


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    index: Tensor,
    count: Tensor | None,
    scale: float,
) -> Tensor:
    powers = DecayPowers(log_decay, scale, state_dtype(q.dtype))
    return through_states(torch_backend.retention, q, k, v, powers, states, index, count)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    index: Tensor,
    count: Tensor | None,
    scale: float,
) -> Tensor:
    check_tokens(q, k, v, 4)
    wanted = (*q.shape[2:], v.shape[3])
    check(
        states.dim() == 4 and states.shape[1:] == wanted,
        lambda: f"states is {tuple(states.shape)}; it must be (N, H, Dk, Dv) with {wanted}",
    )
    check(
        index.shape == q.shape[:1],
        lambda: f"index is {tuple(index.shape)}; it must be {tuple(q.shape[:1])}",
    )
    return torch.empty_like(v, memory_format=torch.contiguous_format)


_op = kernel_op(
    "pooled_retention",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) states, Tensor index, Tensor? count, "
    "float scale) -> Tensor",
    launch=_launch,
    compute=_compute,
    fake=_fake,
    changes=("states",),
)
