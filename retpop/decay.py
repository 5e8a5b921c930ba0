"""Decay schedules: how fast each head forgets.

A decay is passed around as ``log_decay``, ln γ per head, because γ itself cannot be stored in low precision:
in bfloat16, 1 - 1/512 is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCHEDULES = ("retnet", "log_spaced")


def retnet_decay(num_heads: int) -> Tensor:
    """RetNet's decay: γ_h = 1 - 2^(-5-h), one time scale a head, each twice as long as the one before.

    Args:
        num_heads: number of heads H, at least 1.

    Returns:
        ln γ per head, (H,), float32.

    Source: RetNet, arXiv 2307.08621, section 2.2 (multi-scale retention).
    """
    return _retnet(num_heads).float()


def log_spaced_decay(num_heads: int, longest: float = 512, shortest: float = 32) -> Tensor:
    """Time scales spaced evenly in their logarithm: γ_h = 1 - exp(linspace(-ln shortest, -ln longest, H)).

    Args:
        num_heads: number of heads H, at least 1.
        longest: time scale of the last head in tokens, at least 1.
        shortest: time scale of the first head in tokens, at least 1.

    Returns:
        ln γ per head, (H,), float32.

    Source: REM's world model, arXiv 2402.05643.
    """
    return _log_spaced(num_heads, longest, shortest).float()


def resolve_decay(decay: str | Sequence[float], num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The log-decays that ``RetNetConfig.decay`` names: a schedule, or the values themselves.

    Args:
        decay: "retnet", "log_spaced" or ``num_heads`` log-decays, each at most 0.
        num_heads: number of heads H.
        dtype: float32, or float64 for a model in float64; the values are computed in float64 first.

    Returns:
        ln γ per head, (H,), on the CPU.
    """
    if decay == "retnet":
        return _retnet(num_heads).to(dtype)
    if decay == "log_spaced":
        return _log_spaced(num_heads, 512, 32).to(dtype)
    return torch.tensor(decay, dtype=torch.float64, device="cpu").to(dtype)


def _retnet(num_heads: int) -> Tensor:
    _check_num_heads("retnet_decay", num_heads)
    exponents = -5.0 - torch.arange(num_heads, dtype=torch.float64, device="cpu")
    return torch.log1p(-torch.exp2(exponents))


def _log_spaced(num_heads: int, longest: float, shortest: float) -> Tensor:
    _check_num_heads("log_spaced_decay", num_heads)
    for name, value in (("longest", longest), ("shortest", shortest)):
        if not (math.isfinite(value) and value >= 1):
            raise ValueError(
                f"log_spaced_decay(): {name} is {value}; it must be finite and at least 1 token."
            )
    rates = torch.linspace(
        -math.log(shortest), -math.log(longest), num_heads, dtype=torch.float64, device="cpu"
    )
    return torch.log1p(-torch.exp(rates))


def _check_num_heads(function: str, num_heads: int) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{function}(): num_heads is {num_heads!r}; it must be an int.")
    if num_heads < 1:
        raise ValueError(f"{function}(): num_heads is {num_heads}; it must be at least 1.")
