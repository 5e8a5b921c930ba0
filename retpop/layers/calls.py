"""What one call of a layer or a decoder fixes for all of its layers.

A call is prepared once: arguments checked, backend chosen, powers of γ and rotation angles computed. Each
layer then hands it queries, keys and values. `SequenceCall` runs them as a sequence; `PopCall` takes the
tokens of a sequence with all prediction tokens behind them in one row, so that every other operation of a
layer treats both alike, and tells them apart only here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from retpop.ops import triton_backend
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dispatch import BackendName
from retpop.ops.packed import Packing
from retpop.ops.pop import run_pop_rows
from retpop.ops.retention import run_retention
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

    def turn(self, qk: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Queries and keys, side by side in the heads of (B, T, 2H, Dk), turned by their tokens' rotation."""
        if self.rotation is not None and kind is not None and self.backend != "triton":
            qk = rotate(qk, self.rotation, kind)
        q, k = qk.chunk(2, dim=2)
        if self.rotation is not None and kind is not None and self.backend == "triton":
            return triton_backend.rotated(q, k, self.rotation, kind)
        return q, k


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
    """

    predictions: tuple[int, int]
    block_size: int
    offset: int
    reset: Tensor | None

    def retain(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """POP of rows (B, T + P·M, H, D): outputs (B, T + P·M, H, Dv) and the state after the sequence."""
        return run_pop_rows(
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
        )


Call = SequenceCall | PopCall
