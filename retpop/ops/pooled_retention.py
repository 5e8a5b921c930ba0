"""Decoding from a pool of states that is changed in place: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from retpop.arguments import (
    Inputs,
    cast_inputs,
    check_tensor,
    free_values,
    state_dtype,
    without_autocast,
)
from retpop.ops import triton_backend
from retpop.ops.checks import Named, check_decay_values, check_inputs, check_log_decay, check_scale
from retpop.ops.dispatch import choose_backend
from retpop.ops.pool import through_states
from retpop.ops.powers import DecayPowers, default_scale

WHERE = "pooled_retention()"


def pooled_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    index: Tensor,
    *,
    count: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Retention of the next tokens of some sequences, whose states lie in a pool and are changed there.

    For serving: no state is copied, and a CUDA graph can be replayed for other rows of the pool. Every other
    function of this library leaves its arguments as they are.

    A call with a ``count`` of zeros looks ahead and changes no state. So draft tokens are verified by one
    call, and a second call with the same tokens and the numbers of accepted ones takes these in: the states
    are then those after the last accepted token.

    Args:
        q, k: queries and keys, (B, T, H, Dk), float64, float32, float16 or bfloat16; T is a few tokens.
        v: values, (B, T, H, Dv), of the same dtype.
        log_decay: ln γ per head, (H,), float32 or float64, at most 0; -inf is γ = 0.
        states: the pool, (N, H, Dk, Dv), float32 (float64 with float64 inputs), not expanded.
        index: the place of each row's state in the pool, (B,), int32 or int64; no place may occur twice. -1
            marks a row that is padding: it has no state, and outputs of zero.
        count: how many of each row's tokens its state takes in, (B,), int32 or int64, from 0 to T; None: all.
            Outputs are of all T tokens.
        scale: c; None: Dk^-0.5.
        backend: "auto", "torch", "triton" or "reference"; see `retpop.explain_backend`. Only "triton" leaves
            index and count on the GPU, so only it can be captured in a CUDA graph.

    Returns:
        out: (B, T, H, Dv), in v's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what was wanted.
            Values of index and count are checked on a CPU only.
        RuntimeError: the named backend cannot run here, or a gradient is wanted, which there is not.

    Source: RetNet, arXiv 2307.08621, equation 6.
    """
    q, k, v = cast_inputs(q, k, v)
    check_inputs(WHERE, Named("q", q), Named("k", k), Named("v", v), "BTHD")
    check_log_decay(WHERE, log_decay, q)
    values = check_decay_values(WHERE, log_decay)
    check_scale(WHERE, scale)
    _check_states(states, q, v)
    _check_numbers("index", index, q, -1, states.shape[0] - 1)
    places = free_values(index)
    if places is not None:
        named = [place for place in places if place >= 0]
        if len(set(named)) < len(named):
            raise ValueError(f"{WHERE}: index names a place twice in {places}; each row needs its own.")
    if count is not None:
        _check_numbers("count", count, q, 0, q.shape[1])
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, log_decay, states)):
        raise RuntimeError(
            f"{WHERE} has no gradient, because it changes states in place; call it under torch.no_grad(), "
            "or use retention()."
        )
    chosen, _ = choose_backend(WHERE, backend, Inputs(q.device, q.dtype, q.shape[-1], v.shape[-1]))
    powers = DecayPowers(log_decay, default_scale(scale, q.shape[-1]), state_dtype(q.dtype), values)
    with without_autocast(q.device):
        if chosen is triton_backend:
            return triton_backend.pooled_retention(q, k, v, powers, states, index, count)
        return through_states(chosen.retention, q, k, v, powers, states, index, count)


def _check_states(states: Tensor, q: Tensor, v: Tensor) -> None:
    check_tensor(WHERE, "states", states)
    wanted = (*q.shape[2:], v.shape[3])
    if states.dim() != 4 or tuple(states.shape[1:]) != wanted:
        raise ValueError(
            f"{WHERE}: states has shape {tuple(states.shape)}; it must be (N, H, Dk, Dv) with "
            f"(H, Dk, Dv) = {wanted}."
        )
    if states.dtype != state_dtype(q.dtype):
        raise TypeError(
            f"{WHERE}: states is {states.dtype}; with inputs in {q.dtype} it must be {state_dtype(q.dtype)}."
        )
    if states.device != q.device:
        raise ValueError(f"{WHERE}: states is on {states.device} but q is on {q.device}.")
    if any(size > 1 and stride == 0 for size, stride in zip(states.shape, states.stride(), strict=True)):
        raise ValueError(
            f"{WHERE}: states has strides {states.stride()}; no two elements of what is changed in place may "
            "share memory, as those of an expanded tensor do."
        )


def _check_numbers(name: str, numbers: Tensor, q: Tensor, least: int, most: int) -> None:
    """Check one integer a row of the batch, from ``least`` to ``most``."""
    check_tensor(WHERE, name, numbers)
    if numbers.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{WHERE}: {name} is {numbers.dtype}; it must be int32 or int64.")
    if tuple(numbers.shape) != (q.shape[0],):
        raise ValueError(
            f"{WHERE}: {name} has shape {tuple(numbers.shape)}; it must be (B,) = ({q.shape[0]},)."
        )
    if numbers.device != q.device:
        raise ValueError(f"{WHERE}: {name} is on {numbers.device} but q is on {q.device}.")
    for value in free_values(numbers) or ():
        if not least <= value <= most:
            raise ValueError(f"{WHERE}: {name} holds {value}; it must be {least} to {most}.")
