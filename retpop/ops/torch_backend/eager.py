"""Chunkwise retention and POP in eager PyTorch: each form's results beside their gradients.

Both take some blocks at a time, by the formulas of `blocks`, and write results in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from retpop.ops.powers import BlockPowers, DecayPowers
from retpop.ops.rows import PopSpec
from retpop.ops.torch_backend import plain
from retpop.ops.torch_backend.blocks import (
    Blocks,
    Group,
    Tokens,
    carry,
    carry_back,
    flat,
    groups,
    inner,
    scaled,
)

Kept = tuple[list[Tensor], Tensor, Tensor]
"""The outputs, the final state, and the states that the gradients need."""


class Chunks(NamedTuple):
    """Chunkwise retention.

    Attributes:
        powers: the decays, with the scale c.
        chunk_size: tokens in a chunk.
        out_dtype: of the outputs.
    """

    powers: DecayPowers
    chunk_size: int
    out_dtype: torch.dtype
    reset: None = None

    def with_powers(self, powers: DecayPowers) -> Chunks:
        """The same form with other powers."""
        return self._replace(powers=powers)

    def plain(self, tokens: Tokens, state: Tensor) -> tuple[Tensor, ...]:
        """The same in plain operations: outputs and final state."""
        q, k, v = tokens
        return plain.retention(
            q,
            k,
            v,
            self.powers,
            mode="chunkwise",
            state=state,
            chunk_size=self.chunk_size,
            out_dtype=self.out_dtype,
        )

    def forward(self, tokens: Tokens, state: Tensor, keep: bool) -> Kept:
        """Outputs, final state, and, with ``keep``, the states at the N + 1 boundaries of chunks."""
        k, v = tokens[1:]
        out = v.new_empty(v.shape, dtype=self.out_dtype)
        cuts = list(groups(k, self.chunk_size))
        held = 0 if not cuts else cuts[-1].blocks.stop if keep else cuts[0].num_blocks
        states = state.new_empty(held + 1, *state.shape)
        states[0] = state
        for group in cuts:
            first = group.blocks.start if keep else 0
            window = states[first : first + group.num_blocks + 1, group.rows]
            powers = self.powers.block(group.size)
            blocks = Blocks(*(group.take(x, state.dtype) for x in tokens))
            blocks.additions(powers, window[1:])
            carry(window, powers.across)
            group.put(out, blocks.outputs(window[:-1], powers))
            if not keep:
                states[0, group.rows] = window[-1]
        return [out], states[-1 if keep else 0].clone(), states

    def gradients(
        self, tokens: Tokens, grads: Tokens, states: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """dq, dk, dv, those of ln γ and of the first state, from those of the outputs and the final state."""
        grad, grad_state = grads
        found = [x.new_empty(x.shape) for x in tokens]
        decay = torch.zeros_like(self.powers.log_decay)
        cuts = list(groups(tokens[1], self.chunk_size))
        sums = states.new_empty(1 + (cuts[0].num_blocks if cuts else 0), *grad_state.shape)
        sums[0] = grad_state
        for group in reversed(cuts):  # the first entry holds the gradient of the state after this group
            window = sums[: group.num_blocks + 1, group.rows]
            window[-1] = sums[0, group.rows]
            powers = self.powers.block(group.size)
            *own, g = (group.take(x, states.dtype) for x in (*tokens, grad))
            blocks, read = Blocks(*own), scaled(g, powers.from_start)
            if any(needs[1:]):  # all gradients except the queries' have a part from later blocks
                flat(window[:-1]).baddbmm_(blocks.q.mT, read, beta=0)
                carry_back(window, powers.across)
            starts, ends = states[group.blocks, group.rows], window[1:]
            of_tokens = blocks.gradients(g, read, starts, ends, powers, needs)
            _put((group,) * 3, found, of_tokens)
            if needs[3]:
                after = group.size * inner(ends, states[1:][group.blocks, group.rows])
                blocks.add_decay_gradient(decay, of_tokens, after)
        return _needed((*found, decay, sums[0].clone()), needs)


class Pop(NamedTuple):
    """POP of rows, or of a sequence and of predictions."""

    spec: PopSpec

    @property
    def powers(self) -> DecayPowers:
        """The decays, with the scale c."""
        return self.spec.powers

    @property
    def reset(self) -> Tensor | None:
        """The blocks that start a new episode."""
        return self.spec.reset

    def with_powers(self, powers: DecayPowers) -> Pop:
        """The same form with other powers."""
        return Pop(self.spec._replace(powers=powers))

    def plain(self, tokens: Tokens, state: Tensor) -> tuple[Tensor, ...]:
        """The same in plain operations: outputs and final state."""
        return plain.pop(tokens, state, self.spec)

    def forward(self, tokens: Tokens, state: Tensor, keep: bool) -> Kept:
        """Outputs, final state, and the states B_0 ... B_N as blocks and predictions read them."""
        spec = self.spec
        outs = [
            v.new_empty(*q.shape[:-1], v.shape[-1], dtype=spec.out_dtype or v.dtype)
            for q, v in zip(tokens[::3], tokens[2::3], strict=True)
        ]
        (q, k, v), pred = _parts(tokens, spec)
        (out,), (out_pred,) = _parts(outs, spec)
        resets = _at_boundaries(spec.reset)
        states = state.new_empty(1 + k.shape[1] // spec.block_size, *state.shape)
        states[0] = state if resets is None else state.masked_fill(resets[0], 0)
        for group in groups(k, spec.block_size):
            boundaries = slice(group.blocks.start, group.blocks.stop + 1), group.rows
            window = states[boundaries]
            readers, powers = _readers_of(group, spec)
            blocks = Blocks(readers.take(q, state.dtype), *(group.take(x, state.dtype) for x in (k, v)))
            blocks.additions(powers, window[1:])
            carry(window, powers.across, None if resets is None else resets[boundaries])
            readers.put(out, blocks.outputs(window[:-1], powers))
        for group in _prediction_groups(pred, spec):
            starts = states[spec.offset :][group.blocks, group.rows]
            blocks = Blocks(*(group.take(x, state.dtype) for x in pred))
            group.put(out_pred, blocks.outputs(starts, spec.powers.block(group.size)))
        return outs, states[-1].clone(), states

    def gradients(
        self, tokens: Tokens, grads: Tokens, states: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Those of ``tokens``, ln γ and the first state, from those of the outputs and the final state."""
        spec = self.spec
        decay = torch.zeros_like(spec.powers.log_decay)
        found = [x.new_empty(x.shape) for x in tokens]
        (main, pred), ((grad,), (grad_pred,)), (into, into_pred) = (
            _parts(x, spec) for x in (tokens, grads[:-1], found)
        )
        carried = needs[1] or needs[2] or any(needs[-2:])  # of all but the queries
        sums = torch.zeros_like(states)
        sums[-1] = grads[-1]
        for group in _prediction_groups(pred, spec):
            powers = spec.powers.block(group.size)
            *own, g = (group.take(x, states.dtype) for x in (*pred, grad_pred))
            blocks, read = Blocks(*own), scaled(g, powers.from_start)
            starts, grad_starts = (x[spec.offset :][group.blocks, group.rows] for x in (states, sums))
            if carried:
                flat(grad_starts).baddbmm_(blocks.q.mT, read)
            of_tokens = blocks.gradients(g, read, starts, None, powers, needs[-5:-1])
            _put((group,) * 3, into_pred, of_tokens)
            if needs[-2]:
                blocks.add_decay_gradient(decay, of_tokens, None)
        resets = _at_boundaries(spec.reset)
        for group in reversed(list(groups(main[1], spec.block_size))):
            at = slice(group.blocks.start, group.blocks.stop + 1), group.rows
            window, starts, ends = sums[at], states[group.blocks, group.rows], sums[at][1:]
            readers, powers = _readers_of(group, spec)
            places = readers, group, group, readers
            pairs = zip(places, (*main, grad), strict=True)
            *own, g = (place.take(x, states.dtype) for place, x in pairs)
            blocks, read = Blocks(*own), scaled(g, powers.from_start)
            if carried:
                flat(window[:-1]).baddbmm_(blocks.q.mT, read)
                carry_back(window, powers.across, None if resets is None else resets[at])
            of_tokens = blocks.gradients(g, read, starts, ends, powers, (*needs[:3], needs[-2]))
            _put(places[:3], into, of_tokens)
            if needs[-2]:
                after = group.size * inner(ends, states[1:][group.blocks, group.rows])
                blocks.add_decay_gradient(decay, of_tokens, after)
        return _needed((*found, decay, sums[0].clone()), needs)


