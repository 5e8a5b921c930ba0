"""One seed of a run, many independent streams."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose of a run: independent of every other purpose's, the same in every process.

    Args:
        seed: the run's seed, at least 0.
        purpose: what it is for, for example ``"evaluation", epoch``.
    Returns:
        An integer in [0, 2**63).
    """
    key = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in purpose]
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
