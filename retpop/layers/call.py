"""What one call of a layer or a decoder fixes for all of its layers, and what it hands from layer to layer.

A call is prepared once: arguments checked, backend chosen, powers of γ and rotation angles computed. Each
layer then hands it queries, keys and values. `SequenceCall` runs them as a sequence; `PopCall` takes the
tokens of a sequence with all prediction tokens behind them in one row, so that every other operation of a
layer treats both alike, and tells them apart only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retpop.arguments import check_tensor
from retpop.layers.constants import Constants
from retpop.layers.plain import is_plain
from retpop.ops import checks
from retpop.ops.autocast import autocast_is_on, dtype_after, outside_autocast
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dispatch import Backend, choose_backend
from retpop.ops.dtypes import Inputs, state_dtype
from retpop.ops.packed import Packing
from retpop.ops.rows import PopSpec, join_row, split_row
from retpop.position import Rotation, boundary_positions, packed_positions, sequence_positions
from retpop.state import RetNetState, Uncast


@dataclass(frozen=True, kw_only=True)
class AnyCall:
    """What both kinds of call have.

    Attributes:
        rotation: of every token, or None without rotary positions.
        backend: the backend that was chosen.
    """

    rotation: Rotation | None
    backend: Backend

    def for_inner_layers(self) -> Self:
        """The call of a layer that another one follows, which wants all of its tokens."""
        return self

    @property
    def tokens_apart(self) -> int | None:
        """After any multiple of so many tokens the call may be cut in two; None: nowhere."""
        return None

    def of_rows(self, rows: slice) -> Self:
        """The call of some rows of the batch."""
        if self.rotation is None or self.rotation.cos.shape[0] == 1:  # one for all rows
            return self
        return replace(self, rotation=Rotation(*(x[rows] for x in self.rotation)))

    def of_tokens(self, tokens: slice) -> Self:
        """The call of some tokens of every row."""
        if self.rotation is None:
            return self
        return replace(self, rotation=Rotation(*(x[:, tokens] for x in self.rotation)))

    def readers(self, x: Tensor) -> Tensor:
        """The tokens of (B, T, ...) whose outputs are wanted: the only ones that need queries and a gate."""
        return x

    def rotate(self, q: Tensor, k: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Queries of the readers, and keys, (B, T, H, Dk), by their tokens' rotation; for `retain`."""
        if self.rotation is None or kind is None:
            return q, k
        return self.backend.rotate(q, k, self.rotation, kind)


