"""Whether a contender computes the right result, checked in the run that times it.

The first row of what is timed is compared with the reference in float64 on the same numbers: outputs and
states and, where training is timed, the gradients of the inputs. Errors are RMS(error) / RMS(reference), the
largest over heads and pieces of 64 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.work import FORWARD, Contender, Maker, Problem, Work

PIECE = 64
"""Tokens over which an error is averaged."""

TOLERANCES = {
    torch.float32: {"output": 5e-6, "state": 5e-6, "gradient": 2e-5},
    torch.float16: {"output": 5e-4, "state": 3.5e-4, "gradient": 6e-4},
    torch.bfloat16: {"output": 4e-3, "state": 2.5e-3, "gradient": 5e-3},
}
"""Largest allowed errors of an operation, as in the tests."""

MODEL_FACTOR = 2.0
"""Factors on an operation's allowed error for a model, and on the reference's own error in that dtype for a
model whose weights and inputs of layers are rounded too."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a comparison.

    Attributes:
        error: the largest error relative to the allowed one; at most 1 is right.
        what: its place, in words.
    """

    error: float
    what: str

    @property
    def right(self) -> bool:
        """Whether it may be compared with others; NaN is wrong."""
        return self.error <= 1


class Found(NamedTuple):
    """A tensor of the first row: what kind it is, and the dim of its tokens, of rows in a state."""

    kind: str
    tensor: Tensor
    tokens: int


class Checker:
    """Compares the contenders of one problem; a reference that several share runs once.

    Args:
        problem: what they solve.
        graded: whether gradients are compared where a contender is trained.
    """

    def __init__(self, problem: Problem, *, graded: bool) -> None:
        self._problem, self._graded = problem, graded
        self._known: dict[tuple[Maker, torch.dtype, bool], list[Found]] = {}

    def check(self, contender: Contender, work: Work, passes: Sequence[str]) -> dict[str, Verdict]:
        """Verdicts by pass: that of forward holds for outputs and states, the other for gradients too."""
        graded = self._graded and set(passes) != {FORWARD} and work.graded > 0
        actual = _results(contender, work, graded)
        expected = self._reference(contender, torch.float64, graded)
        limits = [TOLERANCES[self._problem.dtype][found.kind] for found in actual]
        if contender.model:
            limits = [MODEL_FACTOR * limit for limit in limits]
        if contender.model and self._problem.dtype != torch.float32:
            rounded = self._reference(contender, self._problem.dtype, graded)
            errors = _errors(rounded, expected)
            limits = [max(limit, MODEL_FACTOR * error) for limit, error in zip(limits, errors, strict=False)]
        verdicts = [
            Verdict(error=error / limit, what=f"{found.kind} {error:.1e} of {limit:.1e}")
            for found, error, limit in zip(actual, _errors(actual, expected), limits, strict=False)
        ]
        outputs = [v for v, found in zip(verdicts, actual, strict=False) if found.kind != "gradient"]
        return {name: max(outputs if name == FORWARD else verdicts, key=_badness) for name in passes}

    def _reference(self, contender: Contender, dtype: torch.dtype, graded: bool) -> list[Found]:
        key = (contender.reference, dtype, graded)
        if key not in self._known:
            with torch.set_grad_enabled(graded):
                work = contender.reference(self._problem.first_row(dtype))
            self._known[key] = _results(contender, work, graded)
        return self._known[key]


def _badness(verdict: Verdict) -> float:
    return math.inf if math.isnan(verdict.error) else verdict.error


def _results(contender: Contender, work: Work, graded: bool) -> list[Found]:
    """Gradients in the inputs, outputs and states of the first row.

    Gradients of the outputs are drawn from one seed, in values that every dtype holds: all contenders get
    the same.
    """
    with torch.set_grad_enabled(graded):
        outputs = list((work.answer or work.run)())
    tokens = -2 if contender.model else -3
    found: list[Found] = []
    if graded:
        generator = torch.Generator(outputs[0].device).manual_seed(0)
        upstream = [
            torch.randn(x.shape[1:], generator=generator, device=x.device).bfloat16().to(x).expand_as(x)
            for x in outputs[: work.graded]
        ]
        gradients = torch.autograd.grad(outputs[: work.graded], work.leaves, upstream)
        found = [Found("gradient", x[:1].detach(), tokens) for x in gradients]
    last = len(outputs) - contender.states
    found += [Found("output", x[:1].detach(), tokens) for x in outputs[:last]]
    return found + [Found("state", x[:1].detach(), -2) for x in outputs[last:]]


def _errors(actual: Sequence[Found], expected: Sequence[Found]) -> list[float]:
    """Errors of what both have: some return no state."""
    pairs = zip(actual, expected, strict=False)
    return [largest_error(x.tensor, y.tensor, x.tokens) for x, y in pairs]


def largest_error(actual: Tensor, expected: Tensor, tokens: int) -> float:
    """Over pieces of 64 tokens; ``tokens`` is their dim, from behind: -3 in (B, T, H, D), -2 in (B, T, E).

    Where the expected values nearly cancel they count as one hundredth of the whole tensor's, which is as
    much as rounding allows.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"{tuple(actual.shape)} cannot be compared with {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    floor = 1e-2 * _rms(expected, tuple(range(expected.dim()))) + torch.finfo(torch.float64).tiny
    errors = [
        (_rms(a - e, (tokens, -1)) / _rms(e, (tokens, -1)).clamp(min=floor)).max().item()
        for a, e in zip(actual.split(PIECE, tokens), expected.split(PIECE, tokens), strict=True)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _rms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.square().mean(dim=dims).sqrt()
