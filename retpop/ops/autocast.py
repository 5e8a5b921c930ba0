"""What autocast does to the ops: it casts their token inputs, and touches nothing inside them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Token inputs in autocast's dtype where autocast is on for their device, else as they are.

    float64 stays, as in torch's own autocast. States and decays do not pass through here: they keep the
    precision that retention needs.
    """
    device = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
    if not autocast_is_on(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in inputs
    )


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device; never for one that has none, such as "meta"."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products keep their inputs' dtype."""
    if autocast_is_on(device.type):
        return torch.autocast(device_type=device.type, enabled=False)
    return nullcontext()
