"""Chunkwise retention and POP in eager PyTorch, some blocks at a time; each formula beside its gradient.

A block is L tokens of one row and one head; products take many at once, as (N·B·H, L, D) in memory. The
block index comes first: of the states at N + 1 boundaries, (N + 1, B, H, Dk, Dv), the first N are before the
blocks and the last N after them. Results are written in place, in the states' dtype.

The formulas are those of `plain`. With G the gradient of the state after a block, S the state before it, and
g_i the gradient of output o_i, the gradients are

    dq_i = Σ_{j<=i} c γ^(i-j) (g_i · v_j) k_j  +  c γ^(i+1) S g_i
    dk_j = Σ_{i>=j} c γ^(i-j) (g_i · v_j) q_i  +  γ^(L-1-j) G v_j
    dv_j = Σ_{i>=j} c γ^(i-j) (q_i · k_j) g_i  +  γ^(L-1-j) Gᵀ k_j
    dS   = γ^L G + Σ_i c γ^(i+1) q_i g_iᵀ

The last line runs backwards over the blocks, as the states run forwards; the others take blocks at once.

ln γ needs no products of its own. With S_n the state after token n of a block and G_n its gradient, token n
adds d_n = ⟨G_n, γ S_{n-1}⟩ to the gradient of ln γ, and the recurrences of S and G give

    d_n = q_n · dq_n - k_n · dk_n + d_{n+1},    d_{L+1} = ⟨G, S_L⟩
    Σ_n d_n = Σ_n n (q_n · dq_n - k_n · dk_n) + L ⟨G, S_L⟩    (n = 1 .. L)

A block begins with its own exact d_{L+1}, so rounding errors do not add up over a long sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor

from retpop.ops.powers import Across, BlockPowers, DecayPowers, advance_in_place
from retpop.ops.rows import PopSpec
from retpop.ops.torch_backend import plain

VALUES_A_THREAD = 2**17
"""Numbers of a tensor that each CPU thread takes at once. A group then stays in the core's cache and reuses
memory; fresh memory would cost as much as the arithmetic."""

Tokens = Sequence[Tensor]
"""Tensors of tokens: queries, keys and values, (B, T, H, D), outputs, or gradients of them."""

Kept = tuple[list[Tensor], Tensor, Tensor]
"""The outputs, the final state, and the states that the gradients need."""


class Group(NamedTuple):
    """A group of blocks that are computed at once: all of some rows of a batch, or one block of each.

    Attributes:
        rows: of the batch.
        blocks: their indices in the row.
        tokens: their tokens.
        size: tokens in a block.
    """

    rows: slice
    blocks: slice
    tokens: slice
    size: int

    @property
    def num_blocks(self) -> int:
        """Blocks of each row."""
        return int(self.blocks.stop - self.blocks.start)

    def ends(self) -> Group:
        """The same blocks of a sequence that holds only the last token of each."""
        return Group(self.rows, self.blocks, self.blocks, 1)

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks of (B, T, H, D) by head, cast: (N·B·H, L, D). Perhaps ``x`` itself: not to be written to."""
        x = _by_head(x[self.rows, self.tokens], self.size)
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 2)

    def put(self, into: Tensor, blocks: Tensor) -> None:
        """The inverse of `take`: write blocks by head to their place in (B, T, H, D)."""
        place = _by_head(into[self.rows, self.tokens], self.size)
        place.copy_(blocks.view(place.shape))


def _by_head(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)  # (B, N·L, H, D) as (N, B, H, L, D)


def groups(x: Tensor, size: int) -> Iterator[Group]:
    """Cut (B, T, H, D) into blocks of ``size`` tokens, the last perhaps shorter, in groups.

    The blocks of a row come in order, and all full blocks before the shorter last ones.
    """
    full, left = divmod(x.shape[1], size)
    yield from _cut(x, size, 0, full)
    if left:
        for group in _cut(x, left, full, 1):
            yield group._replace(tokens=slice(full * size, full * size + left))


