"""Retention of sequences of different lengths packed into one row.

`cu_seqlens` follows flash-attention's convention: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s+1].
Chunkwise mode cuts every sequence into chunks and computes the chunks of all sequences at once, with
gradients by the formulas of `eager`. Recurrent mode steps all sequences that have a token left. Parallel mode
takes the sequences one by one, so its quadratic cost depends on each sequence's own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from retpop.arguments import values_are_free
from retpop.ops.checks import check_bounds
from retpop.ops.powers import Across, BlockPowers, DecayPowers, advance, advance_in_place
from retpop.ops.torch_backend import plain
from retpop.ops.torch_backend.eager import Blocks, Kept, scaled


class ChunkPlan(NamedTuple):
    """The cut of packed sequences into chunks of at most C tokens.

    Chunks are numbered in the order of their tokens. In the j-th step of a scan over chunks, the sequences
    that have a j-th chunk come first when sequences are ordered by length, longest first.

    Attributes:
        tokens: (chunks, C), the index of each place's token; places past a chunk's end repeat its last token.
        lengths: (chunks,), tokens in each chunk.
        filled: (chunks, C), whether a place holds a token.
        order: (S,), the sequences, longest first.
        steps: for each step j, the j-th chunk of every sequence that has one, in that order.
    """

    tokens: Tensor
    lengths: Tensor
    filled: Tensor
    order: Tensor
    steps: list[Tensor]


class Packing:
    """The boundaries of packed sequences, and the plans for them that the torch backend makes on the host.

    A decoder makes one per call for all of its layers. Reading the boundaries waits for a GPU; the Triton
    backend's kernels read them on the device.
    """

    def __init__(self, where: str, cu_seqlens: Tensor, length: int) -> None:
        """Take the boundaries of sequences that fill ``length`` tokens; ``where`` begins messages.

        They are read and checked at once if that costs nothing, else when a backend needs them.
        """
        self.cu_seqlens = cu_seqlens
        self._where, self._length = where, length
        self._bounds: list[int] | None = None
        self._plans: dict[int, ChunkPlan] = {}
        if values_are_free(cu_seqlens):
            self._read()

    @property
    def bounds(self) -> list[int]:
        """The boundaries on the host; ValueError if they do not fit the tokens."""
        return self._read() if self._bounds is None else self._bounds

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((end - start for start, end in pairwise(self.bounds)), default=0)

    def plan(self, chunk_size: int) -> ChunkPlan:
        """How the sequences are cut into chunks of at most ``chunk_size`` tokens."""
        if chunk_size not in self._plans:
            self._plans[chunk_size] = _plan(self.bounds, chunk_size, self.cu_seqlens.device)
        return self._plans[chunk_size]

    def _read(self) -> list[int]:
        bounds: list[int] = self.cu_seqlens.tolist()
        check_bounds(self._where, bounds, self._length)
        self._bounds = bounds
        return bounds


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    mode: str,
    state: Tensor,
    packing: Packing,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Parallel or recurrent retention of packed inputs (1, T, H, D); or of single tokens, in any mode."""
    if packing.longest == 0:
        return v.to(out_dtype, copy=True), state.clone()
    if mode == "parallel":
        return _one_by_one(q, k, v, powers, state, packing.bounds, out_dtype)
    return _recurrent(q, k, v, powers, state, packing.plan(1), out_dtype)


