"""A call of a layer or a decoder: the values that it computes once and passes to every layer.

A call is prepared once: arguments checked, backend chosen, powers of γ and rotation angles computed. Each
layer then hands it queries, keys and values. `SequenceCall` runs them as a sequence. `PopCall` takes
one row of the sequence's tokens followed by all prediction tokens; the other operations of a layer treat both
alike. Large passes without gradient are cut into microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor

from retpop._torch import pytree
from retpop.arguments import dtype_after, norm_dtype, outside_autocast, values_are_free
from retpop.config import RetNetConfig
from retpop.ops.dispatch import Backend
from retpop.ops.powers import DecayPowers
from retpop.ops.rows import PopSpec, split_row
from retpop.ops.slices import Slices
from retpop.ops.torch_backend.packed import Packing
from retpop.position import Phases, Rotation
from retpop.state import Uncast


@dataclass(frozen=True, kw_only=True)
class AnyCall:
    """The common part of both kinds of call.

    Attributes:
        rotation: of every token, or None without rotary positions.
        backend: the chosen backend.
        slices: the slices that the ranks hold, this call's among them; None: the sequences are whole.
    """

    rotation: Rotation | Phases | None
    backend: Backend
    slices: Slices | None = None

    def for_inner_layers(self) -> Self:
        """The call for a layer that is not the last: it returns the outputs of all tokens."""
        return self

    @property
    def tokens_apart(self) -> int | None:
        """The call may be split after any multiple of this number of tokens; None: nowhere."""
        return None

    def of_rows(self, rows: slice) -> Self:
        """The call of some rows of the batch."""
        if self.rotation is None or self.rotation[0].shape[0] == 1:  # one for all rows
            return self
        return replace(self, rotation=type(self.rotation)(*(x[rows] for x in self.rotation)))

    def of_tokens(self, tokens: slice) -> Self:
        """The call of some tokens of every row."""
        if self.rotation is None:
            return self
        return replace(self, rotation=type(self.rotation)(*(x[:, tokens] for x in self.rotation)))

    def readers(self, x: Tensor) -> Tensor:
        """The tokens of (B, T, ...) whose outputs are needed; only these need queries and a gate."""
        return x

    def rotate(self, q: Tensor, k: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Rotated queries of the readers and keys, (B, T, H, Dk), for `retention`."""
        if self.rotation is None or kind is None:
            return q, k
        return self.backend.rotate(q, k, self.rotation, kind)


