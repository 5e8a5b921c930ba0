"""The powers of γ that the blocked forms need; they are written only here.

Powers γ^(i-j) are exponentials of exponents that are masked first, never quotients: γ^-n overflows float32
after a few thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from retpop.arguments import is_transformed

# γ = 0 is a log-decay of -inf, and 0 * -inf is NaN. exp(-1e5) is 0 in every dtype and 0 * -1e5 is 0.
_LOG_ZERO = -1e5

_LOG_HALF = math.log(0.5)


def default_scale(scale: float | None, head_key_dim: int) -> float:
    """The given scale c, or Dk^-0.5."""
    if scale is None:
        return head_key_dim**-0.5
    return float(scale) if isinstance(scale, Real) else scale  # a NumPy scalar would turn tensors into arrays


class Across(NamedTuple):
    """γ^n = whole + rest; whole is 1 where γ^n is at least 1/2, else 0; None: 1 everywhere. See `advance`."""

    whole: Tensor | None
    rest: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Across:
        """Both parts, changed in the same way."""
        return Across(None if self.whole is None else change(self.whole), change(self.rest))


class BlockPowers(NamedTuple):
    """Powers of γ for a block of L tokens; the scale c is folded into the two that make outputs.

    Attributes:
        within: c γ^(i-j) for i >= j, else 0: (H, L, L).
        from_start: c γ^(i+1), the weight of the state before the block for token i: (H, L, 1).
        to_end: γ^(L-1-j), the weight of token j in the state after the block: (H, L, 1).
        across: γ^L, the weight of the state before the block in the state after it, (H, 1, 1).
    """

    within: Tensor
    from_start: Tensor
    to_end: Tensor
    across: Across

    def of_last_token(self) -> BlockPowers:
        """The powers for a block with an output of its last token only."""
        return self._replace(within=self.within[:, -1:], from_start=self.from_start[:, -1:])


class DecayPowers:
    """The powers of one set of log-decays, computed once per block length.

    A decoder makes one at each call for its layers; it does not outlive the call.

    Attributes:
        given: the log-decays (H,), -inf included, as kernels take them.
        scale: the output's scale c.
        values: the log-decays as numbers, or None.
    """

    def __init__(
        self, log_decay: Tensor, scale: float, dtype: torch.dtype, values: Sequence[float] | None = None
    ) -> None:
        """Take log-decays (H,), the output's scale c, and the dtype that states have.

        With ``values``, the log-decays as numbers, a token's decay takes fewer operations.
        """
        self._keeps_half = values is not None and min(values) >= _LOG_HALF  # the usual case
        self.given = log_decay if log_decay.dtype == dtype else log_decay.to(dtype)
        self._finite: Tensor | None = self.given if self._keeps_half else None
        self.scale = scale
        self.values = values
        # Pairs, not a dict: hashing a length would tie a compiled graph to that very length.
        self._blocks: list[tuple[int, BlockPowers]] = []
        self._token: list[Across] = []

    @property
    def log_decay(self) -> Tensor:
        """The log-decays (H,), with a number in place of -inf. Kernels do without this operation."""
        if self._finite is not None:
            return self._finite
        finite = self.given.clamp(min=_LOG_ZERO)
        if self._may_be_kept():
            self._finite = finite
        return finite

    def of(self, log_decay: Tensor) -> DecayPowers:
        """The powers of other log-decays with equal values, in another autograd graph or in none."""
        return DecayPowers(log_decay, self.scale, log_decay.dtype, self.values)

    def block(self, length: int) -> BlockPowers:
        """The powers for a block of ``length`` tokens."""
        for known, powers in self._blocks:
            if known == length:
                return powers
        powers = self._powers(length)
        if self._may_be_kept():
            self._blocks.append((length, powers))
        return powers

    def across_token(self) -> Across:
        """The weight of a state after one token, two of (H, 1, 1)."""
        if self._token:
            return self._token[0]
        exponents = self.log_decay.view(-1, 1, 1)
        across = Across(None, exponents.expm1()) if self._keeps_half else _across(exponents)
        if self._may_be_kept():
            self._token.append(across)
        return across

    def _may_be_kept(self) -> bool:
        """Whether a later call may use the same tensors.

        A compiler merges equal computations itself, and a checkpointed layer must not write to an outer list.
        Powers that were computed without a graph have no gradient for a learned decay.
        """
        return not (torch.compiler.is_compiling() or self.given.requires_grad)

    def _powers(self, length: int) -> BlockPowers:
        steps = torch.arange(length, device=self.log_decay.device)
        falling = self.gamma_to(length - 1 - steps)  # γ^(L-1), ..., γ, 1
        # Row i of `within` is the window of this strip that begins at place L - 1 - i: L powers are computed,
        # and L² only copied. `strip.unfold(1, length, 1)` would tie a compiled graph to the length.
        strip = torch.nn.functional.pad(self.scale * falling, (0, length - 1))
        windows = strip.as_strided((strip.shape[0], length, length), (strip.shape[1], 1, 1))
        return BlockPowers(
            within=windows.flip(1),
            from_start=self.scale * self.gamma_to(steps + 1).unsqueeze(-1),
            to_end=falling.unsqueeze(-1),
            across=self.across(torch.full((1, 1), length, device=steps.device)),
        )

    def gamma_to(self, exponents: Tensor) -> Tensor:
        """γ^n for integers n >= 0 of any shape (...): (H, ...)."""
        log_decay = self.log_decay.reshape(-1, *[1] * exponents.dim())
        return (log_decay * exponents).exp()

    def across(self, lengths: Tensor) -> Across:
        """γ^n, the weight of a state after n tokens; lengths n (...): two of (H, ...)."""
        return _across(self.log_decay.reshape(-1, *[1] * lengths.dim()) * lengths)


def _across(exponents: Tensor) -> Across:
    value = exponents.exp()
    near_one = value >= 0.5
    return Across(near_one.to(value.dtype), torch.where(near_one, exponents.expm1(), value))


def advance(state: Tensor, across: Across, added: Tensor) -> Tensor:
    """The state after n more tokens: γ^n S + added.

    Computed as whole · S + (rest · S + added), with whole = 1 and rest = γ^n - 1 where γ^n is near 1, so that
    only random rounding errors remain. A product with a rounded γ errs by up to 3e-8, always in the same
    direction, and a state that lives for thousands of steps adds that up to 6e-5.
    """
    change = torch.addcmul(added, state, across.rest)
    return change + state if across.whole is None else torch.addcmul(change, state, across.whole)


def restart(state: Tensor, reset: Tensor) -> Tensor:
    """States (n, H, Dk, Dv), or gradients of them, set to 0 where ``reset`` (n,) starts an episode."""
    # Not a product: 0 * NaN would carry a NaN into the next episode.
    return torch.where(reset[:, None, None, None], torch.zeros_like(state), state)


def advance_in_place(state: Tensor, across: Across, added: Tensor) -> Tensor:
    """`advance`, written into ``added``, which nothing else reads; new memory costs more than the sums."""
    if is_transformed():
        return advance(state, across, added)
    change = added.addcmul_(state, across.rest)
    return change.add_(state) if across.whole is None else change.addcmul_(state, across.whole)
