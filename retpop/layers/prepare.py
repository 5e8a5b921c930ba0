"""Checks and preparation that a retention layer and a decoder share: from a user's call to a `Call`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retpop.arguments import check_tensor, free_values
from retpop.config import RetNetConfig
from retpop.layers.calls import PopCall, SequenceCall
from retpop.ops import checks
from retpop.ops.autocast import autocast_is_on, dtype_after
from retpop.ops.decay_powers import DecayPowers, default_scale
from retpop.ops.dispatch import Backend, choose_backend
from retpop.ops.dtypes import INPUT_DTYPES, Inputs, state_dtype
from retpop.ops.packed import Packing
from retpop.ops.rows import PopSpec
from retpop.position import (
    Rotation,
    boundary_positions,
    packed_positions,
    rotation_at,
    sequence_positions,
)
from retpop.state import RetNetState


class Owner(NamedTuple):
    """What preparation needs of the module that was called.

    Attributes:
        where: begins every message, for example ``RetNetDecoder()``.
        cfg: its configuration.
        num_layers: layers that its state must have.
        weight: any of its weights: their dtype and device are what inputs must have.
        log_decay: (H,).
        frequencies: θ (Dk / 2,), or None without rotary positions.
    """

    where: str
    cfg: RetNetConfig
    num_layers: int
    weight: Tensor
    log_decay: Tensor
    frequencies: Tensor | None


def prepare_sequence(
    owner: Owner,
    x: Tensor,
    state: RetNetState | None,
    *,
    mode: str,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[SequenceCall, Tensor]:
    """The call that runs ``x`` (B, T, E) as a sequence, and the positions (B,) after it."""
    _check_tokens(owner, "x", x, "BTE")
    checks.check_mode(owner.where, mode, chunk_size)
    chosen = _choose(owner, x, backend)
    packing = None
    if cu_seqlens is not None:
        checks.check_cu_seqlens(owner.where, cu_seqlens, "x", x)
        packing = Packing(owner.where, cu_seqlens, x.shape[1])
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_state(owner, state, rows)
    start = None if state is None else state.position
    if cu_seqlens is None:
        positions = sequence_positions(start, x.shape[1], x.device)
        after = _after(start, rows, x.shape[1], x.device)
    else:
        positions, after = packed_positions(start, cu_seqlens, x.shape[1])
    if mode == "chunkwise" and chunk_size is None:
        chunk_size = owner.cfg.chunk_size
    call = SequenceCall(
        powers=_powers(owner),
        rotation=_rotation(owner, positions),
        mode=mode,
        chunk_size=chunk_size,
        packing=packing,
        backend=chosen,
    )
    return call, after


def prepare_pop(
    owner: Owner,
    x: Tensor,
    x_pred: Tensor,
    state: RetNetState | None,
    *,
    block_size: int,
    offset: int,
    reset: Tensor | None,
    main_out: str,
    backend: str,
) -> tuple[PopCall, Tensor]:
    """The call that runs ``x`` (B, T, E) and ``x_pred`` (B, P, M, E) as POP, and the positions after it."""
    _check_tokens(owner, "x", x, "BTE")
    _check_tokens(owner, "x_pred", x_pred, "BPME")
    (batch, length), (num_predictions, size) = x.shape[:2], x_pred.shape[1:3]
    if x_pred.shape[0] != batch:
        raise ValueError(
            f"{owner.where}: x_pred has B={x_pred.shape[0]} but x has B={batch}; they must agree."
        )
    checks.check_blocks(owner.where, length, num_predictions, block_size, offset)
    checks.check_reset(owner.where, reset, "x", x, block_size)
    checks.check_main_out(owner.where, main_out)
    _check_state(owner, state, batch)
    start = None if state is None else state.position
    boundaries = boundary_positions(start, length // block_size, block_size, reset, x.device)
    main = boundaries[:, :-1, None] + torch.arange(block_size, device=x.device)
    pred = boundaries[:, offset : offset + num_predictions, None] + torch.arange(size, device=x.device)
    call = PopCall(
        rotation=_rotation(owner, torch.cat((main.flatten(1), pred.flatten(1)), dim=1)),
        spec=PopSpec(_powers(owner), (num_predictions, size), block_size, offset, reset, main_out),
        backend=_choose(owner, x, backend),
    )
    return call, boundaries[:, -1].expand(batch).clone()


def _choose(owner: Owner, x: Tensor, backend: str) -> Backend:
    cfg = owner.cfg
    inputs = Inputs(x.device, dtype_after(x.device, x.dtype), cfg.head_key_dim, cfg.head_value_dim)
    return choose_backend(owner.where, backend, inputs)[0]


def _powers(owner: Owner) -> DecayPowers:
    scale = default_scale(owner.cfg.scale, owner.cfg.head_key_dim)
    dtype = state_dtype(owner.weight.dtype)
    return DecayPowers(owner.log_decay, scale, dtype, free_values(owner.log_decay))


def _rotation(owner: Owner, positions: Tensor) -> Rotation | None:
    if owner.frequencies is None or owner.cfg.position is None:
        return None
    return rotation_at(positions, owner.frequencies, owner.cfg.position)


def _after(start: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    if start is None:
        return torch.full((rows,), length, dtype=torch.int64, device=device)
    return start + length


def _check_tokens(owner: Owner, name: str, x: Tensor, layout: str) -> None:
    where, weight = owner.where, owner.weight
    checks.check_layout(where, name, x, layout)
    if x.shape[-1] != owner.cfg.embed_dim:
        raise ValueError(
            f"{where}: {name} is {tuple(x.shape)}; its last dimension must be "
            f"embed_dim {owner.cfg.embed_dim}."
        )
    if x.device != weight.device:
        raise ValueError(f"{where}: {name} is on {x.device} but the module is on {weight.device}.")
    # Autocast casts what linear layers are given, float64 excepted, and norms want what their weights are.
    cast = autocast_is_on(x.device.type) and weight.dtype == torch.float32 and x.dtype != torch.float64
    if x.dtype != weight.dtype and not cast:
        raise TypeError(f"{where}: {name} is {x.dtype} but the module's weights are {weight.dtype}.")


def _check_state(owner: Owner, state: RetNetState | None, rows: int) -> None:
    if state is None:
        return
    where, cfg = owner.where, owner.cfg
    if not isinstance(state, RetNetState):
        raise TypeError(f"{where}: state is {type(state).__name__}; it must be a retpop.RetNetState or None.")
    check_tensor(where, "state.kv", state.kv)
    check_tensor(where, "state.position", state.position)
    wanted = (owner.num_layers, rows, cfg.num_heads, cfg.head_key_dim, cfg.head_value_dim)
    if tuple(state.kv.shape) != wanted:
        raise ValueError(
            f"{where}: state.kv has shape {tuple(state.kv.shape)}; it must be {wanted}, "
            "(layers, B or number of packed sequences, H, Dk, Dv)."
        )
    dtype = state_dtype(owner.weight.dtype)
    if state.kv.dtype != dtype:
        raise TypeError(
            f"{where}: state.kv is {state.kv.dtype}; with weights in {owner.weight.dtype} it must be {dtype}."
        )
    if state.position.dtype != torch.int64:
        raise TypeError(f"{where}: state.position is {state.position.dtype}; it must be torch.int64.")
    if state.position.shape != (rows,):
        raise ValueError(
            f"{where}: state.position has shape {tuple(state.position.shape)}; it must be ({rows},)."
        )
    for name, tensor in (("kv", state.kv), ("position", state.position)):
        if tensor.device != owner.weight.device:
            raise ValueError(
                f"{where}: state.{name} is on {tensor.device} but the module is on {owner.weight.device}."
            )


def check_construction(where: str, cfg: RetNetConfig, dtype: torch.dtype | None) -> None:
    """Check what a layer or a decoder is made from."""
    if not isinstance(cfg, RetNetConfig):
        raise TypeError(f"{where}: cfg is {type(cfg).__name__}; it must be a retpop.RetNetConfig.")
    if dtype is not None and dtype not in INPUT_DTYPES:
        raise TypeError(f"{where}: dtype is {dtype}; it must be float64, float32, float16 or bfloat16.")
