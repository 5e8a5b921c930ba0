"""Retention of sequences that are not whole rows: packed into one row, or cut by resets.

`cu_seqlens` follows flash-attention's convention: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s+1].
Resets cut a sequence into episodes; each starts from a state of zeros. Chunkwise mode cuts every episode into
chunks and computes the chunks of all sequences at once, with gradients by the formulas of `blocks`. No chunk
holds tokens of two episodes, so a NaN stays in its own. Recurrent mode steps all sequences that have a token
left. Parallel mode takes the episodes one by one, so its quadratic cost depends on each one's own length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from retpop.arguments import values_are_free
from retpop.ops.checks import check_bounds
from retpop.ops.powers import Across, BlockPowers, DecayPowers, advance, advance_in_place, restart
from retpop.ops.torch_backend import plain
from retpop.ops.torch_backend.blocks import Blocks, inner, scaled
from retpop.ops.torch_backend.eager import Kept

SHORTEST_CHUNK = 16
"""Tokens of a chunk among short episodes; shorter ones would not outweigh their states."""


class ChunkPlan(NamedTuple):
    """The cut of sequences into chunks of at most C tokens, at every reset and boundary at least.

    Tokens are numbered row after row, and chunks in the order of their tokens. In the j-th step of a scan
    over chunks, the sequences that have a j-th chunk come first when they are ordered by their number of
    chunks, most first.

    Attributes:
        tokens: (chunks, C), the index of each place's token; places past a chunk's end repeat its last token.
        lengths: (chunks,), tokens in each chunk.
        filled: (chunks, C), whether a place holds a token.
        places: each token's chunk and its place there, (B, T) both.
        order: (S,), the sequences, most chunks first.
        steps: for each step j, the j-th chunk of every sequence that has one, in that order.
        fresh: (chunks,), whether a chunk begins at a reset; None if there is no reset.
    """

    tokens: Tensor
    lengths: Tensor
    filled: Tensor
    places: tuple[Tensor, Tensor]
    order: Tensor
    steps: list[Tensor]
    fresh: Tensor | None

    def restart(self, states: Tensor, chunks: Tensor) -> Tensor:
        """States (n, H, Dk, Dv) before n chunks, or gradients of them: 0 where a chunk begins at a reset."""
        return states if self.fresh is None else restart(states, self.fresh[chunks])


class Packing:
    """Where sequences and episodes begin, and the plans for them that the torch backend makes on the host.

    A decoder makes one per call for all of its layers. Reading boundaries and resets waits for a GPU; the
    Triton backend's kernels read them on the device.
    """

    def __init__(
        self, where: str, cu_seqlens: Tensor | None, length: int, reset: Tensor | None = None
    ) -> None:
        """Take the boundaries of sequences packed into one row, or resets (B, T), or both; T is ``length``.

        Boundaries are read and checked at once if that costs nothing, else when a backend needs them;
        ``where`` begins messages.
        """
        self.cu_seqlens, self.reset = cu_seqlens, reset
        self._where, self._length = where, length
        self._bounds: list[int] | None = None
        self._resets: list[int] | None = None
        self._plans: dict[int, ChunkPlan] = {}
        if cu_seqlens is not None and values_are_free(cu_seqlens):
            self._read()

    def of_rows(self, rows: slice) -> Packing:
        """The resets of some rows of the batch."""
        return self if self.reset is None else Packing(self._where, None, self._length, self.reset[rows])

    @property
    def device(self) -> torch.device:
        """The device of the tokens."""
        given = self.reset if self.cu_seqlens is None else self.cu_seqlens
        assert given is not None  # the one or the other
        return given.device

    @property
    def num_rows(self) -> int:
        """B."""
        return 1 if self.reset is None else self.reset.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.num_rows if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def is_step(self) -> bool:
        """Whether every sequence is a row of one token, so that `restart` is all there is to do."""
        return self.cu_seqlens is None and self._length == 1

    @property
    def is_known(self) -> bool:
        """Whether the host can read boundaries and resets: not in a compiler, nor on the meta device."""
        return not torch.compiler.is_compiling() and self.device.type != "meta"

    @property
    def cuts_rows(self) -> bool:
        """Whether a sequence or an episode may begin inside a row; else `restart` is all there is to do."""
        if self.cu_seqlens is not None or not self.is_known:
            return not self.is_step
        return any(token % self._length for token in self.resets)

    def restart(self, state: Tensor | None) -> Tensor | None:
        """The state (B, H, Dk, Dv) before the first token, 0 where a reset drops it."""
        if state is None or self.reset is None or self._length == 0:
            return state
        return restart(state, self.reset[:, 0])

    @property
    def bounds(self) -> list[int]:
        """The sequences' boundaries on the host, rows in line; ValueError if they do not fit the tokens."""
        return self._read() if self._bounds is None else self._bounds

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((end - start for start, end in pairwise(self.bounds)), default=0)

    @property
    def resets(self) -> list[int]:
        """The tokens at resets on the host, numbered row after row."""
        if self._resets is None:
            found = [] if self.reset is None else self.reset.flatten().nonzero().squeeze(1).tolist()
            self._resets = found
        return self._resets

    def episodes(self, sequence: int) -> Iterator[tuple[int, int]]:
        """First token and end of each episode of a sequence; the first one may be empty."""
        start, end = self.bounds[sequence : sequence + 2]
        inside = self.resets[bisect_left(self.resets, start) : bisect_left(self.resets, end)]
        return pairwise([start, *inside, end])

    def plan(self, chunk_size: int) -> ChunkPlan:
        """How the sequences are cut into chunks of at most ``chunk_size`` tokens.

        Where resets make episodes short, so are chunks: most places of longer ones would be empty.
        """
        if self.resets:
            mean = self.num_rows * self._length // (self.num_sequences + len(self.resets))
            chunk_size = min(chunk_size, max(SHORTEST_CHUNK, 1 << mean.bit_length() >> 1))
        if chunk_size not in self._plans:
            self._plans[chunk_size] = _plan(self, chunk_size)
        return self._plans[chunk_size]

    def _read(self) -> list[int]:
        if self.cu_seqlens is None:
            self._bounds = [row * self._length for row in range(self.num_rows + 1)]
        else:
            self._bounds = self.cu_seqlens.tolist()
            check_bounds(self._where, self._bounds, self._length)
        return self._bounds


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
    """Parallel or recurrent retention of inputs (B, T, H, D); or of single tokens, in any mode."""
    if packing.longest == 0:
        return v.to(out_dtype, copy=True), state.clone()
    tokens = [x.flatten(0, 1) for x in (q, k, v)]
    if mode == "parallel":
        out, state = _one_by_one(tokens, powers, state, packing)
    else:
        out, state = _recurrent(tokens, powers, state, packing.plan(1))
    return out.to(out_dtype).view(v.shape), state


