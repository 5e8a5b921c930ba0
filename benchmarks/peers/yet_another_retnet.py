"""yet-another-retnet (PyPI, MIT; 0.5.1): its functions and layers, called as its authors call them.

Its caller loops over chunks and tokens and chooses the size of chunks; several sizes are measured. POP is a
port in two passes on its layers: the states of all blocks first, then all predictions at once. It makes
decays and positions in the dtype of the queries, so its results in bfloat16 are wrong. It caches the last
matrix of decays, so in a loop like ours it computes none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

NAME = "yet-another-retnet"

CHUNK_SIZES = (64, 128, 256, 512)


def is_there() -> bool:
    """Whether it is installed."""
    return find_spec("yet_another_retnet") is not None


def retentions(mode: str, chunk_size: int | None = None) -> dict[str, Callable[..., Tensor]]:
    """Its ways to compute retention of (B, T, H, D) in a mode, by name; none where it is not installed.

    Chunks have one size, or each of `CHUNK_SIZES`.
    """
    if not is_there():
        return {}
    if mode == "chunkwise":
        sizes = CHUNK_SIZES if chunk_size is None else (chunk_size,)
        return {f"{NAME}, chunks of {size}": partial(_chunkwise, size=size) for size in sizes}
    return {NAME: _parallel if mode == "parallel" else _recurrent}


def _parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from yet_another_retnet.retention import retention_parallel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return retention_parallel(q, k, v)[0].transpose(1, 2)


def _chunkwise(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, size: int) -> Tensor:
    from yet_another_retnet.retention import retention_chunkwise

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    outs, state = [], None
    for part in zip(*(x.split(size, dim=2) for x in (q, k, v)), strict=True):
        out, state = retention_chunkwise(*part, prev_state=state)
        outs.append(out)
    return torch.cat(outs, dim=2).transpose(1, 2)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from yet_another_retnet.retention import retention_recurrent

    outs, state = [], None
    for token in zip(*(x.unbind(1) for x in (q, k, v)), strict=True):
        out, state = retention_recurrent(*token, prev_state=state)
        outs.append(out)
    return torch.stack(outs, dim=1)


def step() -> Callable[..., tuple[Tensor, Tensor]]:
    """Its retention of one token, (B, H, D), from a state as it keeps states: to output and state."""
    from yet_another_retnet.retention import retention_recurrent

    return retention_recurrent


def pop_retention(
    main: list[Tensor], pred: list[Tensor], state: Tensor | None, block_size: int, offset: int
) -> tuple[Tensor, Tensor]:
    """POP on its functions in two passes: outputs (B, T, H, D) and predictions (B, P, M, H, D).

    ``state`` is in its convention: ours times Dk^-0.5.
    """
    from yet_another_retnet.retention import retention_chunkwise

    rows, num_preds = pred[0].shape[:2]
    main = [x.transpose(1, 2) for x in main]
    if state is None:
        state = main[0].new_zeros(*main[0].shape[:2], main[0].shape[-1], main[2].shape[-1])
    outs, states = [], [state]
    for block in zip(*(x.split(block_size, dim=2) for x in main), strict=True):
        out, state = retention_chunkwise(*block, prev_state=state)
        outs.append(out)
        states.append(state)
    starts = torch.stack(states[offset : offset + num_preds], dim=1).flatten(0, 1)
    predicted, _ = retention_chunkwise(*(x.flatten(0, 1).transpose(1, 2) for x in pred), prev_state=starts)
    return torch.cat(outs, dim=2).transpose(1, 2), predicted.transpose(1, 2).unflatten(0, (rows, num_preds))


def make_decoder(*, embed_dim: int, num_heads: int, num_layers: int, ffn_dim: int) -> Any:
    """Its decoder in eval mode, every layer with weights of its own."""
    from yet_another_retnet.retnet import RetNetDecoder, RetNetDecoderLayer

    layer = RetNetDecoderLayer(embed_dim, num_heads, ffn_dim, dropout=0.0)
    decoder = RetNetDecoder(layer, num_layers)
    for each in decoder.layers:  # copies of the first
        each.retention._reset_parameters()
        each._reset_parameters()
    return decoder.eval()


def decoder_pop(
    decoder: Any,
    x: Tensor,
    x_pred: Tensor,
    states: Tensor | None,
    position: Tensor | int,
    block_size: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """POP through its decoder's layers: outputs (B, T, E) and predictions (B, P, M, E).

    Args:
        decoder: from `make_decoder`.
        x, x_pred: (B, T, E) and (B, P, M, E).
        states: (layers, B, H, D, D), or None for the start of a sequence.
        position: of the first token.
        block_size, offset: as in `retpop.pop_retention`.
    """
    places = position + torch.arange(x.shape[1], device=x.device)
    starts = position + block_size * (offset + torch.arange(x_pred.shape[1], device=x.device))
    pred_places = starts[:, None] + torch.arange(x_pred.shape[2], device=x.device)
    for index, layer in enumerate(decoder.layers):
        mixing = layer.retention
        seen, seen_pred = layer.norm1(x), layer.norm1(x_pred)
        out, pred = pop_retention(
            _project(mixing, seen, places),
            _project(mixing, seen_pred, pred_places),
            None if states is None else states[index],
            block_size,
            offset,
        )
        x, x_pred = x + _finish(mixing, out, seen), x_pred + _finish(mixing, pred, seen_pred)
        x = x + layer._feedforward_block(layer.norm2(x))
        x_pred = x_pred + layer._feedforward_block(layer.norm2(x_pred))
    return x, x_pred


def _project(mixing: Any, x: Tensor, places: Tensor) -> list[Tensor]:
    """Queries, keys and values (..., H, D) of (..., E), the first two rotated."""
    from yet_another_retnet.retention import _theta_shift

    heads = (mixing.num_heads, mixing.embed_dim // mixing.num_heads)
    q, k, v = (proj(x).unflatten(-1, heads) for proj in (mixing.q_proj, mixing.k_proj, mixing.v_proj))
    angles = (places[..., None] * mixing.thetas)[..., None, :]
    sin, cos = torch.sin(angles), torch.cos(angles)
    return [_theta_shift(q, sin, cos), _theta_shift(k, sin, cos), v]


def _finish(mixing: Any, out: Tensor, x: Tensor) -> Tensor:
    """Norm, gate and output projection of (..., H, D)."""
    out = out.flatten(-2)
    normed = mixing.group_norm(out.flatten(0, -2)).view_as(out)
    return mixing.out_proj(normed * mixing.activation(mixing.g_proj(x)))
