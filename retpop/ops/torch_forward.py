"""Chunkwise retention and POP a stretch of blocks at a time, written into place: what eager PyTorch runs.

The formulas are those of `torch_forms`. Nothing here can be differentiated: the gradients are in
`torch_backward`, and `torch_backend` puts the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from retpop.ops.blocks import Stretch, flat, scale_in_place, scaled, stretches
from retpop.ops.decay_powers import BlockPowers, DecayPowers, advance_in_place
from retpop.ops.rows import PopSpec

Tokens = Sequence[Tensor]
"""Tensors of tokens: queries, keys and values, (B, T, H, D), outputs, or gradients of them."""


def retention(
    tokens: Tokens, powers: DecayPowers, *, state: Tensor, chunk_size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Retention of q, k and v.

    Args:
        tokens: q, k, v, (B, T, H, D).
        powers: the decays, with the scale c.
        state: before the first token, (B, H, Dk, Dv).
        chunk_size: tokens in a chunk.
        keep: whether the states between are wanted as well.

    Returns:
        The outputs, (B, T, H, Dv); the state after the last token; and, with ``keep``, the states before all
        chunks and after the last, (N + 1, B, H, Dk, Dv).
    """
    q, k, v = tokens
    out = v.new_empty(v.shape)
    cuts = list(stretches(k, chunk_size))
    held = 0 if not cuts else cuts[-1].blocks.stop if keep else cuts[0].num_blocks
    states = state.new_empty(held + 1, *state.shape)
    states[0] = state
    for part in cuts:
        first = part.blocks.start if keep else 0
        window = states[first : first + part.num_blocks + 1, part.rows]
        tables = powers.block(part.size)
        q_part, k_part, v_part = (part.take(x, state.dtype) for x in (q, k, v))
        _carry(window, k_part, v_part, tables)
        part.put(out, _attend(q_part, k_part, v_part, window[:-1], tables))
        if not keep:
            states[0, part.rows] = window[-1]
    return out, states[-1 if keep else 0].clone(), states


def pop(tokens: Tokens, spec: PopSpec, *, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """POP of a sequence and of predictions.

    Args:
        tokens: q, k, v of rows, or of the sequence and then of the predictions: see `parts`.
        spec: what is told beside them.
        state: before the first block, (B, H, Dk, Dv).

    Returns:
        The outputs, of rows or of both, and the states B_0 ... B_N as blocks and predictions read them,
        (N + 1, B, H, Dk, Dv).
    """
    outs = [v.new_empty(*q.shape[:-1], v.shape[-1]) for q, v in zip(tokens[::3], tokens[2::3], strict=True)]
    (q, k, v), pred = parts(tokens, spec)
    (out,), (out_pred,) = parts(outs, spec)
    resets = reset_boundaries(spec)
    states = state.new_empty(1 + k.shape[1] // spec.block_size, *state.shape)
    states[0] = state if resets is None else state.masked_fill(resets[0], 0)
    for part in stretches(k, spec.block_size):
        boundaries = slice(part.blocks.start, part.blocks.stop + 1), part.rows
        window = states[boundaries]
        readers, tables = readers_of(part, spec)
        q_part, k_part, v_part = readers.take(q, state.dtype), *(part.take(x, state.dtype) for x in (k, v))
        _carry(window, k_part, v_part, tables, None if resets is None else resets[boundaries])
        readers.put(out, _attend(q_part, k_part, v_part, window[:-1], tables))
    for part in prediction_stretches(pred, spec):
        starts = states[spec.offset :][part.blocks, part.rows]
        q_part, k_part, v_part = (part.take(x, state.dtype) for x in pred)
        part.put(out_pred, _attend(q_part, k_part, v_part, starts, spec.powers.block(part.size)))
    return outs, states


def parts(tensors: Tokens, spec: PopSpec) -> tuple[Tokens, Tokens]:
    """Sequence and predictions as views (B, ·, H, D): of rows, or of the one's tensors and the other's."""
    if tensors[-1].dim() == 5:
        half = len(tensors) // 2
        return tensors[:half], [x.flatten(1, 2) for x in tensors[half:]]
    behind = prod(spec.predictions)
    main, pred = zip(*(x.split((x.shape[1] - behind, behind), dim=1) for x in tensors), strict=True)
    return main, pred


def prediction_stretches(pred: Tokens, spec: PopSpec) -> Iterable[Stretch]:
    """The stretches of predictions (B, P·M, H, D), one block each; none where M is 0."""
    return stretches(pred[1], spec.predictions[1]) if spec.predictions[1] else ()


def reset_boundaries(spec: PopSpec) -> Tensor | None:
    """Where the state at a boundary is dropped, (N + 1, B, 1, 1, 1); never at the last one."""
    if spec.reset is None:
        return None
    never = spec.reset.new_zeros(1, spec.reset.shape[0])
    return torch.cat((spec.reset.T, never))[:, :, None, None, None]


def readers_of(part: Stretch, spec: PopSpec) -> tuple[Stretch, BlockPowers]:
    """Where the queries and outputs of a stretch of the sequence are, and the powers for them."""
    tables = spec.powers.block(part.size)
    return (part.ends(), tables.of_last_token()) if spec.main_out == "last" else (part, tables)


def _carry(states: Tensor, k: Tensor, v: Tensor, tables: BlockPowers, resets: Tensor | None = None) -> None:
    """Fill in the states (N + 1, B, H, Dk, Dv) behind the first one, which is given."""
    flat(states[1:]).baddbmm_(scaled(k, tables.to_end).mT, v, beta=0)
    for n in range(1, states.shape[0]):
        advance_in_place(states[n - 1], tables.across, states[n])
        if resets is not None:  # not a product: 0 * NaN would carry a NaN over into the next episode
            states[n].masked_fill_(resets[n], 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, states: Tensor, tables: BlockPowers) -> Tensor:
    """The outputs of blocks (N·B·H, L, D), each from the state before it."""
    scores = scale_in_place(torch.bmm(q, k.mT), tables.within)
    out = scale_in_place(torch.bmm(q, flat(states)), tables.from_start)
    return out.baddbmm_(scores, v)
