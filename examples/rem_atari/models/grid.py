"""The square of places that the tokens of an observation stand for, row by row."""

from __future__ import annotations

from math import isqrt


def side_of(num_tokens: int) -> int:
    """The side of the square.

    Raises:
        ValueError: `num_tokens` is no square number of at least 1.
    """
    side = isqrt(max(num_tokens, 0))
    if num_tokens < 1 or side**2 != num_tokens:
        raise ValueError(f"num_tokens is {num_tokens}; wanted a square number, for the places of a frame.")
    return side
