"""How the Triton backend's operations are made: each a `torch.library` op that a graph can hold.

On a GPU an op launches kernels. On a CPU it launches them in Triton's interpreter where TRITON_INTERPRET is
on, and otherwise computes the same in plain PyTorch, so that a program that was exported or compiled with
such ops runs on a CPU too. A call with `backend="triton"` on a CPU without the interpreter never comes here.

Transforms that would go wrong here raise, and name the backend that has them: vmap, and a derivative of a
derivative. Forward-mode AD cannot be seen from inside an op; `triton_backend` refuses it at the door.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from retpop.ops.autocast import without_autocast

_Run = Callable[..., Any]


def interpreting() -> bool:
    """Whether Triton's interpreter is on, by the words that Triton itself takes for it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def kernels(module: str) -> Any:
    """A module of `retpop.kernels`, imported when it is first needed, since it needs Triton."""
    return import_module(f"retpop.kernels.{module}")


def kernel_op(name: str, schema: str, *, launch: _Run, compute: _Run, fake: _Run) -> CustomOpDef:
    """An op that kernels compute.

    Args:
        name: after ``retpop::``.
        schema: arguments and results; the first argument is a tensor.
        launch: computes by kernels, on a GPU or in the interpreter.
        compute: computes the same in plain PyTorch.
        fake: the results' shapes, after checking those of the arguments.
    """

    return _finished(_op_with_kernels(name, schema, launch, compute), name, fake)


def gradient_op(name: str, schema: str, *, launch: _Run, compute: _Run, fake: _Run) -> CustomOpDef:
    """An op that finds gradients; it has no derivative of its own. Arguments as those of `kernel_op`."""
    op = _op_with_kernels(name, schema, launch, compute)

    def refuse(ctx: object, *grads: object) -> None:
        raise RuntimeError(
            f'retpop::{name}: the Triton backend has no derivative of a derivative; backend="torch" has.'
        )

    op.register_autograd(refuse)
    return _finished(op, name, fake)


def _op_with_kernels(name: str, schema: str, launch: _Run, compute: _Run) -> CustomOpDef:
    def on_gpu(first: Tensor, *rest: Any) -> Any:
        return launch(first, *rest)

    def on_cpu(first: Tensor, *rest: Any) -> Any:
        if interpreting():
            return launch(first, *rest)
        with without_autocast(first.device):
            return compute(first, *rest)

    op = torch.library.custom_op(
        f"retpop::{name}", on_gpu, mutates_args=(), device_types="cuda", schema=schema
    )
    op.register_kernel("cpu", on_cpu)
    return op


def _finished(op: CustomOpDef, name: str, fake: _Run) -> CustomOpDef:
    op.register_fake(fake)

    def refuse(info: object, in_dims: object, *arguments: object) -> None:
        raise RuntimeError(f'retpop::{name}: the Triton backend has no vmap; backend="torch" has.')

    op.register_vmap(refuse)
    return op


def check_tokens(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    """In a fake: q, k and v fit each other."""
    torch._check(q.dim() == dims, lambda: f"q has {q.dim()} dimensions; it must have {dims}")
    torch._check(q.shape == k.shape, lambda: f"q {tuple(q.shape)} and k {tuple(k.shape)} differ")
    torch._check(
        q.shape[:-1] == v.shape[:-1],
        lambda: f"q {tuple(q.shape)} and v {tuple(v.shape)} differ before the last dimension",
    )
    torch._check(q.dtype == k.dtype == v.dtype, lambda: f"dtypes {q.dtype}, {k.dtype} and {v.dtype} differ")


def check_log_decay(log_decay: Tensor, heads: int) -> None:
    """In a fake: one log-decay a head."""
    torch._check(
        log_decay.dim() == 1 and log_decay.shape[0] == heads,
        lambda: f"log_decay is {tuple(log_decay.shape)}; it must be ({heads},)",
    )


def check_state(state: Tensor | None, shape: tuple[int, ...]) -> None:
    """In a fake: a state, if there is one, has this shape."""
    torch._check(
        state is None or state.shape == shape,
        lambda: f"state is {None if state is None else tuple(state.shape)}; it must be {shape}",
    )


def own(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """``result`` laid out as a fake says, and never one of the inputs: an op may not return those."""
    result = result.contiguous()
    return result.clone() if any(result is x for x in inputs) else result


def selected(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, each in its input's dtype and in memory of its own."""
    return [
        grad.to(x.dtype).contiguous()
        for grad, x, need in zip(grads, inputs, needs, strict=True)
        if need and x is not None and grad is not None
    ]


def gradients_like(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """In a fake: what `selected` returns."""
    torch._check(
        len(needs) == len(inputs), lambda: f"needs has {len(needs)} flags; it must have {len(inputs)}"
    )
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


def spread(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that were needed, each in its place, and None elsewhere."""
    rest = iter(grads)
    return [next(rest) if need else None for need in needs]
