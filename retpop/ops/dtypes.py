"""Which dtypes go in, and which dtype a state has: rules that checks, backends and layers share."""

from __future__ import annotations

from typing import NamedTuple

import torch

INPUT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

DECAY_DTYPES = (torch.float32, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    """What decides which backend can run.

    Attributes:
        device, dtype: of the tokens, after autocast.
        key_dim, value_dim: of a head.
    """

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
