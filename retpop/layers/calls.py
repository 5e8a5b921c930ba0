"""What one call of a layer or a decoder fixes for all of its layers.

A call is prepared once: arguments checked, backend chosen, powers of γ and rotation angles computed. Each
layer then hands it queries, keys and values. `SequenceCall` runs them as a sequence; `PopCall` takes the
tokens of a sequence with all prediction tokens behind them in one row, so that every other operation of a
layer treats both alike, and tells them apart only here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from retpop.ops import triton_backend
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dispatch import BackendName
from retpop.ops.packed import Packing
from retpop.ops.pop import run_pop_rows
from retpop.ops.retention import run_retention
from retpop.ops.rows import lengthened, shortened
from retpop.position import Rotation, rotate


@dataclass(frozen=True, kw_only=True)
class AnyCall:
    """What both kinds of call have.

    Attributes:
        powers: the decays, and the powers of γ as they are needed.
        rotation: of every token, or None without rotary positions.
        backend: the backend that was chosen.
    """

    powers: DecayPowers
    rotation: Rotation | None
    backend: BackendName

    def for_inner_layers(self) -> AnyCall:
        """The call of a layer that another one follows, which wants all of its tokens."""
        return self

    @property
    def tokens_apart(self) -> int | None:
        """Tokens after any multiple of which the call may be cut in two, state in between; None: nowhere."""
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

    def turn(self, q: Tensor, k: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Queries of the readers, and keys, (B, T, H, Dk), turned by their tokens' rotation."""
        if self.rotation is None or kind is None:
            return q, k
        if self.backend == "triton":
            return triton_backend.rotated(q, k, self.rotation, kind)
        return rotate(q, self.rotation, kind), rotate(k, self.rotation, kind)


@dataclass(frozen=True, kw_only=True)
class SequenceCall(AnyCall):
    """Retention over a sequence, or over packed sequences.

    Attributes:
        mode, chunk_size: as in `retpop.retention`.
        packing: the packed sequences, or None.
    """

    mode: str
    chunk_size: int | None
    packing: Packing | None

    @property
    def tokens_apart(self) -> int | None:
        """See `AnyCall.tokens_apart`; parallel mode is one product over all tokens."""
        return None if self.mode == "parallel" or self.packing is not None else self.chunk_size or 1

    def retain(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Retention of (B, T, H, D): outputs (B, T, H, Dv) and the state after them."""
        return run_retention(
            q,
            k,
            v,
            self.powers,
            mode=self.mode,
            state=state,
            chunk_size=self.chunk_size,
            packing=self.packing,
            backend=self.backend,
        )


@dataclass(frozen=True, kw_only=True)
class PopCall(AnyCall):
    """POP over a row of T sequence tokens and, behind them, P·M prediction tokens.

    Attributes:
        predictions: (P, M).
        block_size, offset, reset: as in `retpop.pop_retention`.
        main_out: "all"; or "last": the outputs are a short row (`retpop.ops.rows`), the last token of each
            block and the predictions.
    """

    predictions: tuple[int, int]
    block_size: int
    offset: int
    reset: Tensor | None
    main_out: str

    def for_inner_layers(self) -> PopCall:
        """The same call, with all tokens coming out."""
        return replace(self, main_out="all")

    def of_rows(self, rows: slice) -> Self:
        """The call of some rows of the batch."""
        reset = None if self.reset is None else self.reset[rows]
        return replace(super().of_rows(rows), reset=reset)

    def readers(self, x: Tensor) -> Tensor:
        """The row (B, T + P·M, ...) itself, or its short row."""
        return x if self.main_out == "all" else shortened(x, self.predictions, self.block_size)

    def turn(self, q: Tensor, k: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Queries and keys turned, see `AnyCall.turn`; queries of a full row where the backend wants one."""
        if self.main_out == "last" and self.backend != "torch":
            # Kernels and the reference answer every query. Each has its own answer, so those of tokens
            # that nobody wants may be anything, and `retain` drops what comes of them.
            q = lengthened(q, self.predictions, self.block_size)
        elif self.main_out == "last" and self.rotation is not None and kind is not None:
            own = Rotation(*(self.readers(x) for x in self.rotation))
            return rotate(q, own, kind), rotate(k, self.rotation, kind)
        return super().turn(q, k, kind)

    def retain(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """POP of rows (B, T + P·M, H, D): the readers' outputs and the state after the sequence."""
        out, state = run_pop_rows(
            q,
            k,
            v,
            self.powers,
            predictions=self.predictions,
            block_size=self.block_size,
            offset=self.offset,
            state=state,
            reset=self.reset,
            backend=self.backend,
            main_out=self.main_out if self.backend == "torch" else "all",
        )
        return out if self.backend == "torch" else self.readers(out), state


Call = SequenceCall | PopCall
