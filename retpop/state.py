"""The state of a retention layer or decoder: a value that goes in and comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retpop._torch import pytree
from retpop.arguments import check_mapping, check_tensor, values_are_free


class Uncast:
    """Protects a state's kv from FSDP's mixed precision.

    FSDP casts the tensors that it finds in dataclasses, and in backward waits for their gradients. So it must
    find kv, and `before_cast` restores the uncast one.
    """

    __slots__ = ("kv",)

    def __init__(self, kv: Tensor | None) -> None:
        self.kv = kv

    def before_cast(self, found: Tensor | None) -> Tensor | None:
        """``found``, or the kv from which it was cast; a state never has 16 bits."""
        return self.kv if found is not None and found.dtype in (torch.float16, torch.bfloat16) else found


@dataclass(frozen=True, eq=False)
class RetNetState:
    """The memory of a retention stack: all that it keeps of earlier tokens.

    Attributes:
        kv: (layers, B, H, Dk, Dv), float32 (float64 for a model in float64); a single layer's state has
            layers = 1.
        position: (B,), int64, the number of tokens each row has seen, which is its next token's position.

    Every method returns a new state and changes none in place. Old and new may share memory, so do not write
    into a state. It is a registered pytree, so ``torch.func``, ``torch.compile``, ``torch.export`` and
    ``torch.utils._pytree.tree_map`` trace it, and ``torch.load`` reads it safely. FSDP's mixed precision does
    not cast it.

    Raises:
        TypeError: kv or position is not a tensor.
    """

    kv: Tensor
    position: Tensor
    _uncast: Uncast | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_tensor("RetNetState", "kv", self.kv)
        check_tensor("RetNetState", "position", self.position)
        if not torch.compiler.is_compiling():
            if self._uncast is not None:  # FSDP makes a new state from the fields
                object.__setattr__(self, "kv", self._uncast.before_cast(self.kv))
            object.__setattr__(self, "_uncast", Uncast(self.kv))

    def __reduce__(self) -> tuple[type[RetNetState], tuple[Tensor, Tensor]]:
        return RetNetState, (self.kv, self.position)

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.position.shape[0]

    def select(self, index: Tensor | slice) -> RetNetState:
        """The rows that ``index`` selects; keeps the batch dimension.

        Args:
            index: a 1-D tensor of int32 or int64, a bool mask (B,), or a slice.

        Raises:
            TypeError, ValueError: index is something else, or the mask has another number of rows.
        """
        where = "RetNetState.select()"
        if isinstance(index, slice):
            return RetNetState(self.kv[:, index], self.position[index])
        check_tensor(where, "index", index)
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64, torch.bool):
            raise ValueError(
                f"{where}: index has shape {tuple(index.shape)} and dtype {index.dtype}; "
                "it must be a 1-D tensor of int32 or int64, or a bool mask."
            )
        if index.dtype == torch.bool and index.shape[0] != self.batch_size:
            raise ValueError(f"{where}: mask has {index.shape[0]} rows but the state has {self.batch_size}.")
        if index.dtype != torch.bool and values_are_free(index):
            size = self.batch_size
            wrong = index[(index < -size) | (index >= size)]
            if len(wrong):
                raise ValueError(f"{where}: index holds {wrong[0].item()} but the state has {size} rows.")
        index = index.to(self.kv.device)
        return RetNetState(self.kv[:, index], self.position[index])

    def reset(self, mask: Tensor) -> RetNetState:
        """The state with the rows of ``mask`` reset to the start of a sequence.

        Args:
            mask: (B,), bool.

        Raises:
            TypeError, ValueError: mask is not a bool tensor of B rows.
        """
        where = "RetNetState.reset()"
        check_tensor(where, "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{where}: mask is {mask.dtype}; it must be a bool tensor.")
        if mask.shape != self.position.shape:
            raise ValueError(f"{where}: mask has shape {tuple(mask.shape)}; it must be ({self.batch_size},).")
        mask = mask.to(self.kv.device)
        # `where`, not a product: 0 * NaN would keep a NaN alive.
        kv = torch.where(mask[None, :, None, None, None], torch.zeros_like(self.kv), self.kv)
        return RetNetState(kv, torch.where(mask, torch.zeros_like(self.position), self.position))

    def detach(self) -> RetNetState:
        """The same state, detached from the graph that computed it."""
        return RetNetState(self.kv.detach(), self.position)

    def to(self, device: torch.device | str | int, *, non_blocking: bool | None = None) -> RetNetState:
        """The same state on another device; its dtypes stay.

        Args:
            device: the target.
            non_blocking: as in ``torch.Tensor.to``; if it is given, device may be None for the current one
                (accelerate's hooks pass that).

        Raises:
            TypeError: device is not a device.
        """
        if device is None and non_blocking is not None:
            return self
        if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
            raise TypeError(
                f"RetNetState.to(): device is {device!r}; it must be a device (a state keeps its dtypes)."
            )
        kv, position = (
            x.to(device=device, non_blocking=bool(non_blocking)) for x in (self.kv, self.position)
        )
        return RetNetState(kv, position)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as named tensors, detached and contiguous, for ``torch.save`` or safetensors."""
        return {"kv": self.kv.detach().contiguous(), "position": self.position.contiguous()}

    @staticmethod
    def from_state_dict(saved: Mapping[str, Tensor]) -> RetNetState:
        """The state of a `state_dict`.

        Raises:
            TypeError, ValueError: saved has other names, or a tensor of another shape or kind.
        """
        where = "RetNetState.from_state_dict()"
        check_mapping(where, "saved", saved)
        if set(saved) != {"kv", "position"}:
            raise ValueError(f"{where}: saved has the names {sorted(saved)}; they must be kv and position.")
        kv, position = saved["kv"], saved["position"]
        check_tensor(where, "kv", kv)
        check_tensor(where, "position", position)
        if kv.dim() != 5 or kv.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{where}: kv is {tuple(kv.shape)} in {kv.dtype}; it must be (layers, B, H, Dk, Dv) in "
                "float32 or float64."
            )
        if position.shape != (kv.shape[1],) or position.dtype != torch.int64:
            raise ValueError(
                f"{where}: position is {tuple(position.shape)} in {position.dtype}; beside kv "
                f"{tuple(kv.shape)} it must be ({kv.shape[1]},) in torch.int64."
            )
        return RetNetState(kv, position)

    @staticmethod
    def cat(states: Iterable[RetNetState]) -> RetNetState:
        """States of the same model joined along the batch.

        Raises:
            TypeError, ValueError: states is empty, holds something else, or they differ in more than B.
        """
        where = "RetNetState.cat()"
        if not isinstance(states, Iterable):
            raise TypeError(f"{where}: states is {type(states).__name__}; it must be a sequence of states.")
        states = list(states)
        for state in states:
            if not isinstance(state, RetNetState):
                raise TypeError(f"{where}: states holds {type(state).__name__}; it must hold RetNetStates.")
        if not states:
            raise ValueError(f"{where}: states is empty; at least one state is needed.")
        kinds = {
            f"(layers, H, Dk, Dv) {(state.kv.shape[0], *state.kv.shape[2:])}, {state.kv.dtype} "
            f"on {state.kv.device}"
            for state in states
        }
        if len(kinds) > 1:
            raise ValueError(f"{where}: states differ in more than B: {'; '.join(sorted(kinds))}.")
        kv = torch.cat([state.kv for state in states], dim=1)
        return RetNetState(kv, torch.cat([state.position for state in states]))


def _unflatten(leaves: Iterable[Any], _: None) -> RetNetState:
    """A state of any two leaves: pytrees also hold shapes, dimensions or None in place of tensors."""
    state = object.__new__(RetNetState)
    for name, leaf in zip(("kv", "position"), leaves, strict=True):
        object.__setattr__(state, name, leaf)
    return state


pytree.register_pytree_node(
    RetNetState,
    lambda state: ([state.kv, state.position], None),
    _unflatten,
    serialized_type_name="retpop.RetNetState",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
    flatten_with_keys_fn=lambda state: (
        [(pytree.GetAttrKey("kv"), state.kv), (pytree.GetAttrKey("position"), state.position)],
        None,
    ),
)
torch.serialization.add_safe_globals([RetNetState])
