"""The checks that a mutant has to survive to count as missed: a few small calls of each kernel, in float32.

They run in well under a second, so they are chosen, not drawn: partial tiles, padded head dims, several
heads and rows, views with gaps that hold NaN, γ = 0 and γ = 1, with and without each optional tensor. What
is expected comes from the reference, or from plain torch where that is the definition. Each call runs under
`audit`, so an access outside a tensor, a race or a double store is caught as well.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import PopConfig, RetentionConfig
from retpop.kernels.configs_bwd import PopBwdConfig, RetentionBwdConfig, SweepConfig
from retpop.ops import reference
from retpop.position import rotary_frequencies, rotate, rotation_at


@dataclass(frozen=True)
class Check:
    """A call of a launcher and what it has to return; None if it only must not reach outside its tensors.

    The tolerance is a share of the largest expected value; rounding in float32 leaves about 1e-6 of it. An
    argument that is `changed` in place is given as a copy, which is the last result.
    """

    module: str
    launcher: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    expected: Sequence[Tensor] | None
    tolerance: float = 1e-5
    changed: int | None = None

    def __call__(self) -> None:
        """Raises where the kernel, as the module now is, does anything else than expected."""
        for place in (self.options.get("pred"), *self.options.get("out", ())):
            if place is not None:  # what an earlier run has written must not pass for this one's
                place.fill_(math.nan)
        launch = getattr(importlib.import_module(f"retpop.kernels.{self.module}"), self.launcher)
        arguments = list(self.arguments)
        if self.changed is not None:
            arguments[self.changed] = arguments[self.changed].clone()
        with audit(races=self.expected is not None):
            found = launch(*arguments, **self.options)
        if self.expected is None:
            return
        found = [found] if isinstance(found, Tensor) else [x for x in found if x is not None]
        found += [] if self.changed is None else [arguments[self.changed]]
        for actual, expected in zip(found, self.expected, strict=True):
            size = float(expected.abs().max()) if expected.numel() else 0.0
            torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=self.tolerance * size)


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal numbers in a view whose rows have NaN before and after them."""
    *rows, last = shape
    base = torch.full((*rows, last + 3), float("nan"))
    view = base[..., 2 : last + 2]
    return view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def norm_gate() -> list[Check]:
    checks = []
    # 2 x 2048 elements are two tiles: 138 pairs of 24 features (32 with padding) are three.
    for kind, affine in (("groupnorm", False), ("rmsnorm", True), ("groupnorm", True)):
        x, gate = numbers(2, 23, 3, 24, seed=0) + 0.5, numbers(2, 23, 3, 24, seed=1)
        x, gate = (numbers(*t.shape, seed=0).copy_(t) for t in (x, gate))
        weight, bias = (numbers(3, 24, seed=seed).contiguous() if affine else None for seed in (2, 3))
        wide = x.double()
        wide = wide - wide.mean(-1, keepdim=True) if kind == "groupnorm" else wide
        expected = wide / (wide.square().mean(-1, keepdim=True) + 0.1).sqrt()
        if affine:
            expected = expected * weight + bias
        expected = expected * torch.nn.functional.silu(gate.double())
        checks.append(Check("norm_gate", "norm_gate_fwd", (x, gate, weight, bias, kind, 0.1), {}, [expected]))
    return checks


def rotary() -> list[Check]:
    checks = []
    for kind, inverse, rows in (
        ("retnet", False, 1),
        ("rope", False, 2),
        ("retnet", True, 2),
        ("rope", True, 1),
    ):
        q, k = (numbers(2, 40, 3, 24, seed=seed) for seed in (0, 1))
        positions = torch.arange(40 * rows).reshape(rows, 40) + 5
        rotation = rotation_at(positions, rotary_frequencies(kind, 24), kind)
        cos, sin = rotation
        back = type(rotation)(cos, -sin) if inverse else rotation
        expected = [rotate(x, back, kind) for x in (q, k)]
        checks.append(Check("rotary", "rotary_fwd", (q, k, cos, sin, kind), {"inverse": inverse}, expected))
    return checks


