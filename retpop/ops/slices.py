"""Retention of a sequence that is cut over the ranks of a process group (`retpop.distributed`).

A slice of n tokens takes a state S to γ^n S + C, where C is what its tokens add. Every rank finds its C from
keys and values alone, gathers those of all ranks, and so knows the state before its own slice, from which the
operation then runs as for any carried state: modes, backends, predictions, resets and gradients are its own.
This costs one more product of keys and values, about as much as correcting the outputs would.

A reset inside a slice hides what came before it: C then counts the tokens since the last reset, and no
earlier state passes.

A row of packed sequences is cut like any other. The above then holds for the pieces of sequences in each
slice: every rank has S of them, most of them empty, and S states move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from retpop.arguments import INPUT_DTYPES, values_are_free, zero_state
from retpop.distributed.context_parallel import all_gather, check_agreement, process_group
from retpop.ops.checks import check_bounds
from retpop.ops.powers import DecayPowers
from retpop.position import boundary_positions, packed_positions


class Slices(NamedTuple):
    """The slices of a batch of sequences that the ranks of a group hold, in rank order.

    Attributes:
        group: the process group.
        counts: (ranks, B or 1), tokens of each slice; with resets, those since its last one. B is the number
            of sequences, S, if they are packed.
        cut: (ranks, B), whether the slice has a reset; None: no slice of any row.
        cu_seqlens: (S + 1,), the boundaries of packed sequences inside this rank's slice.
    """

    group: Any
    counts: Tensor
    cut: Tensor | None
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(
        cls,
        where: str,
        group: object,
        tokens: Tensor,
        facts: dict[str, int],
        reset: Tensor | None = None,
        block_size: int = 1,
        cu_seqlens: Tensor | None = None,
    ) -> Slices:
        """Gather the lengths of all slices.

        Args:
            where: begins every message.
            group: as the user named it.
            tokens: this rank's, (B, T, ...).
            facts: numbers in which all ranks must agree, beside B, dtype and whether there are resets.
            reset: (B, N), bool: the blocks of this rank that start a new episode.
            block_size: tokens in a block.
            cu_seqlens: (S + 1,), boundaries of sequences packed into the whole row, the same on every rank.

        Raises:
            ValueError: the ranks disagree, or cu_seqlens does not fit their tokens.
        """
        group = process_group(where, group)
        length, device = tokens.shape[1], tokens.device
        if values_are_free(tokens):
            kind = INPUT_DTYPES.index(tokens.dtype)
            facts = {"B": tokens.shape[0], **facts, "dtype": kind, "reset": int(reset is not None)}
            facts["number of sequences"] = -1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
            check_agreement(where, facts, group)
        if cu_seqlens is not None:
            return cls._of_packed(where, group, length, cu_seqlens, reset)
        if reset is None:
            return cls(group, _gathered_length(length, device, group), None)
        since = boundary_positions(None, reset.shape[1], block_size, reset, device)[:, -1]
        return cls._with_resets(group, since.expand(reset.shape[0]), reset.any(dim=1))

    @classmethod
    def _of_packed(
        cls, where: str, group: Any, length: int, cu_seqlens: Tensor, reset: Tensor | None
    ) -> Slices:
        lengths = _gathered_length(length, cu_seqlens.device, group)
        if values_are_free(cu_seqlens):
            bounds = cu_seqlens.tolist()
            check_bounds(where, bounds, int(lengths.sum()))
            check_agreement(where, {f"cu_seqlens[{i}]": bound for i, bound in enumerate(bounds)}, group)
        starts = lengths.cumsum(0) - lengths
        pieces = (cu_seqlens.long() - starts).clamp(min=0).minimum(lengths)  # (ranks, S + 1)
        own = pieces[group.rank()]
        if reset is None:
            return cls(group, pieces.diff(dim=1), None, own)
        _, since = packed_positions(None, own, length, reset)
        resets_before = F.pad(reset[0].long().cumsum(0), (1, 0))[own]
        return cls._with_resets(group, since, resets_before.diff() > 0)._replace(cu_seqlens=own)

    @classmethod
    def _with_resets(cls, group: Any, since: Tensor, cut: Tensor) -> Slices:
        """From this rank's tokens since the last reset, and whether there is one, both (B,)."""
        counts, cuts = all_gather(torch.stack((since, cut.long())), group).unbind(1)
        return cls(group, counts, cuts.bool())

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return int(self.group.rank())

    def start(self, position: Tensor | None) -> Tensor:
        """The position of this rank's first token, (B or 1,); ``position`` (B,) is that of the sequence's."""
        return self._position(position, self.rank)

    def end(self, position: Tensor | None) -> Tensor:
        """The position after the whole sequence, (B or 1,)."""
        return self._position(position, self.counts.shape[0])

    def run(
        self,
        operation: Callable[..., tuple[Tensor, ...]],
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        powers: DecayPowers,
    ) -> tuple[Any, ...]:
        """This rank's outputs, and the state after the whole sequence.

        Args:
            operation: takes ``state=``, that before the slice; returns the outputs and the state after it.
            k, v: the slice's keys and values, (B, T, H, D).
            state: that before the whole sequence, (B, H, Dk, Dv); None: zeros.
            powers: the decays.
        """
        if state is None:
            state = zero_state(k, v, k.shape[0] if self.cu_seqlens is None else self.counts.shape[1])
        added = all_gather(self._own_added(operation, k, v, powers), self.group)
        before = self._state(state, added, self.rank, powers)
        *outs, _ = operation(state=before)
        # An empty output reads no state, but its backward pass too must reach the other ranks.
        outs = [out if out.numel() else out + before.sum() for out in outs]
        return *outs, self._state(state, added, self.counts.shape[0], powers)

    def _own_added(
        self, operation: Callable[..., tuple[Tensor, ...]], k: Tensor, v: Tensor, powers: DecayPowers
    ) -> Tensor:
        """C of this rank's slice, (B, H, Dk, Dv)."""
        if self.cu_seqlens is None:
            counts = None if self.cut is None else self.counts[self.rank]
            # For backward it keeps keys and values, not their copies in the state's dtype.
            added: Tensor = checkpoint(
                _added, k, v, counts, powers, use_reentrant=False, preserve_rng_state=False
            )
            return added
        if k.shape[1]:
            return operation(state=None)[-1]  # the operation alone knows how to go through the pieces
        # Nothing, but a function of k and v: the backward pass of each rank must reach the others.
        return zero_state(k, v, self.counts.shape[1]) + k.sum() + v.sum()

    def _following(self, ranks: int) -> tuple[Tensor, Tensor | None]:
        """The distance between the end of each source and the start of rank number ``ranks``.

        The sources of its state are the state before the sequence, and the slices of earlier ranks.

        Returns:
            the number of tokens, (ranks + 1, B or 1), and whether no reset is among them; None: nowhere.
        """
        tokens = _sums_from(self.counts[:ranks])
        return tokens, None if self.cut is None else _sums_from(self.cut[:ranks].long()) == 0

    def _position(self, position: Tensor | None, ranks: int) -> Tensor:
        first = self.counts.new_zeros(1) if position is None else position
        _, reaches = self._following(ranks)
        if reaches is None:
            return first + self.counts[:ranks].sum(0)
        return first * reaches[0] + (self.counts[:ranks] * reaches[1:]).sum(0)

    def _state(self, state: Tensor, added: Tensor, ranks: int, powers: DecayPowers) -> Tensor:
        """The state before rank number ``ranks``, (B, H, Dk, Dv)."""
        tokens, reaches = self._following(ranks)
        # No part of later ranks, not even times zero: 0 * NaN would carry a NaN back.
        sources = torch.cat((state.unsqueeze(0), added[:ranks]))
        if reaches is not None:
            sources = torch.where(reaches[..., None, None, None], sources, torch.zeros_like(sources))
        return (rearrange(powers.gamma_to(tokens), "h s b -> s b h 1 1") * sources).sum(0)


