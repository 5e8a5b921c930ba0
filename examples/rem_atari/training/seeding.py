"""Independent random streams from a run's one seed, and the state of all random sources."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rem_atari.replay.buffer import Replay


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


@dataclass(frozen=True)
class RandomState:
    """The states of all random sources.

    Attributes:
        tensors: torch's generators, by name.
        data: all others, plain JSON data.
    """

    tensors: dict[str, Tensor]
    data: dict[str, Any]


class RandomSources:
    """The global generators of torch (of the CPU, and of the device), numpy and Python, and the run's own.

    Args:
        device: the run's device.
        generators: the run's own generators of torch, by purpose.
        replay: whose sampling has a generator too.
    """

    def __init__(self, device: str, generators: Mapping[str, torch.Generator], replay: Replay) -> None:
        self._device = torch.device(device)
        self._generators = dict(generators)
        self._replay = replay

    def __getitem__(self, purpose: str) -> torch.Generator:
        """The run's own generator for a purpose."""
        return self._generators[purpose]

    def snapshot(self) -> RandomState:
        """The states of all sources now. Takes microseconds and waits for no device."""
        tensors = {name: generator.get_state() for name, generator in self._generators.items()}
        tensors["torch"] = torch.get_rng_state()
        if self._device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(self._device)
        numpy_state = np.random.get_state(legacy=False)
        numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
        version, words, gauss = random.getstate()
        data = {
            "replay": self._replay.sampling_state(),
            "numpy": numpy_state,
            "python": [version, list(words), gauss],
        }
        return RandomState(tensors, data)

    def restore(self, state: RandomState) -> None:
        """Restore all sources to a `snapshot`.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: the state is not one of these sources.
        """
        for name, generator in self._generators.items():
            generator.set_state(state.tensors[name])
        torch.set_rng_state(state.tensors["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors["cuda"], self._device)
        self._replay.set_sampling_state(state.data["replay"])
        numpy_state = state.data["numpy"]
        key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
        version, words, gauss = state.data["python"]
        random.setstate((version, tuple(words), gauss))
