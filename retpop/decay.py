"""Decay schedules: how fast each head forgets.

A decay is passed around as ``log_decay``, ln γ per head, because γ itself cannot be stored in low precision:
in bfloat16, 1 - 1/512 is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retpop.arguments import check_num_heads

SCHEDULES = ("retnet", "log_spaced")


def retnet_decay(num_heads: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet's decay: γ_h = 1 - 2^(-5-h), one time scale a head, each twice as long as the one before.

    Args:
        num_heads: number of heads H, at least 1.
        dtype: of the result; computed in float64.

    Returns:
        ln γ per head, (H,), on the CPU.

    Raises:
        TypeError, ValueError: num_heads is not an int of at least 1.

    Source: RetNet, arXiv 2307.08621, section 2.2 (multi-scale retention).
    """
    check_num_heads("retnet_decay()", num_heads)
    exponents = -5.0 - torch.arange(num_heads, dtype=torch.float64, device="cpu")
    return torch.log1p(-torch.exp2(exponents)).to(dtype)


def log_spaced_decay(
    num_heads: int, longest: float = 512, shortest: float = 32, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Time scales spaced evenly in their logarithm: γ_h = 1 - exp(linspace(-ln shortest, -ln longest, H)).

    Args:
        num_heads: number of heads H, at least 1.
        longest: time scale of the last head in tokens, at least 1.
        shortest: time scale of the first head in tokens, at least 1.
        dtype: of the result; computed in float64.

    Returns:
        ln γ per head, (H,), on the CPU.

    Raises:
        TypeError, ValueError: an argument is not a number, or out of range.

    Source: REM's world model, arXiv 2402.05643, section 3.
    """
    where = "log_spaced_decay()"
    check_num_heads(where, num_heads)
    for name, value in (("longest", longest), ("shortest", shortest)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{where}: {name} is {value!r}; it must be a number of tokens.")
        if not (math.isfinite(value) and value >= 1):
            raise ValueError(f"{where}: {name} is {value}; it must be finite and at least 1 token.")
    slowest, fastest = -math.log(longest), -math.log(shortest)
    rates = torch.linspace(fastest, slowest, num_heads, dtype=torch.float64, device="cpu")
    return torch.log1p(-torch.exp(rates)).to(dtype)


def resolve_decay(decay: str | Sequence[float], num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The log-decays that ``RetNetConfig.decay`` names: a schedule, or the values themselves.

    Args:
        decay: "retnet", "log_spaced" or ``num_heads`` log-decays, each at most 0.
        num_heads: number of heads H.
        dtype: of the result; the schedules are computed in float64.

    Returns:
        ln γ per head, (H,), on the CPU.
    """
    if decay == "retnet":
        return retnet_decay(num_heads, dtype=dtype)
    if decay == "log_spaced":
        return log_spaced_decay(num_heads, dtype=dtype)
    return torch.tensor(decay, dtype=torch.float64, device="cpu").to(dtype)
