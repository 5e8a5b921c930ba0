"""Decay schedules: how fast each head forgets.

Decays are ``log_decay``, ln γ per head, because γ itself cannot be stored in low precision: in bfloat16,
1 - 1/512 is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retpop.arguments import as_float, check_num_heads

SCHEDULES = ("retnet", "log_spaced")


def retnet_decay(num_heads: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet's decay: γ_h = 1 - 2^(-5-h), one time scale per head, each twice as long as the one before.

    Args:
        num_heads: number of heads H, at least 1.
        dtype: of the result; computed in float64.

    Returns:
        ln γ per head, (H,), on the CPU.

    Raises:
        TypeError, ValueError: num_heads is not an int of at least 1, or dtype is not a floating-point dtype.

    Source: RetNet, arXiv 2307.08621, section 2.2 (multi-scale retention).
    """
    where = "retnet_decay()"
    check_num_heads(where, num_heads)
    _check_dtype(where, dtype)
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
    _check_dtype(where, dtype)
    for name, value in (("longest", longest), ("shortest", shortest)):
        if not 1 <= as_float(where, name, value) < math.inf:
            raise ValueError(f"{where}: {name} is {value}; it must be finite and at least 1 token.")
    slowest, fastest = -math.log(longest), -math.log(shortest)
    rates = torch.linspace(fastest, slowest, num_heads, dtype=torch.float64, device="cpu")
    return torch.log1p(-torch.exp(rates)).to(dtype)


def check_log_decays(where: str, name: str, values: object, num_heads: int) -> tuple[float, ...]:
    """``values`` as a tuple of ``num_heads`` log-decays; ``where`` begins an error's message.

    Raises:
        TypeError, ValueError: they are not a sequence of one number per head, or one is above 0 or NaN.
    """
    if not isinstance(values, list | tuple):
        raise TypeError(f"{where}: {name} holds {values!r}; it must hold {num_heads} log-decays.")
    numbers = tuple(as_float(where, name, value) for value in values)
    if len(numbers) != num_heads:
        raise ValueError(f"{where}: {name} has {len(numbers)} log-decays but num_heads is {num_heads}.")
    for value in numbers:
        if not value <= 0:  # also catches NaN
            raise ValueError(f"{where}: {name} holds {value}; a log-decay must be at most 0.")
    return numbers


def _check_dtype(where: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{where}: dtype is {dtype!r}; it must be a floating-point torch.dtype.")
