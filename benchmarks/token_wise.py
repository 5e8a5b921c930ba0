"""Kernels on single tokens: the gated norm of heads, and the rotation of queries and keys.

They run as the layers call them, queries and keys side by side out of one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import internals
from benchmarks.retention import Sizes
from benchmarks.work import BOTH, DTYPES, FORWARD, Group, Problem, Work, leaf, ours, randoms

SHAPES = {
    "tiny": Sizes(B=1, T=18, H=2, D=16),
    "paper_train": Sizes(B=64, T=1290, H=4, D=64),
    "long_128": Sizes(B=8, T=4096, H=16, D=128),
}


def groups() -> Iterator[Group]:
    """Both operations at every shape."""
    made: dict[str, tuple[Callable[..., Work], Callable[..., Problem]]] = {
        "norm_gate": (gated_norm, norm_problem),
        "rotary": (rotation, rotation_problem),
    }
    for shape, sizes in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            for mode, (make, problem) in made.items():
                yield Group(
                    op="token_wise",
                    shape=shape,
                    mode=mode,
                    dtype=dtype,
                    passes=(FORWARD, BOTH),
                    problem=partial(problem, sizes, DTYPES[dtype]),
                    contenders=ours(make, ["triton"]),
                    for_gpu=shape != "tiny",
                )


def norm_problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Outputs of heads, and the gate."""
    s = sizes
    tensors = randoms("x gate", s.B, s.T, s.H, s.D, dtype=dtype, device=device)
    return Problem(sizes=s, dtype=dtype, tensors=tensors)


def gated_norm(problem: Problem, *, backend: str) -> Work:
    """silu(gate) times the norm."""
    x, gate = inputs = list(problem.tensors.values())
    if backend == "reference":
        return Work(
            inputs=inputs,
            run=lambda: (functional.silu(gate) * functional.layer_norm(x, x.shape[-1:], eps=internals.EPS),),
        )
    return Work(inputs=inputs, run=lambda: (internals.gated_norm(x, gate),))


def rotation_problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Queries and keys, side by side in memory, and their rotations."""
    s = sizes
    q, k = leaf(s.B, s.T, 2 * s.H, s.D, dtype=dtype, device=device, grad=False).chunk(2, dim=2)
    tensors = {"q": q.requires_grad_(), "k": k.requires_grad_()}
    cos, sin = internals.rotation_of(s.T, s.D, device)
    return Problem(sizes=s, dtype=dtype, tensors=tensors, shared={"cos": cos, "sin": sin})


def rotation(problem: Problem, *, backend: str) -> Work:
    """Queries and keys, rotated."""
    q, k = inputs = list(problem.tensors.values())
    cos, sin = problem.shared.values()
    call = internals.rotated if backend != "reference" else by_definition
    return Work(inputs=inputs, run=lambda: call(q, k, cos, sin), graded=2, linear=True)


def by_definition(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Feature x with neighbour y becomes x · cos + y · sin; sin carries the sign."""
    return tuple(x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin for x in (q, k))
