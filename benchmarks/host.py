"""Host time of the Triton backend's operations, in dispatches of `torch.mm` in the same run; needs no GPU.

A stub stands in for Triton's driver and compiler, so calls go all the way to Triton's launcher, on small
tensors on the CPU, and no kernel is compiled or runs. Not counted is what Triton's own launcher of a compiled
kernel then does. Counted is autograd's engine, for which a function that does nothing is a row of its own.
The pages show benchmarks/results/host.csv: `python -m benchmarks run --op host --csv` that file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.internals import gated_norm, pop_rows, rotated, rotation_of, stub_driver
from benchmarks.machine import origin
from benchmarks.measurements import Measurement, ratio
from benchmarks.targets import DISPATCH, HOST_LIMITS, NOTHING
from benchmarks.timing import Effort, Run, in_turn, sampler
from benchmarks.work import BOTH, FORWARD

B, T, M, H, D = 2, 65, 64, 4, 64


def host(device: torch.device, effort: Effort) -> Iterator[list[Measurement]]:
    """Rows of each operation and pass, with the unit's taken in turn; the notes say what is wanted."""
    cpu = torch.device("cpu")
    square = torch.ones(16, 16)
    with stub_driver(), torch.no_grad():
        calls = _calls()
        for direction, (name, run) in ((d, call) for d in (FORWARD, BOTH) for call in calls.items()):
            of_pass = run if direction == FORWARD else _with_backward(run)
            runs = {DISPATCH: partial(torch.mm, square, square), "triton": of_pass}
            samples = in_turn(
                {side: sampler(side_run, cpu, effort) for side, side_run in runs.items()}, effort
            )
            row = partial(Measurement, op="host", mode=name, dtype="bfloat16", direction=direction)
            row = partial(row, **origin(cpu, effort.clock), sizes=f"B{B} T{T} H{H} D{D}")
            unit, taken = (row(backend=side, samples=tuple(samples[side])) for side in runs)
            note = f"{ratio(taken, unit)} of a dispatch; wanted: at most {HOST_LIMITS[direction]:g}x"
            yield [unit, row(backend="triton", samples=taken.samples, note=note)]


def _calls() -> dict[str, Callable[..., Any]]:
    """Operations by name, each of its own inputs."""
    from retpop import pop_retention, retention

    tokens = [torch.randn(B, T, H, D, dtype=torch.bfloat16) for _ in range(3)]
    predictions = [torch.randn(B, 1, M, H, D, dtype=torch.bfloat16) for _ in range(3)]
    rows = [torch.randn(B, T + M, H, D, dtype=torch.bfloat16) for _ in range(3)]
    log_decay, state = torch.full((H,), -0.1), torch.zeros(B, H, D, D)
    cos, sin = rotation_of(T, D, torch.device("cpu"))
    of_state = {"state": state, "backend": "triton"}
    return {
        NOTHING: Call(_Nothing.apply, tokens[:1]),
        "retention": Call(lambda *x: retention(*x, log_decay, **of_state), tokens),
        "token": Call(lambda *x: retention(*x, log_decay, **of_state), [x[:, :1] for x in tokens]),
        "pop": Call(
            lambda *x: pop_retention(*x, log_decay, block_size=T, **of_state), [*tokens, *predictions]
        ),
        "pop of rows": Call(lambda *x: pop_rows(x, log_decay, state, (1, M), T, 0), rows),
        "gated norm": Call(gated_norm, tokens[:2]),
        "rotation": Call(lambda q, k: rotated(q, k, cos, sin), tokens[:2]),
    }


class Call:
    """A call of an operation with inputs."""

    def __init__(self, run: Callable[..., Any], inputs: list[Tensor]) -> None:
        self.run, self.inputs = run, inputs

    def __call__(self) -> Any:
        return self.run(*self.inputs)


def _with_backward(call: Any) -> Run:
    """Forward and backward, with a gradient of all outputs but the state for all inputs."""
    leaves = [x.detach().requires_grad_() for x in call.inputs]

    def outputs() -> list[Tensor]:
        found = call.run(*leaves)
        return [x for x in ([found] if isinstance(found, Tensor) else found) if x.dtype == torch.bfloat16]

    with torch.enable_grad():
        upstream = [torch.ones_like(x) for x in outputs()]
    return torch.enable_grad()(lambda: torch.autograd.grad(outputs(), leaves, upstream))


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
