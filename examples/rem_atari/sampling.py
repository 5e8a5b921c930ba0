"""Drawing from categorical distributions with an explicit generator and without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_categorical(logits: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> Tensor:
    """One draw from every row of `logits` (..., classes), as int64 indices (...).

    The Gumbel-max trick: -log of exponential noise is Gumbel noise, and the argmax of logits plus Gumbel
    noise is a draw from the softmax. No gradient flows, and the host never waits for the result.

    Args:
        logits: unnormalised log-probabilities, (..., classes), any floating dtype.
        generator: source of the noise, on the device of `logits`.
        temperature: the logits are divided by it; above 0.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"sample_categorical(): temperature is {temperature}; it must be above 0.")
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    noise.exponential_(generator=generator)
    return (logits.detach().float() / temperature - noise.log()).argmax(dim=-1)