@dataclass(frozen=True, kw_only=True)
class SequenceCall(AnyCall):
    """Retention over a sequence, or over packed sequences.

    Attributes:
        powers: the decays, and the powers of γ as they are needed.
        mode, chunk_size: as in `retpop.retention`.
        packing: the packed sequences, or None.
    """

    powers: DecayPowers
    mode: str
    chunk_size: int | None
    packing: Packing | None

    @property
    def tokens_apart(self) -> int | None:
        """See `AnyCall.tokens_apart`; parallel mode is one product over all tokens."""
        return None if self.mode == "parallel" or self.packing is not None else self.chunk_size or 1

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the caller is given of the last layer's output."""
        return (x,)

    def retain(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Retention of (B, T, H, D): outputs (B, T, H, Dv) and the state after them."""
        run = partial(
            self.backend.retention,
            powers=self.powers,
            mode=self.mode,
            state=state,
            chunk_size=self.chunk_size,
            packing=self.packing,
        )
        return outside_autocast(run, q, k, v)


@dataclass(frozen=True, kw_only=True)
class PopCall(AnyCall):
    """POP over a row of T sequence tokens and, behind them, P·M prediction tokens.

    Attributes:
        spec: what POP is told beside its tensors.
    """

    spec: PopSpec

    @property
    def powers(self) -> DecayPowers:
        """The decays, and the powers of γ as they are needed."""
        return self.spec.powers

    def for_inner_layers(self) -> PopCall:
        """The same call, with all tokens coming out."""
        return replace(self, spec=self.spec._replace(main_out="all"))

    def of_rows(self, rows: slice) -> Self:
        """The call of some rows of the batch."""
        reset = None if self.spec.reset is None else self.spec.reset[rows]
        return replace(super().of_rows(rows), spec=self.spec._replace(reset=reset))

    def readers(self, x: Tensor) -> Tensor:
        """The row (B, T + P·M, ...) itself, or its short row (`retpop.ops.rows`)."""
        return self.spec.readers(x)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The sequence's outputs and the predictions; in training apart in memory, so each can be changed."""
        main, pred = split_row(x, self.spec.predictions)
        return (main.clone(), pred.clone()) if x.requires_grad else (main, pred)

    def rotate(self, q: Tensor, k: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """See `AnyCall.rotate`."""
        if self.rotation is None or kind is None:
            return q, k
        return self.backend.rotate(q, k, self.rotation, kind, self.spec)

    def retain(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """POP of rows (B, T + P·M, H, D): the readers' outputs and the state after the sequence."""

        def run(*rows: Tensor) -> tuple[Tensor, ...]:
            return self.backend.pop(rows, state, self.spec)

        out, state = outside_autocast(run, q, k, v)
        return out, state


Call = SequenceCall | PopCall


def with_log_decays(
    call: Call, log_decays: tuple[float, ...] | Tensor, constants: Constants, x: Tensor
) -> Call:
    """The call of a layer with tokens ``x`` and these log-decays, which need not be the first layer's."""
    if not isinstance(log_decays, Tensor) and log_decays == call.powers.values:
        return call
    powers = constants.powers(log_decays, x)
    if isinstance(call, SequenceCall):
        return replace(call, powers=powers)
    return replace(call, spec=call.spec._replace(powers=powers))


class Hidden(Uncast):
    """The call that was prepared, hidden like a layer's state from what casts (see `Uncast`)."""

    __slots__ = ("call",)

    def __init__(self, call: Call, kv: Tensor | None) -> None:
        super().__init__(kv)
        self.call = call


@dataclass(frozen=True)
class Carry:
    """What a decoder hands to a layer, and a layer gives back: its state, and the call that was prepared.

    Attributes:
        kv: the layer's state (B, H, Dk, Dv), or None for the start of a sequence.
        hidden: the call, the same for all layers but the last, which may give out fewer tokens.
    """

    kv: Tensor | None
    hidden: Hidden

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "kv", self.hidden.before_cast(self.kv))

    @staticmethod
    def of(call: Call, kv: Tensor | None) -> Carry:
        """A state with the call that it belongs to."""
        return Carry(kv, Hidden(call, kv))

    @property
    def call(self) -> Call:
        """The call that was prepared."""
        return self.hidden.call


pytree.register_pytree_node(  # some versions of FSDP flatten what they look into
    Carry,
    lambda carry: ([carry.kv], carry.hidden),
    lambda leaves, hidden: Carry(next(iter(leaves)), hidden),
    serialized_type_name="retpop.layers.Carry",
)


class Owner(NamedTuple):
    """What preparation needs of the module that was called.

    Attributes:
        where: begins every message, for example ``RetNetDecoder()``.
        layers: its layers, or the one that it is.
        log_decays: what its config gives to the first of them.
        constants: of its config.
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
    backend: str,
) -> tuple[Tensor, Call, Tensor]:
    """The tokens that go through the layers, the call, and the positions (B,) after it.

    The arguments are those of `RetNetDecoder.forward`; with ``x_pred`` it is a call of `RetNetDecoder.pop`.
    """
    _check_tokens(owner, "x", x, "BTE")
    if x_pred is None:
        _check_left_out(
            owner.where,
            "without x_pred",
            block_size=(block_size, None),
            offset=(offset, 0),
            reset=(reset, None),
            main_out=(main_out, "all"),
        )
        return x, *_sequence(owner, x, state, mode, chunk_size, cu_seqlens, backend)
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
    checks.check_blocks(owner.where, x.shape[1], x_pred.shape[1], block_size, offset)
    checks.check_reset(owner.where, reset, "x", x, block_size)
    checks.check_main_out(owner.where, main_out)
    powers = owner.constants.powers(owner.log_decays, x)
    spec = PopSpec(powers, (x_pred.shape[1], x_pred.shape[2]), block_size, offset, reset, main_out)
    return join_row(x, x_pred), *_pop(owner, x, state, spec, backend)


def _sequence(
    owner: Owner,
    x: Tensor,
    state: RetNetState | None,
    mode: str,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[SequenceCall, Tensor]:
    checks.check_mode(owner.where, mode, chunk_size)
    chosen = _choose(owner, x, backend)
    packing = None
    rows = x.shape[0]
    if cu_seqlens is not None:
        checks.check_cu_seqlens(owner.where, cu_seqlens, "x", x)
        packing = Packing(owner.where, cu_seqlens, x.shape[1])
        rows = cu_seqlens.shape[0] - 1
    _check_state(owner, x, state, rows)
    start = None if state is None else state.position
    if cu_seqlens is None:
        positions = sequence_positions(start, x.shape[1], x.device)
        after = _after(start, rows, x.shape[1], x.device)
    else:
        positions, after = packed_positions(start, cu_seqlens, x.shape[1])
    if mode == "chunkwise" and chunk_size is None:
        chunk_size = owner.constants.cfg.chunk_size
    call = SequenceCall(
        powers=owner.constants.powers(owner.log_decays, x),
        rotation=owner.constants.rotation(positions),
        mode=mode,
        chunk_size=chunk_size,
        packing=packing,
        backend=chosen,
    )
    return call, after


def _pop(
    owner: Owner, x: Tensor, state: RetNetState | None, spec: PopSpec, backend: str
) -> tuple[PopCall, Tensor]:
    batch, length = x.shape[:2]
    _check_state(owner, x, state, batch)
    start = None if state is None else state.position
    size = spec.block_size
    boundaries = boundary_positions(start, length // size, size, spec.reset, x.device)
    num_predictions, pred_size = spec.predictions
    main = boundaries[:, :-1, None] + torch.arange(size, device=x.device)
    first = boundaries[:, spec.offset : spec.offset + num_predictions, None]
    pred = first + torch.arange(pred_size, device=x.device)
    positions = torch.cat((main.flatten(1), pred.flatten(1)), dim=1)
    call = PopCall(
        spec=spec, rotation=owner.constants.rotation(positions), backend=_choose(owner, x, backend)
    )
    return call, boundaries[:, -1].expand(batch).clone()


def _choose(owner: Owner, x: Tensor, backend: str) -> Backend:
    cfg = owner.constants.cfg
    inputs = Inputs(x.device, dtype_after(x.device, x.dtype), cfg.head_key_dim, cfg.head_value_dim)
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
    """The weight that meets a layer's tokens first; None where something else stands in its place."""
    retention = getattr(layer, "retention", layer)
    return getattr(getattr(retention, "qkvg_proj", None), "weight", None)


def _check_beside(owner: Owner, name: str, x: Tensor, weight: Tensor) -> None:
    """Raise for tokens of another kind than the first weight, where nothing casts or moves either."""
    if not all(is_plain(part, type(part)) for part in owner.layers[0].modules()):
        return
    if x.device != weight.device:
        raise ValueError(f"{owner.where}: {name} is on {x.device} but the module is on {weight.device}.")
    # Autocast casts what linear layers are given, float64 excepted, and norms want what their weights are.
    if autocast_is_on(x.device.type) and weight.dtype == torch.float32 and x.dtype != torch.float64:
        return
    raise TypeError(f"{owner.where}: {name} is {x.dtype} but the module's weights are {weight.dtype}.")


def _check_state(owner: Owner, x: Tensor, state: RetNetState | None, rows: int) -> None:
    if state is None:
        return
    where, cfg = owner.where, owner.constants.cfg
    if not isinstance(state, RetNetState):
        raise TypeError(f"{where}: state is {type(state).__name__}; it must be a retpop.RetNetState or None.")
    check_tensor(where, "state.kv", state.kv)
    check_tensor(where, "state.position", state.position)
    wanted = (len(owner.layers), rows, cfg.num_heads, cfg.head_key_dim, cfg.head_value_dim)
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
