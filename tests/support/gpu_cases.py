"""What the tests on a GPU share: sizes, bounds, and comparisons with float64 on the same device.

With RETPOP_GPU_TESTS=interpreter they rehearse: on the CPU, in Triton's interpreter, float32, tiny sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from retention_cases import PopCase, RetentionCase, largest_error, normal
from torch import Tensor

REHEARSAL = os.environ.get("RETPOP_GPU_TESTS") == "interpreter"

DTYPES = [torch.float32] if REHEARSAL else [torch.float32, torch.bfloat16, torch.float16]

LONGEST_LOOP = 1500
"""Tokens up to which the reference is the loop over tokens; beyond, the torch backend in float64."""


class Bounds(NamedTuple):
    """Largest relative errors allowed."""

    out: float
    state: float
    grad: float


BOUNDS = {
    torch.float32: Bounds(5e-6, 5e-6, 2e-5),
    torch.float16: Bounds(5e-4, 3.5e-4, 6e-4),
    torch.bfloat16: Bounds(4e-3, 2.5e-3, 5e-3),
}

Record = Callable[[str, object], None]
"""pytest's `record_property`: each error goes to the report, also of a test that passes."""

Run = Callable[[], tuple[Tensor, ...]]

AnyCase = TypeVar("AnyCase", RetentionCase, PopCase)


def on(case: AnyCase, device: torch.device) -> AnyCase:
    """The case with its tensors on a device."""
    return replace(case, **{n: x.to(device) for n, x in vars(case).items() if isinstance(x, Tensor)})


def weights_like(results: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the results: random, in their dtype, so that float64 takes the same numbers."""
    return [normal(*r.shape, seed=70 + i, dtype=r.dtype).to(r.device) for i, r in enumerate(results)]


def gradients_of(
    results: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients in the leaves; zeros where a leaf has no influence."""
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if r.requires_grad]
    outs, weights = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, leaves, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


class Errors:
    """Compares tensor after tensor, and fails at the end with every one that is out of bounds."""

    def __init__(self, dtype: torch.dtype, record: Record) -> None:
        self._bounds, self._record = BOUNDS[dtype], record
        self._failed: list[str] = []

    def compare(self, name: str, kind: str, actual: Tensor, expected: Tensor, tokens_dim: int | None) -> None:
        """``kind`` is "out", "state" or "grad": which bound holds; ``tokens_dim`` as in `largest_error`."""
        error = largest_error(actual, expected, tokens_dim=tokens_dim)
        limit = getattr(self._bounds, kind)
        self._record(name, f"{error:.3g} of {limit:.3g}")
        if not error <= limit:
            self._failed.append(f"{name}: {error:.3g} is above {limit:.3g}")

    def finish(self) -> None:
        """Fail if anything was out of bounds."""
        assert not self._failed, "; ".join(self._failed)


def check_case(case: RetentionCase | PopCase, dtype: torch.dtype, record: Record, **options: object) -> None:
    """Outputs, state and every gradient of the Triton backend, against float64 on the same numbers.

    Gradients of the decay where the reference is the loop: PyTorch's operations compute them on a GPU too.
    """
    is_pop = isinstance(case, PopCase)
    loop = case.q.shape[1] <= LONGEST_LOOP
    actual, expected = case.for_gradients(decay=loop), case.double().for_gradients(decay=loop)
    results = actual.run(backend="triton", **options)
    wanted = expected.run(backend="reference" if loop else "torch", **options)
    errors = Errors(dtype, record)
    names = ("out", "pred", "state") if is_pop else ("out", "state")
    dims = {"out": 1, "pred": 2, "state": None}
    for name, a, e in zip(names, results, wanted, strict=True):
        errors.compare(name, "state" if name == "state" else "out", a, e, dims[name])
    weights = weights_like(results)
    found = gradients_of(results, actual.leaves(), weights)
    right = gradients_of(wanted, expected.leaves(), weights)
    if loop:
        decays = (gradients.pop().view(1, -1, 1, 1) for gradients in (found, right))
        errors.compare("grad log_decay", "grad", *decays, None)
    leaf_dims = (1, 1, 1, 2, 2, 2, None) if is_pop else (1, 1, 1, None)
    leaf_names = (
        ("q", "k", "v", "q_pred", "k_pred", "v_pred", "state") if is_pop else ("q", "k", "v", "state")
    )
    for name, a, e, dim in zip(leaf_names, found, right, leaf_dims, strict=False):
        errors.compare(f"grad {name}", "grad", a, e, dim)
    errors.finish()


def replay_of(run: Run, device: torch.device) -> Run:
    """``run`` in a CUDA graph: each call replays it, its outputs NaN before; on a CPU ``run`` itself."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> tuple[Tensor, ...]:
        for x in outputs:
            x.fill_(float("nan") if x.is_floating_point() else -1)
        graph.replay()
        return outputs

    return replay
