"""Drawing from categorical distributions with an explicit generator and without waiting for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDING = 1e-6
"""More than the rounding error of a sum of probabilities in float32."""


def sample_categorical(logits: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> Tensor:
    """One draw from every row of `logits` (..., classes), as int64 indices (...).

    By inversion: the first class at which the cumulated probabilities exceed a uniform number. That takes one
    random number a row, where the Gumbel-max trick takes one a class. No gradient flows, and the host never
    waits for the result.

    Args:
        logits: unnormalised log-probabilities, (..., classes), any floating dtype.
        generator: source of the numbers, on the device of `logits`.
        temperature: the logits are divided by it; 0: the most likely class.

    Raises:
        ValueError: `temperature` is below 0, infinite or NaN.
    """
    _check_temperature("sample_categorical", temperature)
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulated = (logits.detach().float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    shape = (*logits.shape[:-1], 1)
    drawn = torch.rand(shape, generator=generator, device=logits.device) * cumulated[..., -1:]
    # A NaN would give an index out of range; clamped, it reaches the check of the loss instead.
    return torch.searchsorted(cumulated, drawn, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def sample_coupled(
    logits: Tensor, before: Tensor, generator: torch.Generator, *, temperature: float = 1.0
) -> Tensor:
    """One draw from each of K distributions in every row, all K by one uniform number.

    Each inverts its cumulated probabilities with the class `before` ordered first, so the draws of a row tend
    to keep or to change their classes together. Each single draw has the distribution of its logits. No
    gradient flows, and the host never waits for the result.

    Args:
        logits: unnormalised log-probabilities, (B, K, classes), any floating dtype.
        before: the class that comes first in each distribution, (B, K) int64.
        generator: source of the numbers, on the device of `logits`.
        temperature: the logits are divided by it; 0: the most likely classes.

    Returns:
        (B, K) int64.

    Raises:
        ValueError: `temperature` is below 0, infinite or NaN.
    """
    _check_temperature("sample_coupled", temperature)
    if temperature == 0:
        return logits.argmax(dim=-1)
    chances = (logits.detach().float() / temperature).softmax(dim=-1)
    first = before[..., None]
    stays = chances.gather(-1, first)
    cumulated = chances.scatter(-1, first, 0.0).cumsum(dim=-1)
    uniform = torch.rand((logits.shape[0], 1, 1), generator=generator, device=logits.device)
    # Below the last sum despite rounding, so that no class of probability 0 is drawn.
    beyond = torch.minimum((uniform - stays).clamp(min=0), cumulated[..., -1:] * (1 - ROUNDING))
    others = torch.searchsorted(cumulated, beyond, right=True).clamp(max=logits.shape[-1] - 1)
    return torch.where(uniform < stays, first, others).squeeze(-1)


def _check_temperature(caller: str, temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{caller}(): temperature is {temperature}; wanted a finite number of at least 0.")
