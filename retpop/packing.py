"""Ragged batches: rows of different lengths as one packed row, without padding between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from retpop._torch import pytree
from retpop.arguments import as_ints, check_tensor, values_are_free


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of different lengths in one packed row, with the places of their tokens in the padded batch.

    Attributes:
        data: (1, ΣT, ...), the tokens of all rows.
        cu_seqlens: (B + 1,), int64, the boundaries of the rows, as every ``cu_seqlens`` argument takes them.
        index: (ΣT,), int64, each token's place among the B * T places of the padded batch.
        shape: (B, T) of the padded batch.
    """

    data: Tensor
    cu_seqlens: Tensor
    index: Tensor
    shape: tuple[int, int]

    def replace(self, data: Tensor) -> Packed:
        """The same rows with other data, such as the outputs of a decoder.

        Args:
            data: (1, ΣT, ...).

        Raises:
            TypeError, ValueError: data is not a tensor of that many tokens.
        """
        check_tensor("Packed.replace()", "data", data)
        if data.shape[:2] != self.data.shape[:2]:
            raise ValueError(
                f"Packed.replace(): data has shape {tuple(data.shape)}; "
                f"it must begin with {tuple(self.data.shape[:2])}."
            )
        return replace(self, data=data)


def pack_padded(
    x: Tensor, lengths: Tensor | Sequence[int] | None = None, *, mask: Tensor | None = None
) -> Packed:
    """Remove the padding of a batch, as `torch.nn.utils.rnn.pack_padded_sequence` does for an RNN.

    Args:
        x: (B, T, ...).
        lengths: B lengths from 0 to T, of rows padded on the right; or
        mask: (B, T), bool, True for tokens: the padding may stand anywhere.

    Returns:
        the packed rows. Under ``torch.compile`` their number of tokens depends on data, so the graph breaks
        here unless ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is set.

    Raises:
        TypeError, ValueError: both or neither of lengths and mask are given, or one does not fit x.
    """
    where = "pack_padded()"
    check_tensor(where, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{where}: x has shape {tuple(x.shape)}; it must be (B, T, ...).")
    if (lengths is None) == (mask is None):
        given = "neither" if mask is None else "both"
        raise ValueError(f"{where}: {given} of lengths and mask are given; it needs one of them.")
    if mask is None:
        assert lengths is not None
        mask = _right_padding(where, x, lengths)
    _check_mask(where, x, mask)
    mask = mask.to(x.device)
    index = mask.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0))
    return Packed(x.flatten(0, 1)[index].unsqueeze(0), cu_seqlens, index, (x.shape[0], x.shape[1]))


def pad_packed(packed: Packed, padding_value: float = 0.0) -> Tensor:
    """Put packed rows back into a padded batch, every token in its old place.

    Args:
        packed: from `pack_padded`, or its ``replace``.
        padding_value: the value of places without a token.

    Returns:
        (B, T, ...), in the dtype of ``packed.data``.

    Raises:
        TypeError: packed is something else, or padding_value no number.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"pad_packed(): packed is {type(packed).__name__}; it must come from pack_padded().")
    if not isinstance(padding_value, Real):
        raise TypeError(f"pad_packed(): padding_value is {padding_value!r}; it must be a number.")
    rows, length = packed.shape
    padded = packed.data.new_full((rows * length, *packed.data.shape[2:]), padding_value)
    return padded.index_copy(0, packed.index, packed.data.squeeze(0)).unflatten(0, packed.shape)


def _right_padding(where: str, x: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    """The mask (B, T) of rows whose first ``lengths`` tokens count."""
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(as_ints(where, "lengths", lengths), dtype=torch.int64, device=x.device)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: lengths is {lengths.dtype}; it must be int32 or int64.")
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"{where}: lengths has shape {tuple(lengths.shape)}; it must be ({x.shape[0]},).")
    if values_are_free(lengths) and not ((lengths >= 0) & (lengths <= x.shape[1])).all():
        raise ValueError(f"{where}: lengths is {lengths.tolist()}; each must be from 0 to {x.shape[1]}.")
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device).unsqueeze(1)


def _check_mask(where: str, x: Tensor, mask: Tensor) -> None:
    check_tensor(where, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{where}: mask is {mask.dtype}; it must be a bool tensor, True for tokens.")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{where}: mask has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:2])}.")


def _unflatten(leaves: Iterable[Tensor], shape: tuple[int, int]) -> Packed:
    data, cu_seqlens, index = leaves
    return Packed(data, cu_seqlens, index, shape)


pytree.register_pytree_node(
    Packed, lambda packed: ([packed.data, packed.cu_seqlens, packed.index], packed.shape), _unflatten
)
