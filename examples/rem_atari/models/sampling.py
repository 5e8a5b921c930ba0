"""Drawing from categorical distributions with an explicit generator and without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_categorical(logits: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> Tensor:
    """One draw from every row of `logits` (..., classes), as int64 indices (...).

    By inversion: the first class at which the cumulated probabilities exceed a uniform number. That takes one
    random number a row, where the Gumbel-max trick takes one a class. No gradient flows, and the host never
    waits for the result.

    Args:
        logits: unnormalised log-probabilities, (..., classes), any floating dtype.
        generator: source of the numbers, on the device of `logits`.
        temperature: the logits are divided by it; above 0.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"sample_categorical(): temperature is {temperature}; it must be above 0.")
    cumulated = (logits.detach().float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    shape = (*logits.shape[:-1], 1)
    drawn = torch.rand(shape, generator=generator, device=logits.device) * cumulated[..., -1:]
    # NaN would be found nowhere: whoever checks the loss is to meet it, not whoever looks an index up.
    return torch.searchsorted(cumulated, drawn, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
