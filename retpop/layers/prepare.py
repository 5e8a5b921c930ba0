"""Preparation of a call of a layer or a decoder: checks, angles and powers of γ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retpop._torch import is_plain, own_parameter
from retpop.arguments import Inputs, autocast_is_on, dtype_after, is_eager, state_dtype
from retpop.config import RetNetConfig
from retpop.layers.call import Call, PopCall, SequenceCall
from retpop.ops import checks
from retpop.ops.dispatch import Backend, choose_backend
from retpop.ops.powers import DecayPowers, default_scale
from retpop.ops.rows import PopSpec, join_row
from retpop.ops.slices import Slices
from retpop.ops.torch_backend.packed import Packing
from retpop.position import (
    Phases,
    Rotation,
    boundary_positions,
    packed_positions,
    rotary_frequencies,
    rotary_turns,
    sequence_positions,
)
from retpop.state import RetNetState

Numbers = tuple[float, ...] | tuple[int, ...]


class Constants:
    """Decays and rotary frequencies: plain numbers that become tensors when a call needs them.

    They are not buffers, so emptying, casting, moving or loading a module cannot change them. A tensor is
    kept for the next call, because a copy from the host makes a GPU wait and cannot be captured in a graph. A
    copy or a pickle of a module starts without tensors.
    """

    def __init__(self, cfg: RetNetConfig) -> None:
        self.cfg = cfg
        self.head_dims = cfg.head_key_dim, cfg.head_value_dim
        self._scale = default_scale(cfg.scale, cfg.head_key_dim)
        self._kept: dict[tuple[Numbers, torch.device, torch.dtype], Tensor] = {}
        self._frequencies: tuple[float, ...] = ()
        if cfg.position is not None:
            self._frequencies = tuple(rotary_frequencies(cfg.position, cfg.head_key_dim).tolist())

    def powers(self, log_decays: tuple[float, ...] | Tensor, x: Tensor) -> DecayPowers:
        """The powers of γ for a call with tokens ``x``."""
        dtype = state_dtype(x.dtype)
        if isinstance(log_decays, Tensor):
            return DecayPowers(log_decays.to(x.device), self._scale, dtype)
        return DecayPowers(self._tensor(log_decays, x, dtype), self._scale, dtype, log_decays)

    def rotation(self, positions: Tensor, backend: Backend) -> Rotation | Phases | None:
        """The backend's rotation of tokens at ``positions`` (B or 1, T); None without rotary positions."""
        cfg = self.cfg
        if cfg.position is None:
            return None
        if positions.device.type == "mps":  # it has no float64
            turns = rotary_turns(cfg.position, cfg.head_key_dim)
            frequencies = self._tensor(turns, positions, torch.int64)
        else:
            frequencies = self._tensor(self._frequencies, positions, torch.float64)
        return backend.rotation(positions, frequencies, cfg.position, cfg.num_heads)

    def _tensor(self, numbers: Numbers, like: Tensor, dtype: torch.dtype) -> Tensor:
        """``numbers`` (N,) on the device of ``like``."""
        if not is_eager(like):  # a compiler takes them as literals; a transform's tensors must not outlive it
            return torch.tensor(numbers, dtype=dtype, device=like.device)
        key = (numbers, like.device, dtype)
        kept = self._kept.get(key)
        if kept is None:
            with torch.inference_mode(False):  # so that a later call can train
                kept = self._kept[key] = torch.tensor(numbers, dtype=dtype, device=like.device)
        return kept

    def __reduce__(self) -> tuple[type[Constants], tuple[RetNetConfig]]:
        return Constants, (self.cfg,)


def with_log_decays(
    call: Call, log_decays: tuple[float, ...] | Tensor, constants: Constants, x: Tensor
) -> Call:
    """The call of a layer with tokens ``x`` and its own log-decays."""
    if not isinstance(log_decays, Tensor) and log_decays == call.powers.values:
        return call
    powers = constants.powers(log_decays, x)
    if isinstance(call, SequenceCall):
        return replace(call, powers=powers)
    return replace(call, spec=call.spec._replace(powers=powers))


class Owner(NamedTuple):
    """The properties of the called module that preparation needs.

    Attributes:
        where: begins every message, for example ``RetNetDecoder()``.
        layers: its layers; a layer lists itself.
        log_decays: those of its config for the first layer.
        constants: those of its config.
    """

    where: str
    layers: Sequence[nn.Module]
    log_decays: tuple[float, ...]
    constants: Constants