def norm_gate_bwd() -> list[Check]:
    checks = []
    # Two tiles, in runs of one; a run of two tiles; 67 runs, added up 64 at a time; a part of a tile.
    for kind, affine, shape, needs in (
        ("groupnorm", "", (70, 3, 24), (True, True, True, True)),
        ("rmsnorm", "weight and bias", (130, 300, 3), (True, True, True, True)),
        ("rmsnorm", "weight", (530, 2, 250), (False, False, True, True)),
        ("groupnorm", "weight", (70, 3, 24), (True, False, True, True)),
        ("groupnorm", "bias", (6, 3, 24), (False, True, True, True)),
    ):
        x, gate, grad = (numbers(*shape, seed=seed) for seed in (0, 1, 4))
        x += 0.5
        weight, bias = (
            numbers(*shape[1:], seed=seed).contiguous() if name in affine else None
            for seed, name in ((2, "weight"), (3, "bias"))
        )
        leaves = [None if t is None else t.double().requires_grad_() for t in (x, gate, weight, bias)]
        wide = leaves[0] - leaves[0].mean(-1, keepdim=True) if kind == "groupnorm" else leaves[0]
        y = wide / (wide.square().mean(-1, keepdim=True) + 0.1).sqrt()
        y = y if leaves[2] is None else y * leaves[2]
        y = y if leaves[3] is None else y + leaves[3]
        y = y * torch.nn.functional.silu(leaves[1])
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
        expected = torch.autograd.grad(y, wanted, grad.double())
        arguments = (x, gate, weight, bias, grad, kind, 0.1, needs)
        checks.append(Check("norm_gate", "norm_gate_bwd", arguments, {}, expected))
    return checks


# γ of each head: none, half, slow, never.
LOG_DECAY = torch.tensor([-math.inf, math.log(0.5), math.log1p(-1 / 64), 0.0])
SCALE = 0.3


def step() -> list[Check]:
    checks = []
    for given, (Dk, Dv) in ((True, (20, 17)), (False, (16, 8))):
        q, k, v = (numbers(2, 3, dim, seed=seed) for seed, dim in enumerate((Dk, Dk, Dv)))
        state = numbers(2, 3, Dk, Dv, seed=3) if given else None
        out, new = reference.retention(
            *(x[:, None] for x in (q, k, v)), LOG_DECAY[:3], state=state, scale=SCALE
        )
        arguments = (q, k, v, LOG_DECAY[:3], state, SCALE)
        checks.append(Check("retention_step", "retention_step", arguments, {}, [out[:, 0], new]))
    return checks


def pooled() -> list[Check]:
    """Two of four rows have a place in the pool, the others one before it and one behind it."""
    checks = []
    index, T = torch.tensor([2, -1, 4, 0]), 3
    for counts, (Dk, Dv) in (([1, 3, 2, 0], (20, 17)), (None, (16, 40))):
        q, k, v = (numbers(4, T, 3, dim, seed=seed) for seed, dim in enumerate((Dk, Dk, Dv)))
        states = numbers(4, 3, Dk, Dv, seed=3)
        out, new = torch.zeros(4, T, 3, Dv), states.clone()
        for row in (0, 3):
            place, taken = int(index[row]), T if counts is None else counts[row]
            given = {"state": states[place : place + 1], "scale": SCALE}
            tokens = [x[row : row + 1] for x in (q, k, v)]
            out[row], _ = reference.retention(*tokens, LOG_DECAY[1:], **given)
            _, new[place] = reference.retention(*(x[:, :taken] for x in tokens), LOG_DECAY[1:], **given)
        count = None if counts is None else torch.tensor(counts)
        arguments = (q, k, v, LOG_DECAY[1:], states, index, count, SCALE)
        checks.append(Check("pooled_retention", "pooled_retention", arguments, {}, [out, new], changed=4))
    return checks


def resets_of(B: int, T: int) -> Tensor:
    """After a token, two, more than a chunk has; a row down each is one token earlier, and the last is one.

    Each of the first row's adds a chunk, so that no fewer may be counted.
    """
    places = torch.tensor([1, 2, 19, T])
    return torch.stack([torch.isin(torch.arange(T) + row, places) for row in range(B)])


