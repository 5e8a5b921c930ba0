"""The memory of a world model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from retpop import RetNetState


class Memory(NamedTuple):
    """A world model's memory of B games; a value, like `RetNetState`.

    Attributes:
        decoder: the decoder's memory.
        recent: the input of `LocalPast` for the last frames, (B, F - 1, K, width), with F =
            `world_model.local_frames`; 0 where there was no frame. Without local frames it is empty.
    """

    decoder: RetNetState
    recent: Tensor

    def select(self, index: Tensor | slice) -> Memory:
        """Some of the B games, as `RetNetState.select`."""
        return Memory(self.decoder.select(index), self.recent[index])

    @staticmethod
    def cat(memories: Iterable[Memory]) -> Memory:
        """The games of several memories of one model side by side."""
        states, recent = zip(*memories, strict=True)
        return Memory(RetNetState.cat(states), torch.cat(recent))
