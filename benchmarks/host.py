"""Host time of the Triton backend's operations, in dispatches of `torch.mm` in the same run; needs no GPU.

A stub stands in for Triton's driver and compiler, so calls go all the way to Triton's launcher, on small
tensors on the CPU, and no kernel is compiled or runs. Not counted is what Triton's own launcher of a compiled
kernel then does. Counted is what autograd takes of any function: a function of as many tensors that does
nothing but allocate its results has rows of its own.
The pages show benchmarks/results/host.csv: `python -m benchmarks run --op host --csv` that file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.internals import gated_norm, pop_of_rows, rotated, rotation_of, stub_driver
from benchmarks.machine import origin
from benchmarks.measurements import Measurement, ratio
from benchmarks.targets import DISPATCH, NOTHING
from benchmarks.timing import Effort, Run, in_turn, sampler
from benchmarks.work import BOTH, FORWARD

B, T, M, H, D = 2, 65, 64, 4, 64


def host(device: torch.device, effort: Effort) -> Iterator[list[Measurement]]:
    """Rows of each operation and pass, with the unit's taken in turn, and autograd's own where it is used."""
    cpu = torch.device("cpu")
    square = torch.ones(16, 16)
    with stub_driver(), torch.no_grad():
        for direction, (name, call) in product((FORWARD, BOTH), _calls().items()):
            runs: dict[str, Run] = {DISPATCH: partial(torch.mm, square, square)}
            if direction == FORWARD:
                runs["triton"] = call
            else:
                runs |= {"triton": _with_backward(call), NOTHING: _with_backward(_nothing_like(call))}
            samples = in_turn({side: sampler(run, cpu, effort) for side, run in runs.items()}, effort)
            row = partial(Measurement, op="host", mode=name, dtype="bfloat16", direction=direction)
            row = partial(row, **origin(cpu, effort.clock), sizes=f"B{B} T{T} H{H} D{D}")
            unit, *others = (row(backend=side, samples=tuple(samples[side])) for side in runs)
            yield [unit, *(replace(m, note=f"{ratio(m, unit)} of a dispatch") for m in others)]


def _calls() -> dict[str, Call]:
    """Operations by name, each of its own inputs."""
    from retpop import pop_retention, retention

    tokens = [torch.randn(B, T, H, D, dtype=torch.bfloat16) for _ in range(3)]
    predictions = [torch.randn(B, 1, M, H, D, dtype=torch.bfloat16) for _ in range(3)]
    rows = [torch.randn(B, T + M, H, D, dtype=torch.bfloat16) for _ in range(3)]
    log_decay, state = torch.full((H,), -0.1), torch.zeros(B, H, D, D)
    rotation = list(rotation_of(T, D, torch.device("cpu")))

    def retained(*given: Tensor) -> tuple[Tensor, ...]:
        *x, state = given
        return retention(*x, state=state, backend="triton")

    def predicted(*given: Tensor) -> tuple[Tensor, ...]:
        *x, state = given
        return pop_retention(*x, block_size=T, state=state, backend="triton")

    return {
        "retention": Call(retained, tokens, [log_decay, state]),
        "token": Call(retained, [x[:, :1] for x in tokens], [log_decay, state]),
        "pop": Call(predicted, [*tokens, *predictions], [log_decay, state]),
        "pop of rows": Call(pop_of_rows(log_decay, D**-0.5, (1, M), T, 0), rows, [state]),
        "gated norm": Call(gated_norm, tokens[:2]),
        "rotation": Call(rotated, tokens[:2], rotation),
    }


@dataclass(frozen=True)
class Call:
    """A call of an operation.

    Attributes:
        run: the operation, of all its tensors.
        inputs: the tensors whose gradients are wanted.
        others: those behind them.
    """

    run: Callable[..., Any]
    inputs: Sequence[Tensor]
    others: Sequence[Tensor] = ()

    def __call__(self) -> Any:
        return self.run(*self.inputs, *self.others)


def _with_backward(call: Call) -> Run:
    """Forward and backward, with a gradient of all outputs but the state for all inputs."""
    leaves = [x.detach().requires_grad_() for x in call.inputs]

    def outputs() -> list[Tensor]:
        found = call.run(*leaves, *call.others)
        return [x for x in ([found] if isinstance(found, Tensor) else found) if x.dtype == torch.bfloat16]

    with torch.enable_grad():
        upstream = [torch.ones_like(x) for x in outputs()]
    return torch.enable_grad()(lambda: torch.autograd.grad(outputs(), leaves, upstream))


def _nothing_like(call: Call) -> Call:
    """A call of a function of the same tensors, and with results like its, that it does not compute."""
    found = call()
    results = [found] if isinstance(found, Tensor) else list(found)
    return replace(call, run=lambda *tensors: _Nothing.apply(results, *tensors))


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, results: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(map(torch.empty_like, results))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(x) if need else None for x, need in needs)