def retention() -> list[Check]:
    """Chunks of 16; a sweep and a split of stretches of 32, of plain and of packed sequences; resets."""
    checks = []
    for stretch, lengths, given, Dv, resets in (
        (None, None, True, 33, False),
        (None, [5, 0, 17, 16], True, 32, False),
        (32, None, False, 33, False),
        (32, [0, 40, 3, 32, 0], True, 32, False),
        (32, [33, 1], False, 33, False),
        (32, [-7, 47, -40, 40, -40, 40], False, 16, False),
        (None, None, True, 16, True),
        (None, [0, 2, 20, 17], True, 16, True),
    ):
        bounds = list(itertools.accumulate(lengths, initial=0)) if lengths else None
        B, T = (1, bounds[-1]) if bounds else (2, 21 if stretch is None else 53)
        q, k, v = (numbers(B, T, 2, dim, seed=seed) for seed, dim in enumerate((20, 20, Dv)))
        log_decay = LOG_DECAY[1:3] if given else LOG_DECAY[[0, 3]]
        state = numbers(len(lengths) if lengths else B, 2, 20, Dv, seed=3) if given else None
        reset = resets_of(B, T) if resets else None
        expected = None  # of boundaries that are wrong: they must only lead nowhere
        if not lengths or min(lengths) >= 0:
            expected = reference.retention(
                q, k, v, log_decay, state=state, scale=SCALE, bounds=bounds, reset=reset
            )
        config = RetentionConfig(
            rows=16, cols_k=32, cols_v=16, num_warps=4, num_stages=1, scale_v=given, stretch=stretch
        )
        packed = None if bounds is None else torch.tensor(bounds)
        arguments = (q, k, v, log_decay, state, SCALE, packed, reset)
        checks.append(Check("retention_fwd", "retention_fwd", arguments, {"config": config}, expected))
    return checks


def retention_bwd() -> list[Check]:
    """Tiles of 16; one launch, or stretches of 32; plain, packed, resets; one sweep for dk and dv, or two."""
    checks = []
    for both, stretch, lengths, given, Dv, resets in (
        (True, None, None, True, 24, False),
        (False, None, [5, 0, 17, 16], True, 33, False),
        (True, None, [18, 3], False, 16, False),
        (False, 32, None, False, 33, False),
        (True, 32, [0, 40, 3, 32, 0], True, 32, False),
        (False, 32, [33, 1], False, 33, False),
        (True, 32, [-7, 47, -40, 40, -40, 40], False, 16, False),
        (True, None, None, True, 16, True),
        (True, None, [0, 2, 20, 17], True, 16, True),
    ):
        bounds = list(itertools.accumulate(lengths, initial=0)) if lengths else None
        B, T = (1, bounds[-1]) if bounds else (2, 21 if stretch is None else 53)
        q, k, v = (numbers(B, T, 2, dim, seed=seed) for seed, dim in enumerate((20, 20, Dv)))
        log_decay = LOG_DECAY[1:3] if given else LOG_DECAY[[0, 3]]
        sequences = len(lengths) if lengths else B
        state = numbers(sequences, 2, 20, Dv, seed=3) if given else None
        grad_out = numbers(B, T, 2, Dv, seed=4)
        grad_state = numbers(sequences, 2, 20, Dv, seed=5) if given or both else None
        reset = resets_of(B, T) if resets else None
        expected = None  # of boundaries that are wrong: they must only lead nowhere
        if not lengths or min(lengths) >= 0:
            leaves = [None if x is None else x.double().requires_grad_() for x in (q, k, v, state)]
            results = reference.retention(
                *leaves[:3],
                log_decay.double(),
                state=leaves[3],
                scale=SCALE,
                bounds=bounds,
                reset=reset,
            )
            pairs = zip(results, (grad_out, grad_state), strict=True)
            total = sum((result * grad).sum() for result, grad in pairs if grad is not None)
            expected = torch.autograd.grad(total, [x for x in leaves if x is not None])
        common = {"tile": 16, "num_warps": 4, "num_stages": 1, "scale_v": given}
        config = RetentionBwdConfig(
            both=SweepConfig(cols_v=32, **common) if both else None,
            keys=SweepConfig(cols_v=16, **common),
            values=SweepConfig(cols_v=16, **common),
            stretch=stretch,
        )
        packed = None if bounds is None else torch.tensor(bounds)
        arguments = (q, k, v, log_decay, state, SCALE, packed, grad_out, grad_state)
        options = {"config": config, "reset": reset}
        checks.append(Check("retention_bwd", "retention_bwd", arguments, options, expected))
    return checks