def prepare(
    owner: Owner,
    x: Tensor,
    x_pred: Tensor | None,
    state: RetNetState | None,
    *,
    block_size: int | None,
    offset: int,
    reset: Tensor | None,
    main_out: str,
    mode: str,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    context_parallel: object,
    backend: str,
) -> tuple[Tensor, Call, Tensor]:
    """The tokens for the layers, the call, and the positions (B,) after it.

    The arguments are those of `RetNetDecoder.forward`; with ``x_pred`` it is a call of `RetNetDecoder.pop`.
    """
    _check_tokens(owner, "x", x, "BTE")
    if x_pred is None:
        _check_left_out(
            owner.where,
            "without x_pred",
            block_size=(block_size, None),
            offset=(offset, 0),
            main_out=(main_out, "all"),
        )
        return x, *_sequence(owner, x, state, mode, chunk_size, cu_seqlens, reset, context_parallel, backend)
    _check_left_out(
        owner.where,
        "with x_pred",
        mode=(mode, "chunkwise"),
        chunk_size=(chunk_size, None),
        cu_seqlens=(cu_seqlens, None),
    )
    _check_tokens(owner, "x_pred", x_pred, "BPME")
    if x_pred.shape[0] != x.shape[0]:
        raise ValueError(
            f"{owner.where}: x_pred has B={x_pred.shape[0]} but x has B={x.shape[0]}; they must agree."
        )
    if block_size is None:
        raise TypeError(f"{owner.where}: block_size is None; with x_pred it must be an int.")
    block_size, offset = checks.check_blocks(owner.where, x.shape[1], x_pred.shape[1], block_size, offset)
    checks.check_reset(owner.where, reset, "x", x, block_size)
    checks.check_main_out(owner.where, main_out)
    powers = owner.constants.powers(owner.log_decays, x)
    spec = PopSpec(powers, (x_pred.shape[1], x_pred.shape[2]), block_size, offset, reset, main_out)
    return join_row(x, x_pred), *_pop(owner, x, state, spec, context_parallel, backend)


def _sequence(
    owner: Owner,
    x: Tensor,
    state: RetNetState | None,
    mode: str,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    context_parallel: object,
    backend: str,
) -> tuple[SequenceCall, Tensor]:
    chunk_size = checks.check_mode(owner.where, mode, chunk_size)
    chosen = _choose(owner, x, backend)
    rows, length = x.shape[:2]
    if cu_seqlens is not None:
        checks.check_cu_seqlens(owner.where, cu_seqlens, "x", x)
        rows = cu_seqlens.shape[0] - 1
    checks.check_reset(owner.where, reset, "x", x)
    _check_state(owner, x, state, rows)
    start = None if state is None else state.position
    slices, own_start = None, start
    if context_parallel is not None:
        facts = _facts(owner, state)
        slices = Slices.of(owner.where, context_parallel, x, facts, reset, cu_seqlens=cu_seqlens)
        own_start, cu_seqlens = slices.start(start), slices.cu_seqlens
    cut = cu_seqlens is not None or reset is not None
    packing = Packing(owner.where, cu_seqlens, length, reset) if cut else None
    if cu_seqlens is not None:
        positions, after = packed_positions(own_start, cu_seqlens, length, reset)
    elif reset is not None:
        boundaries = boundary_positions(own_start, length, 1, reset, x.device)
        positions, after = boundaries[:, :-1], boundaries[:, -1].expand(rows).clone()
    else:
        positions = sequence_positions(own_start, length, x.device)
        after = _after(own_start, rows, length, x.device)
    if slices is not None:
        after = slices.end(start).expand(rows).clone()
    if mode == "chunkwise" and chunk_size is None:
        chunk_size = owner.constants.cfg.chunk_size
    call = SequenceCall(
        powers=owner.constants.powers(owner.log_decays, x),
        rotation=owner.constants.rotation(positions, chosen),
        mode=mode,
        chunk_size=chunk_size,
        packing=packing,
        backend=chosen,
        slices=slices,
    )
    return call, after


