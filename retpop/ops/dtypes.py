"""Dtypes of inputs, of states, and under autocast: rules that all parts share.

Autocast casts token inputs and nothing inside the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

INPUT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

DECAY_DTYPES = (torch.float32, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_state(q: Tensor, v: Tensor, rows: int) -> Tensor:
    """The state before any token, (rows, H, Dk, Dv)."""
    return q.new_zeros(rows, *q.shape[2:], v.shape[-1], dtype=state_dtype(q.dtype))


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which outputs of tokens in ``dtype`` go to the norm that follows them.

    float16 goes in float32, because sums over many tokens exceed its range; the norm scales them back.
    """
    return torch.float32 if dtype == torch.float16 else dtype


class Inputs(NamedTuple):
    """The properties that decide which backend can run.

    Attributes:
        device, dtype: of the tokens, after autocast.
        key_dim, value_dim: of a head.
    """

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int


def outside_autocast(run: Callable[..., Result], *tokens: Tensor) -> Result:
    """``run`` of token inputs cast by autocast, with autocast off inside."""
    device = tokens[0].device
    if not autocast_is_on(device.type):
        return run(*tokens)
    tokens = cast_inputs(*tokens)
    with without_autocast(device):
        return run(*tokens)


def cast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Token inputs in autocast's dtype if autocast is on for their device, else unchanged.

    float64 stays, as in torch's own autocast. States and decays are not cast: they keep the precision that
    retention needs.
    """
    first = inputs[0]  # all share a device, or the checks that follow refuse them
    if not isinstance(first, Tensor) or not autocast_is_on(first.device.type):
        return inputs
    return tuple(x.to(dtype_after(x.device, x.dtype)) if isinstance(x, Tensor) else x for x in inputs)


def dtype_after(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that `cast_inputs` gives to inputs of ``dtype`` on ``device``."""
    if not autocast_is_on(device.type) or not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device.type)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device; False for one without autocast, such as "meta"."""
    # The query whether the device has autocast is slowest, and torch 2.9 does not compile it.
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return has_autocast and torch.is_autocast_enabled(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products keep their inputs' dtype."""
    if autocast_is_on(device.type):
        return torch.autocast(device_type=device.type, enabled=False)
    return nullcontext()