def _parts(tensors: Tokens, spec: PopSpec) -> tuple[Tokens, Tokens]:
    """Sequence and predictions as views (B, ·, H, D), of rows or of separate tensors."""
    if tensors[-1].dim() == 5:
        half = len(tensors) // 2
        return tensors[:half], [x.flatten(1, 2) for x in tensors[half:]]
    behind = prod(spec.predictions)
    main, pred = zip(*(x.split((x.shape[1] - behind, behind), dim=1) for x in tensors), strict=True)
    return main, pred


def _prediction_groups(pred: Tokens, spec: PopSpec) -> Iterable[Group]:
    """The groups of predictions (B, P·M, H, D), one block each; none where M is 0."""
    return groups(pred[1], spec.predictions[1]) if spec.predictions[1] else ()


def _at_boundaries(reset: Tensor | None) -> Tensor | None:
    """The mask of boundaries where the state is dropped, (N + 1, B, 1, 1, 1); never the last one."""
    if reset is None:
        return None
    never = reset.new_zeros(1, reset.shape[0])
    return torch.cat((reset.T, never))[:, :, None, None, None]


def _readers_of(group: Group, spec: PopSpec) -> tuple[Group, BlockPowers]:
    """The places of a group's queries and outputs, and the powers for them."""
    powers = spec.powers.block(group.size)
    return (group.ends(), powers.of_last_token()) if spec.main_out == "last" else (group, powers)


def _needed(found: Iterable[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [x if need else None for x, need in zip(found, needs, strict=True)]


def _put(places: Sequence[Group], into: Tokens, found: Sequence[Tensor | None]) -> None:
    for place, x, gradient in zip(places, into, found, strict=True):
        if gradient is not None:
            place.put(x, gradient)