def _pop(
    owner: Owner,
    x: Tensor,
    state: RetNetState | None,
    spec: PopSpec,
    context_parallel: object,
    backend: str,
) -> tuple[PopCall, Tensor]:
    batch, length = x.shape[:2]
    _check_state(owner, x, state, batch)
    start = None if state is None else state.position
    size = spec.block_size
    slices, own_start = None, start
    if context_parallel is not None:
        slices = Slices.of(owner.where, context_parallel, x, _facts(owner, state), spec.reset, size)
        own_start = slices.start(start)
    boundaries = boundary_positions(own_start, length // size, size, spec.reset, x.device)
    num_predictions, pred_size = spec.predictions
    main = boundaries[:, :-1, None] + torch.arange(size, device=x.device)
    first = boundaries[:, spec.offset : spec.offset + num_predictions, None]
    pred = first + torch.arange(pred_size, device=x.device)
    positions = torch.cat((main.flatten(1), pred.flatten(1)), dim=1)
    chosen = _choose(owner, x, backend)
    call = PopCall(
        spec=spec,
        rotation=owner.constants.rotation(positions, chosen),
        backend=chosen,
        slices=slices,
    )
    after = boundaries[:, -1] if slices is None else slices.end(start)
    return call, after.expand(batch).clone()


def _facts(owner: Owner, state: RetNetState | None) -> dict[str, int]:
    """The properties in which the calls of all ranks must agree, see `Slices.of`."""
    gradient = int(torch.is_grad_enabled())
    return {"layers": len(owner.layers), "state": int(state is not None), "grad mode": gradient}


def _choose(owner: Owner, x: Tensor, backend: str) -> Backend:
    inputs = Inputs(x.device, dtype_after(x.device, x.dtype), *owner.constants.head_dims)
    return choose_backend(owner.where, backend, inputs)[0]


def _after(start: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    if start is None:
        return torch.full((rows,), length, dtype=torch.int64, device=device)
    return start + length


def _check_left_out(where: str, when: str, **arguments: tuple[object, object]) -> None:
    """Raise unless every argument, a value and a default, has its default."""
    for name, (value, default) in arguments.items():
        if isinstance(value, Tensor) or value != default:
            given = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{where}: {name} is {given}; {when} it must be {default!r}.")


def _check_tokens(owner: Owner, name: str, x: Tensor, layout: str) -> None:
    where, embed_dim = owner.where, owner.constants.cfg.embed_dim
    checks.check_layout(where, name, x, layout)
    if x.shape[-1] != embed_dim:
        raise ValueError(
            f"{where}: {name} is {tuple(x.shape)}; its last dimension must be embed_dim {embed_dim}."
        )
    weight = _first_weight(owner.layers[0])
    if isinstance(weight, Tensor) and (x.dtype, x.device) != (weight.dtype, weight.device):
        _check_beside(owner, name, x, weight)


def _first_weight(layer: nn.Module) -> object:
    """The weight of a layer's first projection; None if its module was replaced or computes its weight."""
    projection = getattr(getattr(layer, "retention", layer), "qkvg_proj", None)
    return own_parameter(projection, "weight") if isinstance(projection, nn.Linear) else None


def _check_beside(owner: Owner, name: str, x: Tensor, weight: Tensor) -> None:
    """Raise for tokens of another dtype or device than the first weight, unless they are cast or moved."""
    parts = list(owner.layers[0].modules())
    if not all(type(part).__module__.startswith(("torch.", "retpop.")) for part in parts):
        return  # a third-party class may cast its input
    if not all(is_plain(part, type(part)) for part in parts):
        return
    if x.device != weight.device:
        raise ValueError(f"{owner.where}: {name} is on {x.device} but the module is on {weight.device}.")
    # Autocast casts the inputs of linear layers, except float64; norms need the dtype of their weights.
    if autocast_is_on(x.device.type) and weight.dtype == torch.float32 and x.dtype != torch.float64:
        return
    raise TypeError(f"{owner.where}: {name} is {x.dtype} but the module's weights are {weight.dtype}.")


def _check_state(owner: Owner, x: Tensor, state: RetNetState | None, rows: int) -> None:
    if state is None:
        return
    where = owner.where
    if not isinstance(state, RetNetState):
        raise TypeError(f"{where}: state is {type(state).__name__}; it must be a retpop.RetNetState or None.")
    wanted = (len(owner.layers), rows, owner.constants.cfg.num_heads, *owner.constants.head_dims)
    if tuple(state.kv.shape) != wanted:
        raise ValueError(
            f"{where}: state.kv has shape {tuple(state.kv.shape)}; it must be {wanted}, "
            "(layers, B or number of packed sequences, H, Dk, Dv)."
        )
    dtype = state_dtype(x.dtype)
    if state.kv.dtype != dtype:
        raise TypeError(f"{where}: state.kv is {state.kv.dtype}; with x in {x.dtype} it must be {dtype}.")
    if state.position.dtype != torch.int64:
        raise TypeError(f"{where}: state.position is {state.position.dtype}; it must be torch.int64.")
    if state.position.shape != (rows,):
        raise ValueError(
            f"{where}: state.position has shape {tuple(state.position.shape)}; it must be ({rows},)."
        )
    for name, tensor in (("kv", state.kv), ("position", state.position)):
        if tensor.device != x.device:
            raise ValueError(f"{where}: state.{name} is on {tensor.device} but x is on {x.device}.")