class Chunks(NamedTuple):
    """Chunkwise retention of sequences and episodes.

    Attributes:
        powers: the decays, with the scale c.
        plan: how they are cut into chunks.
        out_dtype: of the outputs.
    """

    powers: DecayPowers
    plan: ChunkPlan
    out_dtype: torch.dtype
    reset: None = None

    def with_powers(self, powers: DecayPowers) -> Chunks:
        """The same form with other powers."""
        return self._replace(powers=powers)

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
        """dq, dk, dv, those of ln γ and the first states, from those of the outputs and the final states."""
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
            self._put_back(g.view(like.shape), x.dtype) if g is not None and need else None
            for g, like, x, need in zip(found, taken, tokens, needs, strict=False)
        )
        decay = None
        if needs[3]:
            blocks.additions(tables, added)
            after = inner(ends, advance(states, self._across(), added)).view(added.shape[:2])
            after = (after * self.plan.lengths[:, None]).flatten()
            decay = torch.zeros_like(self.powers.log_decay)
            blocks.add_decay_gradient(decay, found, after)
        return [*put_back, decay, grad_state if needs[-1] else None]

    def _all_taken(self, tokens: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Chunks of queries, keys and values; keys past a chunk's end are zero, and add nothing to states.

        Otherwise those places repeat the chunk's last token, which comes after all of the chunk's tokens and
        so has no influence on them.
        """
        q, k, v = tokens
        return [self._taken(q, dtype), self._taken(k, dtype, with_zeros=True), self._taken(v, dtype)]

    def _taken(self, x: Tensor, dtype: torch.dtype, with_zeros: bool = False) -> Tensor:
        """The chunks of (B, T, H, D) by head, (chunks, H, C, D)."""
        x = x.flatten(0, 1)[self.plan.tokens]
        if with_zeros:
            x = x.masked_fill_(~self.plan.filled[:, :, None, None], 0)
        return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).contiguous()

    def _put_back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens (B, T, H, D) of chunks by head."""
        return x.transpose(1, 2)[self.plan.places].to(dtype)  # no view, so that it can be written over

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
            active = plan.restart(state[: chunks.shape[0]], chunks)
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
            before = plan.restart(advance(active, across.each(itemgetter(chunks)), added[chunks]), chunks)
            grad = torch.cat((before, grad[chunks.shape[0] :]))
        return torch.cat(ends)[torch.cat(plan.steps[::-1]).argsort()], grad[plan.order.argsort()]


def _plan(packing: Packing, chunk_size: int) -> ChunkPlan:
    chunk_starts: list[int] = []
    chunk_lengths: list[int] = []
    fresh: list[bool] = []
    first_chunk: list[int] = []
    for sequence in range(packing.num_sequences):
        first_chunk.append(len(chunk_starts))
        for episode, (start, end) in enumerate(packing.episodes(sequence)):
            chunks = range(start, end, chunk_size)
            chunk_starts.extend(chunks)
            chunk_lengths.extend(min(chunk_size, end - at) for at in chunks)
            fresh.extend(episode > 0 and at == start for at in chunks)
    chunks_in = [last - first for first, last in pairwise([*first_chunk, len(chunk_starts)])]
    order = sorted(range(packing.num_sequences), key=lambda s: -chunks_in[s])
    device = packing.device
    steps = [
        torch.tensor([first_chunk[s] + j for s in order if chunks_in[s] > j], device=device)
        for j in range(max(chunks_in))
    ]
    starts, lengths = (torch.tensor(x, device=device) for x in (chunk_starts, chunk_lengths))
    width = min(chunk_size, max(chunk_lengths))
    places, lasts = torch.arange(width, device=device), lengths[:, None] - 1
    filled = places <= lasts
    chunk_of, place_of = (x.view(packing.num_rows, -1) for x in filled.nonzero(as_tuple=True))
    return ChunkPlan(
        tokens=starts[:, None] + torch.minimum(places, lasts),
        lengths=lengths,
        filled=filled,
        places=(chunk_of, place_of),
        order=torch.tensor(order, device=device),
        steps=steps,
        fresh=torch.tensor(fresh, device=device) if any(fresh) else None,
    )


def _one_by_one(
    tokens: Sequence[Tensor], powers: DecayPowers, state: Tensor, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Outputs (B·T, H, Dv) of tokens (B·T, H, D), and the final states."""
    outs, states = [], []
    for sequence in range(packing.num_sequences):
        last = state[sequence : sequence + 1]
        for episode, (start, end) in enumerate(packing.episodes(sequence)):
            q, k, v = (x[None, start:end] for x in tokens)
            out, last = plain.retention(
                q,
                k,
                v,
                powers,
                mode="parallel",
                state=None if episode else last,
                chunk_size=plain.DEFAULT_CHUNK_SIZE,
                out_dtype=state.dtype,
            )
            outs.append(out)
        states.append(last)
    return torch.cat(outs, dim=1).squeeze(0), torch.cat(states)


def _recurrent(
    tokens: Sequence[Tensor], powers: DecayPowers, state: Tensor, plan: ChunkPlan
) -> tuple[Tensor, Tensor]:
    """Outputs (B·T, H, Dv) of tokens (B·T, H, D), and the final states; a chunk of the plan is a token."""
    across = powers.across_token()
    q, k, v = plain.widen(*tokens)
    state = state[plan.order]
    outs = []
    for step in plan.steps:
        rows = step.shape[0]
        added = k[step].unsqueeze(-1) * v[step].unsqueeze(-2)
        new = advance_in_place(plan.restart(state[:rows], step), across, added)
        outs.append(plain.read(q[step], new, powers.scale))
        state = torch.cat((new, state[rows:]))
    return torch.cat(outs)[torch.cat(plan.steps).argsort()], state[plan.order.argsort()]