@dataclass(frozen=True, kw_only=True)
class SequenceCall(AnyCall):
    """Retention over a sequence, or over packed sequences.

    Attributes:
        powers: the decays, and the powers of γ as they are needed.
        mode, chunk_size: as in `retpop.retention`.
        packing: the packed sequences and the resets, or None.
    """

    powers: DecayPowers
    mode: str
    chunk_size: int | None
    packing: Packing | None

    @property
    def tokens_apart(self) -> int | None:
        """See `AnyCall.tokens_apart`; parallel mode is one product over all tokens."""
        return None if self.mode == "parallel" or self.packing is not None else self.chunk_size or 1

    def of_rows(self, rows: slice) -> Self:
        """The call of some rows of the batch."""
        packing = None if self.packing is None else self.packing.of_rows(rows)
        return replace(super().of_rows(rows), packing=packing)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The part of the last layer's output that is returned to the caller."""
        return (x,)

    def retention(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Retention of (B, T, H, D): outputs (B, T, H, Dv) and the state after them."""

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            operation = partial(
                self.backend.retention,
                q,
                k,
                v,
                self.powers,
                mode=self.mode,
                chunk_size=self.chunk_size,
                packing=self.packing,
                out_dtype=out_dtype,
            )
            if self.slices is None:
                return operation(state=state)
            return self.slices.run(operation, k, v, state, self.powers)

        out_dtype = _out_dtype(v)
        out, state = outside_autocast(run, q, k, v)
        return out, state


@dataclass(frozen=True, kw_only=True)
class PopCall(AnyCall):
    """POP over a row of T sequence tokens followed by P·M prediction tokens.

    Attributes:
        spec: POP's arguments beside its tensors.
    """

    spec: PopSpec

    @property
    def powers(self) -> DecayPowers:
        """The decays, and the powers of γ as they are needed."""
        return self.spec.powers

    def for_inner_layers(self) -> PopCall:
        """The same call with outputs of all tokens."""
        return replace(self, spec=self.spec._replace(main_out="all"))

    def of_rows(self, rows: slice) -> Self:
        """The call of some rows of the batch."""
        reset = None if self.spec.reset is None else self.spec.reset[rows]
        return replace(super().of_rows(rows), spec=self.spec._replace(reset=reset))

    def readers(self, x: Tensor) -> Tensor:
        """The row (B, T + P·M, ...) itself, or its short row (`retpop.ops.rows`)."""
        return self.spec.readers(x)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The sequence's outputs and the predictions; in training in separate memory, to change in place."""
        main, pred = split_row(x, self.spec.predictions)
        return (main.clone(), pred.clone()) if x.requires_grad else (main, pred)

    def rotate(self, q: Tensor, k: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """See `AnyCall.rotate`."""
        if self.rotation is None or kind is None:
            return q, k
        return self.backend.rotate(q, k, self.rotation, kind, self.spec)

    def retention(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """POP of rows (B, T + P·M, H, D): the readers' outputs and the state after the sequence."""

        def run(*rows: Tensor) -> tuple[Tensor, ...]:
            operation = partial(self.backend.pop, rows, spec=spec)
            if self.slices is None:
                return operation(state=state)
            k, v = (split_row(row, spec.predictions)[0] for row in rows[1:])
            return self.slices.run(operation, k, v, state, self.powers)

        spec = self.spec._replace(out_dtype=_out_dtype(v))
        out, state = outside_autocast(run, q, k, v)
        return out, state


def _out_dtype(v: Tensor) -> torch.dtype:
    """The dtype in which retention's output goes to the head norm, after autocast of ``v``."""
    return norm_dtype(dtype_after(v.device, v.dtype))


Call = SequenceCall | PopCall


# ---- microbatches ----

# A large pass without gradient goes through all layers part by part, so that intermediate results stay in a
# processor's cache. Their memory is reused, too: a matrix product of REM's decoder that writes into fresh
# memory, page by page, takes 1.3 times as long (docs/performance_notes.md).

ELEMENTS_AT_ONCE = 2**21
"""Elements per thread that a layer's widest tensor has in one microbatch."""

THREADS = 3
"""Most threads that microbatches grow with. A float32 tensor then stays below 32 MB, the size from which
glibc returns memory to the system, and a microbatch has enough work for the overhead of its calls."""

Layers = Callable[[Tensor, Tensor | None, Call], tuple[Tensor, Tensor]]


def tokens_at_once(cfg: RetNetConfig, x: Tensor) -> int | None:
    """The number of tokens of (B, T, E) in a microbatch; None: the call is not split.

    It is None on a GPU, and where a gradient, a compiler or a transform would see the microbatches.
    """
    if torch.is_grad_enabled() or not values_are_free(x):
        return None
    hidden = cfg.ffn_dim * (2 if cfg.ffn == "glu" else 1)
    projected = 2 * ((cfg.key_dim or cfg.embed_dim) + (cfg.value_dim or cfg.embed_dim))
    most = max(1, ELEMENTS_AT_ONCE * min(torch.get_num_threads(), THREADS) // max(hidden, projected))
    return None if x.shape[0] * x.shape[1] <= most else most


def run_in_parts(
    layers: Layers, x: Tensor, kv: Tensor | None, call: Call, most: int
) -> tuple[Tensor, Tensor]:
    """Outputs of ``layers`` from (B, T, E) and states (layers, B, H, Dk, Dv), ``most`` tokens at once.

    Microbatches are rows of the batch; a longer row is split by tokens if the call allows it.
    """
    batch, length = x.shape[:2]
    if batch > 1 and batch * length > most:
        outs, states = [], []
        for rows in even_slices(batch, max(1, most // length)):
            own_kv = None if kv is None else kv[:, rows]
            out, after = run_in_parts(layers, x[rows], own_kv, call.of_rows(rows), most)
            outs.append(out)
            states.append(after)
        return torch.cat(outs), torch.cat(states, dim=1)
    unit = call.tokens_apart
    parts = [slice(None)] if unit is None else even_slices(length, most, unit)
    if len(parts) == 1:
        return layers(x, kv, call)
    outs = []
    for tokens in parts:
        out, kv = layers(x[:, tokens], kv, call.of_tokens(tokens))
        outs.append(out)
    return torch.cat(outs, dim=1), cast(Tensor, kv)


def even_slices(total: int, most: int, unit: int = 1) -> list[slice]:
    """``total`` in slices of about equal size, multiples of ``unit`` except the last.

    Each has at most ``most``, or one ``unit``.
    """
    parts = math.ceil(total / max(unit, most - most % unit))
    size = math.ceil(total / (parts * unit)) * unit
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


# ---- from layer to layer ----


class Hidden(Uncast):
    """The prepared call, hidden from casts like a layer's state (see `Uncast`)."""

    __slots__ = ("call",)

    def __init__(self, call: Call, kv: Tensor | None) -> None:
        super().__init__(kv)
        self.call = call


@dataclass(frozen=True)
class Carry:
    """What a decoder passes to a layer and gets back: the layer's state and the prepared call.

    Attributes:
        kv: the layer's state (B, H, Dk, Dv), or None for the start of a sequence.
        hidden: the call; the last layer's may return fewer tokens.
    """

    kv: Tensor | None
    hidden: Hidden

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "kv", self.hidden.before_cast(self.kv))

    @staticmethod
    def of(call: Call, kv: Tensor | None) -> Carry:
        """A state with its call."""
        return Carry(kv, Hidden(call, kv))

    @property
    def call(self) -> Call:
        """The call that was prepared."""
        return self.hidden.call


pytree.register_pytree_node(  # some versions of FSDP flatten such tuples
    Carry,
    lambda carry: ([carry.kv], carry.hidden),
    lambda leaves, hidden: Carry(next(iter(leaves)), hidden),
    serialized_type_name="retpop.layers.Carry",
)
