"""What autocast does to the ops: it casts their token inputs, and touches nothing inside them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def outside_autocast(run: Callable[..., Result], *tokens: Tensor) -> Result:
    """``run`` of token inputs as autocast casts them, with its own products left alone."""
    device = tokens[0].device
    if not autocast_is_on(device.type):
        return run(*tokens)
    tokens = cast_inputs(*tokens)
    with without_autocast(device):
        return run(*tokens)


def cast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Token inputs in autocast's dtype where autocast is on for their device, else as they are.

    float64 stays, as in torch's own autocast. States and decays do not pass through here: they keep the
    precision that retention needs.
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
    """Whether autocast is on for a type of device; never for one that has none, such as "meta"."""
    # Asking whether there is one takes longest, and torch 2.9 does not compile it.
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return has_autocast and torch.is_autocast_enabled(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products keep their inputs' dtype."""
    if autocast_is_on(device.type):
        return torch.autocast(device_type=device.type, enabled=False)
    return nullcontext()