def _cut(x: Tensor, size: int, first: int, count: int) -> Iterator[Group]:
    """Groups of ``count`` blocks of equal size, from index ``first`` on."""
    batch = x.shape[0]
    cached = x.is_cpu and not torch.compiler.is_compiling()  # the backward pass may be compiled alone
    at_once = VALUES_A_THREAD * torch.get_num_threads() if cached else x.numel()
    limit = at_once // (size * x.shape[2] * x.shape[3])  # blocks
    rows, blocks = max(1, min(batch, limit)), max(1, limit // max(1, batch))
    for start in range(first, first + count, blocks):
        end = min(start + blocks, first + count)
        for row in range(0, batch, rows):
            yield Group(slice(row, row + rows), slice(start, end), slice(start * size, end * size), size)


class Blocks(NamedTuple):
    """Blocks of tokens by head: each (N·B·H, L, D).

    If only the last token's output is needed, ``q`` holds one token per block, and the powers are for it.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def outputs(self, starts: Tensor, powers: BlockPowers) -> Tensor:
        """The outputs, (N·B·H, L, Dv), from the states before the blocks, (N, B, H, Dk, Dv)."""
        scores = _scale(torch.bmm(self.q, self.k.mT), powers.within)
        out = _scale(torch.bmm(self.q, _flat(starts)), powers.from_start)
        return out.baddbmm_(scores, self.v)

    def gradients(
        self,
        grad: Tensor,
        read: Tensor,
        starts: Tensor,
        ends: Tensor | None,
        powers: BlockPowers,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """dq, dk and dv, laid out as the blocks; None where they are not needed.

        Args:
            grad: of the outputs.
            read: ``grad`` times ``powers.from_start``.
            starts: the states before the blocks, (N, B, H, Dk, Dv).
            ends: the gradients of the states after them, likewise; None if nothing follows.
            powers: of γ for L tokens.
            needs: which of the three are needed, and whether `add_decay_gradient` needs the first two.
        """
        dq = dk = dv = None
        of_queries, of_keys = needs[0] or needs[3], needs[1] or needs[3]
        if of_queries or of_keys:
            pairs = _scale(torch.bmm(grad, self.v.mT), powers.within)
        if of_queries:
            dq = torch.bmm(pairs, self.k).baddbmm_(read, _flat(starts).mT)
        if of_keys:
            dk = torch.bmm(pairs.mT, self.q)
            if ends is not None:
                dk.baddbmm_(scaled(self.v, powers.to_end), _flat(ends).mT)
        if needs[2]:
            scores = _scale(torch.bmm(self.q, self.k.mT), powers.within)
            dv = torch.bmm(scores.mT, grad)
            if ends is not None:
                dv.baddbmm_(scaled(self.k, powers.to_end), _flat(ends))
        return [dq, dk, dv]

    def add_decay_gradient(self, into: Tensor, found: Sequence[Tensor | None], after: Tensor | None) -> None:
        """Add the blocks' part of the gradient of ln γ to ``into`` (H,).

        Args:
            into: the sum.
            found: dq and dk, first of all.
            after: L ⟨G, S_L⟩ of each block, (N·B·H,); None if nothing follows.
        """
        dq, dk = cast(Tokens, found[:2])
        steps = torch.arange(1, self.k.shape[1] + 1, dtype=into.dtype, device=into.device)
        read = torch.linalg.vecdot(self.q, dq) @ steps[-self.q.shape[1] :]
        share = read - torch.linalg.vecdot(self.k, dk) @ steps
        into += (share if after is None else share + after).view(-1, into.shape[0]).sum(0)

    def additions(self, powers: BlockPowers, into: Tensor) -> None:
        """What each block adds to the state after it, (N, B, H, Dk, Dv)."""
        _flat(into).baddbmm_(scaled(self.k, powers.to_end).mT, self.v, beta=0)


def inner(grads: Tensor, states: Tensor) -> Tensor:
    """⟨G, S⟩ of states (N, B, H, Dk, Dv), (N·B·H,)."""
    return torch.linalg.vecdot(_flat(grads).flatten(1), _flat(states).flatten(1))


def carry(states: Tensor, across: Across, resets: Tensor | None = None) -> None:
    """Add to each state (N + 1, B, H, Dk, Dv) the decayed one before it; the first is complete."""
    for n in range(1, states.shape[0]):
        advance_in_place(states[n - 1], across, states[n])
        if resets is not None:  # not a product: 0 * NaN would carry a NaN into the next episode
            states[n].masked_fill_(resets[n], 0)


def carry_back(grads: Tensor, across: Across, resets: Tensor | None = None) -> None:
    """Add to the gradients of states (N + 1, B, H, Dk, Dv) the part from the states after them.

    The last one is complete; the others hold the part from outputs.
    """
    for n in range(grads.shape[0] - 2, -1, -1):
        advance_in_place(grads[n + 1], across, grads[n])
        if resets is not None:  # earlier states have no influence; 0 * NaN would carry a NaN back
            grads[n].masked_fill_(resets[n], 0)


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
                _flat(window[:-1]).baddbmm_(blocks.q.mT, read, beta=0)
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
                _flat(grad_starts).baddbmm_(blocks.q.mT, read)
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
                _flat(window[:-1]).baddbmm_(blocks.q.mT, read)
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


def _flat(states: Tensor) -> Tensor:
    """A group's states (N, B, H, Dk, Dv) as a view (N·B·H, Dk, Dv)."""
    return states.view(-1, *states.shape[-2:])


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """Blocks (N·B·H, L, D) times powers of γ, (H, L, D) or (N, H, L, D) or of width 1."""
    return (_in_rows(x, by) * by).view(x.shape)


def _scale(x: Tensor, by: Tensor) -> Tensor:
    """`scaled`, written over ``x``."""
    _in_rows(x, by).mul_(by)
    return x


def _in_rows(x: Tensor, by: Tensor) -> Tensor:
    return x.view(-1, *by.shape[:-2], *x.shape[1:])
