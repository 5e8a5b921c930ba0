"""Random actions, one at a time or repeated for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Exploration:
    """Replaces chosen actions by random ones, each of which may be repeated for a while.

    Random actions that change with every step cancel out. Repeated ones cross a board far more often.

    Attributes:
        actions: the random actions under way, an environment each; empty at the start.
        left: the remaining steps of each.
    """

    actions: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def __call__(
        self, chosen: Tensor, num_actions: int, generator: torch.Generator, *, epsilon: float, repeat: int
    ) -> Tensor:
        """The actions to take, (E,) int64, on the device of `chosen`.

        Args:
            chosen: the policy's actions, (E,) int64.
            num_actions: number of actions.
            generator: source of the draws, on the device of `chosen`.
            epsilon: probability that a random action begins where none is active; 1: only random actions.
            repeat: a random action lasts for a number of steps drawn uniformly from 1 to this.
        """
        rows, device = len(chosen), chosen.device
        begins = torch.ones(rows, dtype=torch.bool, device=device)
        if epsilon < 1:
            begins = torch.rand(rows, generator=generator, device=device) < epsilon
        uniform = torch.randint(num_actions, (rows,), generator=generator, device=device)
        if repeat == 1:
            return torch.where(begins, uniform, chosen)
        lengths = torch.randint(1, repeat + 1, (rows,), generator=generator, device=device)
        left = torch.tensor(self.left or [0] * rows, device=device)
        actions = torch.tensor(self.actions or [0] * rows, device=device)
        begins &= left == 0
        actions, left = torch.where(begins, uniform, actions), torch.where(begins, lengths, left)
        taken = torch.where(left > 0, actions, chosen)
        self.actions, self.left = actions.tolist(), (left - 1).clamp(min=0).tolist()
        return taken

    def state(self) -> dict[str, Any]:
        """The current random actions, plain JSON data."""
        return {"actions": self.actions, "left": self.left}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Exploration:
        """The exploration of a `state`."""
        return cls(list(state["actions"]), list(state["left"]))
