"""Retention of sequences of different lengths packed into one row, in plain PyTorch operations.

`cu_seqlens` follows flash-attention's convention: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s+1].
Chunkwise mode cuts every sequence into chunks of its own and computes all chunks of all sequences at once;
recurrent mode steps all sequences that still have a token left; parallel mode takes them one by one, which
is what keeps its quadratic cost to each sequence's own length.
"""

from __future__ import annotations

from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from retpop.arguments import values_are_free
from retpop.ops import torch_forms
from retpop.ops.checks import check_bounds
from retpop.ops.decay_powers import Across, DecayPowers, advance, advance_in_place


class ChunkPlan(NamedTuple):
    """How packed sequences are cut into chunks of at most C tokens.

    Chunks are numbered in the order of their tokens. In the j-th step of a scan over chunks, the sequences
    that have a j-th chunk come first when sequences are ordered by length, longest first.

    Attributes:
        tokens: (chunks, C), the token each place holds; places past a chunk's end repeat its last token.
        lengths: (chunks,), tokens in each chunk.
        order: (S,), the sequences, longest first.
        steps: for each step j, the j-th chunk of every sequence that has one, in that order.
    """

    tokens: Tensor
    lengths: Tensor
    order: Tensor
    steps: list[Tensor]


class Packing:
    """The boundaries of packed sequences, and the plans for them that the torch backend makes on the host.

    Made once a call: a decoder hands one to all of its layers. Reading the boundaries waits for a GPU; the
    Triton backend's kernels read them where they are.
    """

    def __init__(self, where: str, cu_seqlens: Tensor, length: int) -> None:
        """Take the boundaries of sequences that fill ``length`` tokens; ``where`` begins messages.

        They are read, and checked, at once if that costs nothing, else when a backend asks for them.
        """
        self.cu_seqlens = cu_seqlens
        self._where, self._length = where, length
        self._bounds: list[int] | None = None
        self._plans: dict[int, ChunkPlan] = {}
        if values_are_free(cu_seqlens):
            self._read()

    @property
    def bounds(self) -> list[int]:
        """The boundaries on the host; ValueError where they do not fit the tokens."""
        return self._read() if self._bounds is None else self._bounds

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
    state: Tensor | None,
    chunk_size: int | None,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """Retention of packed inputs (1, T, H, D); states are (S, H, Dk, Dv), one a sequence."""
    longest = max((end - start for start, end in pairwise(packing.bounds)), default=0)
    if state is None:
        state = torch_forms.zero_state(q, v, len(packing.bounds) - 1)
    if longest == 0:
        return v.clone(), state
    if mode == "parallel":
        return _one_by_one(q, k, v, powers, state, packing.bounds)
    if mode == "recurrent" or longest == 1:
        return _recurrent(q, k, v, powers, state, packing.plan(1))
    plan = packing.plan(chunk_size or torch_forms.DEFAULT_CHUNK_SIZE)
    return _chunkwise(q, k, v, powers, state, plan)


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
    place = torch.minimum(torch.arange(width, device=device), lengths[:, None] - 1)
    return ChunkPlan(starts[:, None] + place, lengths, torch.tensor(order, device=device), steps)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor]:
    outs, states = [], []
    for s, (start, end) in enumerate(pairwise(bounds)):
        out, last = torch_forms.retention(
            q[:, start:end],
            k[:, start:end],
            v[:, start:end],
            powers,
            mode="parallel",
            state=state[s : s + 1],
            chunk_size=torch_forms.DEFAULT_CHUNK_SIZE,
        )
        outs.append(out)
        states.append(last)
    return torch.cat(outs, dim=1), torch.cat(states)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor, plan: ChunkPlan
) -> tuple[Tensor, Tensor]:
    across = powers.across_token()
    dtype = v.dtype
    q, k, v = torch_forms.widen(q, k, v)
    state = state[plan.order]
    outs = []
    for tokens in plan.steps:
        rows = tokens.shape[0]
        added = k[0, tokens].unsqueeze(-1) * v[0, tokens].unsqueeze(-2)
        new = advance_in_place(state[:rows], across, added)
        outs.append(torch_forms.read(q[0, tokens], new, powers.scale))
        state = torch.cat((new, state[rows:]))
    out = torch.cat(outs)[torch.cat(plan.steps).argsort()]
    return out.unsqueeze(0).to(dtype), state[plan.order.argsort()]


def _chunkwise(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor, plan: ChunkPlan
) -> tuple[Tensor, Tensor]:
    width = plan.tokens.shape[1]
    filled = torch.arange(width, device=q.device) < plan.lengths[:, None]  # (chunks, C)
    # Places past a chunk's end hold its last token again, so whatever is there is no worse than the data;
    # they come after all real tokens of their chunk, which causality keeps clean, and add nothing to states.
    dtype = v.dtype
    q, k, v = (torch_forms.by_head(x[0, plan.tokens].unsqueeze(0), state.dtype) for x in (q, k, v))
    starts, last = scan(k, v, state, powers, plan, filled)
    out = torch_forms.attend(q, k, v, starts.unsqueeze(0), powers.block(width))
    return torch_forms.by_token(out)[0, filled].unsqueeze(0).to(dtype), last


def scan(
    k: Tensor, v: Tensor, state: Tensor, powers: DecayPowers, plan: ChunkPlan, filled: Tensor
) -> tuple[Tensor, Tensor]:
    """The state before every chunk, (chunks, H, Dk, Dv), and after every sequence, (S, H, Dk, Dv)."""
    k = k.masked_fill(~filled[None, :, None, :, None], 0)
    added = torch_forms.block_additions(k, v, to_chunk_end(powers, plan, filled.shape[1])).squeeze(0)
    across = across_chunks(powers, plan)
    state = state[plan.order]
    before = []
    for chunks in plan.steps:
        active = state[: chunks.shape[0]]
        before.append(active)
        after = advance(active, across.each(itemgetter(chunks)), added[chunks])
        state = torch.cat((after, state[chunks.shape[0] :]))
    starts = torch.cat(before)[torch.cat(plan.steps).argsort()]
    return starts, state[plan.order.argsort()]


def to_chunk_end(powers: DecayPowers, plan: ChunkPlan, width: int) -> Tensor:
    """What is left of each token at its own chunk's end, (chunks, H, C, 1)."""
    places = torch.arange(width, device=plan.lengths.device)
    left = (plan.lengths[:, None] - 1 - places).clamp(min=0)
    return rearrange(powers.gamma_to(left), "h n l -> n h l 1")


def across_chunks(powers: DecayPowers, plan: ChunkPlan) -> Across:
    """What is left of a state after each chunk, two of (chunks, H, 1, 1)."""
    return powers.across(plan.lengths).each(lambda x: rearrange(x, "h n -> n h 1 1"))