class Chunks(NamedTuple):
    """Chunkwise retention of packed sequences.

    Attributes:
        powers: the decays, with the scale c.
        plan: how the sequences are cut into chunks.
        out_dtype: of the outputs.
    """

    powers: DecayPowers
    plan: ChunkPlan
    out_dtype: torch.dtype
    reset: None = None

    def plain(self, tokens: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """The same in plain operations: outputs and final states (S, H, Dk, Dv)."""
        q, k, v = (x.unsqueeze(0) for x in self._all_taken(tokens, state.dtype))
        tables = self._powers()
        added = plain.block_additions(k, v, tables.to_end).squeeze(0)
        starts, final = self._scan(added, state)
        out = plain.block_outputs(q, k, v, starts.unsqueeze(0), tables).squeeze(0)
        return self._put_back(out, self.out_dtype), final

    def forward(self, tokens: Sequence[Tensor], state: Tensor, keep: bool) -> Kept:
        """Outputs, final states, and the states before all chunks, (chunks, H, Dk, Dv)."""
        blocks = Blocks(*(x.flatten(0, 1) for x in self._all_taken(tokens, state.dtype)))
        tables = self._powers()
        added = state.new_empty(len(self.plan.lengths), *state.shape[1:])
        blocks.additions(tables, added)
        starts, final = self._scan(added, state)
        out = blocks.outputs(starts, tables).view(*starts.shape[:2], -1, starts.shape[-1])
        return [self._put_back(out, self.out_dtype)], final, starts

    def gradients(
        self, tokens: Sequence[Tensor], grads: Sequence[Tensor], states: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """dq, dk, dv and gradients of the first states, from those of the outputs and the final states."""
        taken = [
            *self._all_taken(tokens, states.dtype),
            self._taken(grads[0], states.dtype, with_zeros=True),
        ]
        *own, grad = (x.flatten(0, 1) for x in taken)
        blocks, tables = Blocks(*own), self._powers()
        read = scaled(grad, tables.from_start)
        added = torch.bmm(blocks.q.mT, read).view(states.shape)
        ends, grad_state = self._scan_back(added, grads[1])
        found = blocks.gradients(grad, read, states, ends, tables, needs)
        put_back = (
            None if g is None else self._put_back(g.view(like.shape), x.dtype)
            for g, like, x in zip(found, taken, tokens, strict=False)
        )
        return [*put_back, grad_state if needs[-1] else None]

    def _all_taken(self, tokens: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Chunks of queries, keys and values; keys past a chunk's end are zero, and add nothing to states.

        Otherwise those places repeat the chunk's last token, which comes after all of the chunk's tokens and
        so has no influence on them.
        """
        q, k, v = tokens
        return [self._taken(q, dtype), self._taken(k, dtype, with_zeros=True), self._taken(v, dtype)]

    def _taken(self, x: Tensor, dtype: torch.dtype, with_zeros: bool = False) -> Tensor:
        """The chunks of (1, T, H, D) by head, (chunks, H, C, D)."""
        x = x[0, self.plan.tokens]
        if with_zeros:
            x = x.masked_fill_(~self.plan.filled[:, :, None, None], 0)
        return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).contiguous()

    def _put_back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens (1, T, H, D) of chunks by head."""
        return x.transpose(1, 2)[None, self.plan.filled].to(dtype)  # no view, so that it can be written over

    def _powers(self) -> BlockPowers:
        """The powers of a full chunk, except that each token decays until the end of its own chunk."""
        width = self.plan.filled.shape[1]
        places = torch.arange(width, device=self.plan.lengths.device)
        left = (self.plan.lengths[:, None] - 1 - places).clamp(min=0)
        to_end = rearrange(self.powers.gamma_to(left), "h n l -> n h l 1")
        return self.powers.block(width)._replace(to_end=to_end)

    def _across(self) -> Across:
        """The weight of a state after each chunk, two of (chunks, H, 1, 1)."""
        return self.powers.across(self.plan.lengths).each(lambda x: rearrange(x, "h n -> n h 1 1"))

    def _scan(self, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The states before all chunks, (chunks, H, Dk, Dv), and after all sequences, (S, H, Dk, Dv)."""
        across, plan = self._across(), self.plan
        state = state[plan.order]
        before = []
        for chunks in plan.steps:
            active = state[: chunks.shape[0]]
            before.append(active)
            after = advance(active, across.each(itemgetter(chunks)), added[chunks])
            state = torch.cat((after, state[chunks.shape[0] :]))
        return torch.cat(before)[torch.cat(plan.steps).argsort()], state[plan.order.argsort()]

    def _scan_back(self, added: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the states after all chunks, and of those before all sequences."""
        across, plan = self._across(), self.plan
        grad = grad[plan.order]
        ends = []
        for chunks in reversed(plan.steps):
            active = grad[: chunks.shape[0]]
            ends.append(active)
            before = advance(active, across.each(itemgetter(chunks)), added[chunks])
            grad = torch.cat((before, grad[chunks.shape[0] :]))
        return torch.cat(ends)[torch.cat(plan.steps[::-1]).argsort()], grad[plan.order.argsort()]


def _plan(bounds: list[int], chunk_size: int, device: torch.device) -> ChunkPlan:
    num_sequences = len(bounds) - 1
    chunk_starts: list[int] = []
    chunk_lengths: list[int] = []
    first_chunk: list[int] = []
    chunks_in: list[int] = []
    for start, end in pairwise(bounds):
        first_chunk.append(len(chunk_starts))
        chunk_starts.extend(range(start, end, chunk_size))
        chunk_lengths.extend(min(chunk_size, end - at) for at in range(start, end, chunk_size))
        chunks_in.append(len(chunk_starts) - first_chunk[-1])
    order = sorted(range(num_sequences), key=lambda s: -chunks_in[s])
    steps = [
        torch.tensor([first_chunk[s] + j for s in order if chunks_in[s] > j], device=device)
        for j in range(max(chunks_in))
    ]
    starts, lengths = (torch.tensor(x, device=device) for x in (chunk_starts, chunk_lengths))
    width = min(chunk_size, max(chunk_lengths))
    places, lasts = torch.arange(width, device=device), lengths[:, None] - 1
    tokens = starts[:, None] + torch.minimum(places, lasts)
    return ChunkPlan(tokens, lengths, places <= lasts, torch.tensor(order, device=device), steps)


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    state: Tensor,
    bounds: list[int],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    outs, states = [], []
    for s, (start, end) in enumerate(pairwise(bounds)):
        tokens = slice(start, end)
        out, last = plain.retention(
            q[:, tokens],
            k[:, tokens],
            v[:, tokens],
            powers,
            mode="parallel",
            state=state[s : s + 1],
            chunk_size=plain.DEFAULT_CHUNK_SIZE,
            out_dtype=out_dtype,
        )
        outs.append(out)
        states.append(last)
    return torch.cat(outs, dim=1), torch.cat(states)


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    state: Tensor,
    plan: ChunkPlan,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    across = powers.across_token()
    q, k, v = plain.widen(q, k, v)
    state = state[plan.order]
    outs = []
    for tokens in plan.steps:
        rows = tokens.shape[0]
        added = k[0, tokens].unsqueeze(-1) * v[0, tokens].unsqueeze(-2)
        new = advance_in_place(state[:rows], across, added)
        outs.append(plain.read(q[0, tokens], new, powers.scale))
        state = torch.cat((new, state[rows:]))
    out = torch.cat(outs)[torch.cat(plan.steps).argsort()]
    return out.unsqueeze(0).to(out_dtype), state[plan.order.argsort()]
