"""Dropout, with cheap random numbers on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from retpop.arguments import values_are_free


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """In training, zero each element with probability p and divide the others by 1 - p; else return x.

    In eager mode on a CPU the mask uses 16 random bits per element, so p is rounded to a multiple of 2^-16.
    This is about three times as fast as torch's dropout, which draws a double per element.

    Source: Srivastava et al. 2014.
    """
    if not training or not 0 < p < 1 or not values_are_free(x):
        return F.dropout(x, p, training)
    with torch.no_grad():
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2^15 .. 2^15 - 1
        factor = torch.ge(
            bits, round(p * 2**16) - 2**15, out=torch.empty_like(x, memory_format=torch.contiguous_format)
        )
        factor.mul_(1 / (1 - p))
    return x * factor
