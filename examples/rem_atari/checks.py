"""Checks of arguments of the Python interface."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def check_seed(caller: str, seed: int) -> None:
    """Check a seed.

    Raises:
        ValueError: it is no integer, or negative.
    """
    if not is_integer(seed) or seed < 0:
        raise ValueError(f"{caller}: seed is {seed!r}; wanted an integer of at least 0.")


def check_count(caller: str, name: str, count: int) -> None:
    """Check a number of things.

    Raises:
        ValueError: it is no integer, or below 1.
    """
    if not is_integer(count) or count < 1:
        raise ValueError(f"{caller}: {name} is {count!r}; wanted an integer of at least 1.")


def check_temperature(caller: str, temperature: float) -> None:
    """Check the temperature of a draw.

    Raises:
        ValueError: it is no number, infinite, NaN or negative.
    """
    is_number = isinstance(temperature, int | float | np.number) and not isinstance(temperature, bool)
    if not is_number or not 0 <= temperature < math.inf:
        raise ValueError(f"{caller}: temperature is {temperature!r}; wanted a finite number of at least 0.")


def rows_of(caller: str, indices: ArrayLike) -> np.ndarray:
    """Indices of rows, an integer or (n,), as int64 (n,).

    Raises:
        ValueError: they are no integers. A mask is refused: read as integers it would mean rows 0 and 1.
    """
    given = np.asarray(indices)
    if given.ndim > 1 or (given.size > 0 and given.dtype.kind not in "iu"):
        raise ValueError(f"{caller}: indices is {indices!r}; wanted an integer, or a sequence of them.")
    return np.atleast_1d(given).astype(np.int64)


def is_integer(value: object) -> bool:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