def op_facts(k: Tensor, v: Tensor, state: Tensor | None) -> dict[str, int]:
    """The properties in which all ranks' calls of an operation must agree, see `Slices.of`."""
    gradient = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    return {
        "H": k.shape[2],
        "Dk": k.shape[3],
        "Dv": v.shape[3],
        "state": int(state is not None),
        "requires_grad": int(gradient),
    }


def _gathered_length(length: int, device: torch.device, group: Any) -> Tensor:
    """The tokens of all slices, (ranks, 1)."""
    return all_gather(torch.full((1,), length, device=device), group)


def _sums_from(x: Tensor) -> Tensor:
    """Sums of (n, ...) from each index on, and of none: (n + 1, ...)."""
    sums = torch.cat((x.new_zeros(1, *x.shape[1:]), x.flip(0).cumsum(0)))
    return sums.flip(0)


def _added(k: Tensor, v: Tensor, counts: Tensor | None, powers: DecayPowers) -> Tensor:
    """What the last ``counts`` (B,) tokens of a slice, or all, add to the state after it: (B, H, Dk, Dv)."""
    left = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)  # tokens after each one
    if counts is not None:  # not a product: 0 * NaN would carry a NaN into the next episode
        hidden = (left >= counts.unsqueeze(-1))[..., None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    weights = rearrange(powers.gamma_to(left), "h t -> t h 1")
    return torch.einsum("bthk,bthv->bhkv", k.to(weights.dtype) * weights, v.to(weights.dtype))
