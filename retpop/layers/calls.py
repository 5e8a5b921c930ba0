"""What one call of a layer or a decoder fixes for all of its layers.

A call is prepared once: arguments checked, backend chosen, powers of γ and rotation angles computed. Each
layer then hands it queries, keys and values. `SequenceCall` runs them as a sequence; `PopCall` takes the
tokens of a sequence with all prediction tokens behind them in one row, so that every other operation of a
layer treats both alike, and tells them apart only here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dispatch import BackendName
from retpop.ops.packed import Packing
from retpop.ops.pop import run_pop
from retpop.ops.retention import run_retention
from retpop.position import Rotation


@dataclass(frozen=True)
class SequenceCall:
    """Retention over a sequence, or over packed sequences.

    Attributes:
        powers: the decays, and the powers of γ as they are needed.
        rotation: of every token, or None without rotary positions.
        mode, chunk_size: as in `retpop.retention`.
        packing: the packed sequences, or None.
        backend: the backend that was chosen.
    """

    powers: DecayPowers
    rotation: Rotation | None
    mode: str
    chunk_size: int | None
    packing: Packing | None
    backend: BackendName

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


@dataclass(frozen=True)
class PopCall:
    """POP over a row of T sequence tokens and, behind them, P·M prediction tokens.

    Attributes:
        powers: the decays, and the powers of γ as they are needed.
        rotation: of every token of the row, or None without rotary positions.
        length: T.
        predictions: (P, M).
        block_size, offset, reset: as in `retpop.pop_retention`.
        backend: the backend that was chosen.
    """

    powers: DecayPowers
    rotation: Rotation | None
    length: int
    predictions: tuple[int, int]
    block_size: int
    offset: int
    reset: Tensor | None
    backend: BackendName

    def join(self, x: Tensor, x_pred: Tensor) -> Tensor:
        """One row of (B, T, ...) and (B, P, M, ...): (B, T + P·M, ...)."""
        return torch.cat((x, x_pred.flatten(1, 2)), dim=1)

    def split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of a row: (B, T, ...) and (B, P, M, ...)."""
        return row[:, : self.length], row[:, self.length :].unflatten(1, self.predictions)

    def retain(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """POP of rows (B, T + P·M, H, D): outputs (B, T + P·M, H, Dv) and the state after the sequence."""
        (q, q_pred), (k, k_pred), (v, v_pred) = self.split(q), self.split(k), self.split(v)
        out, pred, state = run_pop(
            (q, k, v),
            (q_pred, k_pred, v_pred),
            self.powers,
            block_size=self.block_size,
            offset=self.offset,
            state=state,
            reset=self.reset,
            backend=self.backend,
        )
        return self.join(out, pred), state


Call = SequenceCall | PopCall