def large_state() -> list[Check]:
    """A state beyond what float16 holds; small queries bring the outputs back into its range."""
    q, k, v = (numbers(1, 16, 2, 16, seed=seed).half() for seed in range(3))
    arguments = (q / 512, k, v, LOG_DECAY[2:])
    state = 1e6 * numbers(1, 2, 16, 16, seed=3)
    expected = reference.retention(*arguments, state=state, scale=SCALE)
    return [Check("retention_fwd", "retention_fwd", (*arguments, state, SCALE), {}, expected, 2e-3)]


def pop(*, steps: bool, split: bool) -> list[Check]:
    """Tiles of 16, so a block of 21 is a tile and a tail; states, resets and absent blocks, or none."""
    checks = []
    for N, P, L, M, offset, given, resets, rows, Dv in (
        (2, 1, 21, 18, 0, True, True, 1, 32),
        (3, 1, 5, 32, 2, False, True, 2, 17),
        (1, 1, 16, 16, 1, True, False, 1, 17),
        (1, 2, 21, 7, 0, False, True, 1, 33),
        (0, 1, 1, 7, 0, True, True, 2, 17),
        (1, 1, 37, 35, 0, False, False, 1, 16),
    ):
        if split and N == 0:
            continue
        joined = numbers(rows, N * L + P * M, 3, 2, 33, seed=0)
        tokens = [joined[:, :, i, :, : Dv if i == 2 else 20] for i in range(3)]
        main = [x[:, : N * L] for x in tokens]
        pred = [x[:, N * L :].unflatten(1, (P, M)) for x in tokens]
        if given:  # with strides of their own
            pred = [numbers(*x.shape, seed=7).copy_(x) for x in pred]
        state = numbers(rows, 2, 20, Dv, seed=3) if given else None
        reset = torch.arange(2 * rows * N).reshape(rows, N, 2)[..., 0] % 4 == 2 if resets else None
        arguments = (*main, *pred, LOG_DECAY[1:3] if given else LOG_DECAY[[0, 3]])
        expected = reference.pop_retention(
            *arguments, block_size=L, offset=offset, state=state, scale=SCALE, reset=reset
        )
        config = PopConfig(
            tile=16, cols_v=16, num_warps=4, num_stages=1, scale_v=given, steps=steps, split=split
        )
        options = {"config": config} | ({"pred": numbers(rows, P, M, 2, Dv, seed=8)} if given else {})
        place = (state, reset, L, offset, SCALE)
        checks.append(Check("pop_fwd", "pop_fwd", (*arguments, *place), options, expected))
    return checks


_POP_INPUTS = ("q", "k", "v", "q_pred", "k_pred", "v_pred", "state")


