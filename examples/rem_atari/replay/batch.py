"""A batch of sequences of steps, as the replay gives it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """n sequences of T steps, each within one episode, on the CPU. Padding is 0 or False throughout.

    Attributes:
        actions: the actions taken, (n, T) int64.
        rewards: the raw rewards that followed, (n, T) float32.
        ended: the episode ended by itself with this step, (n, T) bool.
        truncated: the episode was cut short after this step, (n, T) bool.
        mask: the step is real, not padding, (n, T) bool.
        rows: the step's row in the replay, (n, T) int64; -1 for padding.
        stored: all frames of the replay, (capacity, S, S, 3) uint8, not copied.
    """

    actions: Tensor
    rewards: Tensor
    ended: Tensor
    truncated: Tensor
    mask: Tensor
    rows: Tensor
    stored: Tensor

    @property
    def frames(self) -> Tensor:
        """The frames acted on, (n, T, S, S, 3) uint8, copied on access; not needed with cached tokens."""
        frames = self.stored.index_select(0, self.rows.clamp(min=0).flatten()).unflatten(0, self.rows.shape)
        frames[~self.mask] = 0
        return frames

    def select(self, indices: list[int]) -> SequenceBatch:
        """Some of the n sequences, in the order given."""
        columns = [column.name for column in fields(self) if column.name != "stored"]
        return replace(self, **{name: getattr(self, name)[indices] for name in columns})
