"""The state of a retention layer or decoder: a value that goes in and comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class RetNetState:
    """All that a retention stack remembers of the tokens it has seen.

    Attributes:
        kv: (layers, B, H, Dk, Dv), float32 (float64 for a model in float64); a single layer's state has
            layers = 1.
        position: (B,), int64, the number of tokens each row has seen, which is its next token's position.

    A state is never changed in place: every method returns a new one. It is a registered pytree, so that
    ``torch.func``, ``torch.compile`` and ``torch.utils._pytree.tree_map`` see through it.
    """

    kv: Tensor
    position: Tensor

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.position.shape[0]

    def select(self, index: Tensor | slice) -> RetNetState:
        """The rows that ``index`` picks: a 1-D index tensor, a bool mask (B,) or a slice."""
        if isinstance(index, slice):
            return RetNetState(self.kv[:, index], self.position[index])
        if not isinstance(index, Tensor):
            raise TypeError(
                f"RetNetState.select(): index is {type(index).__name__}; "
                "it must be a 1-D index tensor, a bool mask or a slice."
            )
        if index.dim() != 1 or index.is_floating_point() or index.is_complex():
            raise ValueError(
                f"RetNetState.select(): index has shape {tuple(index.shape)} and dtype {index.dtype}; "
                "it must be a 1-D tensor of integers or a bool mask."
            )
        if index.dtype == torch.bool and index.shape[0] != self.batch_size:
            raise ValueError(
                f"RetNetState.select(): mask has {index.shape[0]} rows but the state has {self.batch_size}."
            )
        index = index.to(self.kv.device)
        return RetNetState(self.kv[:, index], self.position[index])

    def reset(self, mask: Tensor) -> RetNetState:
        """The state with the rows of ``mask`` (B,), bool, as if they had seen nothing yet."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"RetNetState.reset(): mask is {got}; it must be a bool tensor.")
        if mask.shape != self.position.shape:
            raise ValueError(
                f"RetNetState.reset(): mask has shape {tuple(mask.shape)}; it must be ({self.batch_size},)."
            )
        mask = mask.to(self.kv.device)
        # `where`, not a product: 0 * NaN would keep a NaN alive.
        kv = torch.where(mask[None, :, None, None, None], torch.zeros_like(self.kv), self.kv)
        return RetNetState(kv, torch.where(mask, torch.zeros_like(self.position), self.position))

    def detach(self) -> RetNetState:
        """The same state, cut off from the graph that computed it."""
        return RetNetState(self.kv.detach(), self.position)

    def to(self, device: torch.device | str) -> RetNetState:
        """The same state on another device; its dtypes stay."""
        return RetNetState(self.kv.to(device), self.position.to(device))

    @staticmethod
    def cat(states: Sequence[RetNetState]) -> RetNetState:
        """States of the same model joined along the batch."""
        states = list(states)
        if not states:
            raise ValueError("RetNetState.cat(): states is empty; at least one state is needed.")
        kv_shapes = {(state.kv.shape[0], *state.kv.shape[2:]) for state in states}
        if len(kv_shapes) > 1:
            raise ValueError(
                "RetNetState.cat(): states differ in (layers, H, Dk, Dv): "
                + ", ".join(str(tuple(shape)) for shape in sorted(kv_shapes))
                + "."
            )
        kv = torch.cat([state.kv for state in states], dim=1)
        return RetNetState(kv, torch.cat([state.position for state in states]))


pytree.register_pytree_node(
    RetNetState,
    lambda state: ([state.kv, state.position], None),
    lambda leaves, _: RetNetState(*leaves),
    serialized_type_name="retpop.RetNetState",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
)