def pop_bwd(*, split: bool, pairs: bool = False) -> list[Check]:
    """Tiles of 16, as in `pop`; one sweep for dk and dv, or two; predictions of one tile or of several.

    With ``pairs``, of each pair of main and prediction tokens only one has a gradient.
    """
    checks = []
    # Queries' gradients are the forward's business.
    for both, N, P, L, M, offset, given, resets, rows, Dv, without in (
        (True, 2, 1, 21, 18, 0, True, True, 1, 24, "q q_pred"),
        (False, 2, 1, 5, 32, 1, False, True, 1, 33, "q q_pred"),
        (True, 3, 1, 17, 9, 3, True, True, 1, 16, "q q_pred"),
        (False, 1, 2, 21, 7, 0, True, False, 1, 17, "q q_pred"),
        (True, 0, 1, 1, 7, 0, True, False, 2, 17, "q q_pred"),
        (True, 3, 1, 6, 5, 0, False, True, 1, 32, "q q_pred"),
        (True, 1, 2, 5, 6, 0, False, False, 1, 16, "q q_pred k v_pred"),
        (True, 1, 2, 5, 6, 0, False, False, 1, 16, "q q_pred k_pred v"),
    ):
        if (split and N == 0) or pairs != (len(without) > 8):
            continue
        sizes = [20, 20, Dv, Dv]
        main, pred = [], []
        for i, size in enumerate(sizes):
            row = numbers(rows, N * L + P * M, 2, size, seed=i)
            main.append(row[:, : N * L])
            twin = row[:, N * L :].unflatten(1, (P, M))
            # Given: every tensor has strides of its own.
            pred.append(numbers(rows, P, M, 3, size, seed=10 + i)[..., 1:, :].copy_(twin) if given else twin)
        if given:
            wide = [numbers(rows, N * L, 2 + i, x.shape[-1], seed=i)[:, :, :2] for i, x in enumerate(main)]
            main = [place.copy_(x) for place, x in zip(wide, main, strict=True)]
        state, after = (
            numbers(rows, 2, 20, Dv + 3, seed=seed)[..., :Dv] if given or (seed == 5 and both) else None
            for seed in (4, 5)
        )
        reset = torch.arange(2 * rows * N).reshape(rows, N, 2)[..., 0] % 4 == 2 if resets else None
        log_decay = LOG_DECAY[1:3] if given else LOG_DECAY[[0, 3]]
        leaves = [None if x is None else x.double().requires_grad_() for x in (*main[:3], *pred[:3], state)]
        results = reference.pop_retention(
            *leaves[:6],
            log_decay.double(),
            block_size=L,
            offset=offset,
            state=leaves[6],
            scale=SCALE,
            reset=reset,
        )
        graded = zip(results, (main[3], pred[3], after), strict=True)
        total = sum((result * grad).sum() for result, grad in graded if grad is not None)
        needs = [name not in without.split() for name in _POP_INPUTS]
        wanted = [x for x, need in zip(leaves, needs, strict=True) if need and x is not None]
        expected = torch.autograd.grad(total, wanted, allow_unused=True)
        expected = [torch.zeros_like(x) if g is None else g for g, x in zip(expected, wanted, strict=True)]
        common = {"tile": 16, "num_warps": 4, "num_stages": 1, "scale_v": given}
        config = PopBwdConfig(
            both=SweepConfig(cols_v=32, **common) if both else None,
            keys=SweepConfig(cols_v=16, **common),
            values=SweepConfig(cols_v=16, **common),
            split=split,
        )
        out = [numbers(*x.shape[:-2], 3, x.shape[-1], seed=9)[..., 1:, :] for x in (*main[:3], *pred[:3])]
        options = {"config": config} | ({"out": out} if given else {})
        arguments = (*main[:3], *pred[:3], log_decay, state, reset, main[3], pred[3], after)
        checks.append(Check("pop_bwd", "pop_bwd", (*arguments, L, offset, SCALE, needs), options, expected))
    return checks


SUITES: dict[str, Callable[[], list[Check]]] = {
    "norm_gate": lambda: norm_gate() + norm_gate_bwd(),
    "rotary": rotary,
    "retention_step": step,
    "pooled_retention": pooled,
    "retention_fwd": lambda: large_state() + retention(),
    "retention_bwd": retention_bwd,
    "pop_bwd_sweep": lambda: pop_bwd(split=False, pairs=True) + pop_bwd(split=False) + pop_bwd(split=True),
    "pop_fwd": lambda: pop(steps=False, split=False) + pop(steps=False, split=True),
    "pop_fwd_steps": lambda: (
        pop(steps=True, split=False)
        + pop(steps=True, split=True)
        + pop(steps=False, split=False)[:2]
        + pop_bwd(split=False, pairs=True)
    ),
    "split": lambda: (
        pop(steps=False, split=True)
        + retention()[1:]
        + [check for check in retention_bwd() if check.options["config"].stretch]
        + retention_bwd()[-2:]
        + pop_bwd(split=True)
    ),
    "tiles": lambda: (
        step()
        + large_state()
        + retention()[:3]
        + pop(steps=True, split=False)[:4]
        + pop(steps=False, split=False)
        + retention_bwd()[:2]
        + pop_bwd(split=False, pairs=True)
    ),
}
"""The checks of each module of `retpop.kernels`; `tiles` and `split` have those of modules that use them."""
