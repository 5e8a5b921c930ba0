"""How the Triton backend's operations are made: each a `torch.library` op that a graph can hold.

On a GPU an op launches kernels. On a CPU it launches them in Triton's interpreter if TRITON_INTERPRET is on.
Otherwise it computes the same in plain PyTorch, so that an exported or compiled program runs on a CPU too. A
call with `backend="triton"` on a CPU without the interpreter raises earlier.

An op takes tensors (or lists of them), then numbers. Its gradient is a separate op: it
takes the same tensors, the results' gradients, the same numbers, and a flag per tensor whether its gradient
is needed. Unsupported transforms raise and name the backend that supports them.

An eager call goes to the launcher itself, through one `autograd.Function` where it needs a gradient:
torch.library's dispatch takes several times the host time, and only a graph needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from importlib import import_module
from inspect import signature
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retpop._torch import check, forward_ad_level, mode_is_active, transforms_are_active
from retpop.arguments import are_batched, state_dtype, without_autocast

_Run = Callable[..., Any]


def interpreting() -> bool:
    """Whether Triton's interpreter is on, by the values that Triton itself accepts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def kernels(module: str) -> Any:
    """A module of `retpop.kernels`, imported on first use because it needs Triton."""
    return import_module(f"retpop.kernels.{module}")


def why_transformed() -> str | None:
    """Half a sentence that names the active transform of torch.func or forward-mode AD, or None.

    The kernels' operations have only a gradient; forward-mode AD would see a zero tangent.
    """
    if transforms_are_active():
        return "a transform of torch.func (grad, jvp, vmap, ...) is at work"
    return "forward-mode AD is at work" if forward_ad_level() >= 0 else None


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise if a transform is active or one of ``tensors`` has a tangent: ops see neither."""
    reason = why_transformed()
    if reason is None:
        return
    given = (x for x in tensors if x is not None)
    if transforms_are_active() or any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise RuntimeError(f'backend="triton" cannot run: {reason}; backend="torch" can.')


class KernelOp:
    """An op that kernels compute; call it with its arguments in order."""

    def __init__(
        self,
        op: torch.library.CustomOpDef,
        launch: _Run,
        keep: _Run | None = None,
        changed: Sequence[int] = (),
    ) -> None:
        self._op, self._launch, self._keep, self._changed = op, launch, keep, changed
        self._function: type[torch.autograd.Function]

    @property
    def keeps(self) -> bool:
        """Whether an eager call that needs a gradient may keep a tensor for it."""
        return self._keep is not None

    def register_autograd(self, differentiate: _Run, *, setup_context: _Run | None = None) -> None:
        """As `torch.library.register_autograd`."""
        self._op.register_autograd(differentiate, setup_context=setup_context)
        self._function = _function(differentiate, setup_context)

    def __call__(self, *arguments: Any) -> Any:
        """The results: a tensor, or several as a tuple or a list."""
        if torch.compiler.is_compiling() or is_observed():
            return self._op(*arguments)
        tensors: list[Tensor] = []
        forms = kernels("repeat").forms_of(arguments, tensors)
        if forms is None or not run_kernels(tensors):
            return self._op(*arguments)
        results = self.run(forms, tensors)
        for place in self._changed:  # autograd must see it if it has saved the tensor
            torch.autograd.graph.increment_version(arguments[place])
        return results

    def run(self, forms: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
        """The results of eager arguments of these forms and tensors, which kernels can run."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self._function.apply(self, forms, *tensors)
        return self.repeats(forms, tensors)

    @cached_property
    def repeats(self) -> Any:
        """Runs the kernels for arguments by their forms, and their tensors (`retpop.kernels.repeat`)."""
        return kernels("repeat").Repeats(self._launch)

    def run_and_keep(self, forms: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Any, Tensor | None]:
        """The results as `repeats` returns them, and a tensor for the gradient, if there is one to keep."""
        if self._keep is None:
            return self.repeats(forms, tensors), None
        *results, kept = self._keeping(forms, tensors)
        return tuple(results), kept

    @cached_property
    def _keeping(self) -> Any:
        return kernels("repeat").Repeats(self._keep)

    def filled(self, forms: tuple[Any, ...], tensors: Iterable[Any]) -> list[Any]:
        """The arguments of these forms, with other things in place of their tensors."""
        return kernels("repeat").filled(forms, iter(tensors))

    def at_tensors(self, forms: tuple[Any, ...], arguments: Sequence[Any]) -> list[Any]:
        """What stands in place of the tensors: the inverse of `filled`."""
        return kernels("repeat").at_tensors(forms, arguments)


def is_observed() -> bool:
    """Whether a mode, a transform or a tracer has to see an op."""
    return bool(mode_is_active() or transforms_are_active() or torch.jit.is_tracing())


def run_kernels(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels run on tensors, as on a GPU; those of a GPU are all on the first one's."""
    # Stand-ins without values have the device index of a CPU.
    return tensors[0].is_cuda or (interpreting() and all(x.is_cpu for x in tensors))


def _function(differentiate: _Run, save: _Run | None) -> type[torch.autograd.Function]:
    """An op as a differentiable function of its arguments' forms and tensors."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, op: KernelOp, forms: tuple[Any, ...], *tensors: Tensor) -> Any:
            ctx.op, ctx.forms = op, forms
            result, ctx.kept = op.run_and_keep(forms, tensors)
            if save is not None:
                save(ctx, tuple(op.filled(forms, tensors)), result)
            del ctx.kept
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needs = ctx.needs_input_grad
            ctx.needs_input_grad = ctx.op.filled(ctx.forms, needs[2:])
            try:
                found = differentiate(ctx, *grads)
            finally:
                ctx.needs_input_grad = needs
            return None, None, *ctx.op.at_tensors(ctx.forms, found)

    return Function


def kernel_op(
    name: str,
    schema: str,
    *,
    launch: _Run,
    compute: _Run,
    fake: _Run,
    keep: _Run | None = None,
    changes: Sequence[str] = (),
) -> KernelOp:
    """An op that kernels compute.

    Args:
        name: after ``retpop::``.
        schema: arguments and results.
        launch: computes by kernels, on a GPU or in the interpreter.
        compute: computes the same in plain PyTorch.
        fake: the results' shapes, after checking those of the arguments.
        keep: as ``launch``, for a call that needs a gradient: it also returns a tensor for the gradient's
            op, or None. Graphs do not use it.
        changes: names of the arguments that it changes in place.
    """

    def on_cpu(*arguments: Any) -> Any:
        if interpreting():
            return launch(*arguments)
        with without_autocast(torch.device("cpu")):
            return compute(*arguments)

    op = torch.library.custom_op(
        f"retpop::{name}", launch, mutates_args=changes, device_types="cuda", schema=schema
    )
    op.register_kernel("cpu", on_cpu)
    op.register_fake(fake)

    def refuse(info: object, in_dims: object, *arguments: object) -> None:
        raise RuntimeError(f'retpop::{name}: the Triton backend has no vmap; backend="torch" has.')

    op.register_vmap(refuse)
    names = list(signature(launch).parameters)
    return KernelOp(op, launch, keep, [names.index(name) for name in changes])


def add_gradient(
    op: KernelOp, name: str, schema: str, *, launch: _Run, compute: _Run, num_tensors: int
) -> None:
    """Make the op ``name`` that computes the gradients of ``op``, and register it with autograd.

    Args:
        op: the op whose first ``num_tensors`` arguments are tensors, None, or lists of tensors.
        name: after ``retpop::``.
        schema: arguments (see the module), and the gradients that are wanted, in order.
        launch: computes gradients by kernels, None for those that are not needed.
        compute: computes the same in plain PyTorch.
        num_tensors: the number of its arguments before the numbers.

    If ``op`` keeps a tensor, the gradient's op takes it, or None, after the results' gradients.
    """

    def fake(*arguments: Any) -> list[Tensor]:
        inputs, needs = _flat(arguments[:num_tensors]), arguments[-1]
        check(len(needs) == len(inputs), lambda: f"needs has {len(needs)} flags; it must have {len(inputs)}")
        return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]

    def owned(*arguments: Any) -> list[Tensor]:
        return [own(x) for x in compute(*arguments) if x is not None]

    def launched(*arguments: Any) -> list[Tensor]:
        return [x for x in launch(*arguments) if x is not None]

    gradient = kernel_op(name, schema, launch=launched, compute=owned, fake=fake)

    def refuse(ctx: object, *grads: object) -> None:
        raise RuntimeError(
            f'retpop::{name}: the Triton backend has no derivative of a derivative; backend="torch" has.'
        )

    gradient.register_autograd(refuse)

    def save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.layout = [len(x) if isinstance(x, list) else None for x in inputs[:num_tensors]]
        ctx.numbers = inputs[num_tensors:]
        # A kept tensor is of the tiles that this setting chose.
        ctx.precision = torch.get_float32_matmul_precision()
        ctx.save_for_backward(*_flat(inputs[:num_tensors]), getattr(ctx, "kept", None))
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat_grads = _flat(grads)
        if are_batched(flat_grads):
            raise RuntimeError(
                f'retpop::{name}: the Triton backend takes no batches of gradients; backend="torch" does.'
            )
        needs = list(map(bool, _flat(ctx.needs_input_grad[:num_tensors])))
        *saved, kept = ctx.saved_tensors
        inputs = _laid_out(saved, ctx.layout)
        may_take = ctx.precision == torch.get_float32_matmul_precision()
        more = [kept if may_take else None] if op.keeps else []
        found = iter(gradient(*inputs, flat_grads, *more, *ctx.numbers, needs))
        wanted = [next(found) if need else None for need in needs]
        return *_laid_out(wanted, ctx.layout), *[None] * len(ctx.numbers)

    op.register_autograd(differentiate, setup_context=save)


def own(result: Tensor) -> Tensor:
    """``result`` in the fake's layout and in new memory, because an op may not return an input."""
    return result.clone(memory_format=torch.contiguous_format)


def _flat(arguments: Iterable[Any]) -> list[Any]:
    """The arguments with lists and tuples flattened."""
    flat: list[Any] = []
    for one in arguments:
        if isinstance(one, (list, tuple)):
            flat += one
        else:
            flat.append(one)
    return flat


def _laid_out(flat: Iterable[Any], layout: Sequence[int | None]) -> list[Any]:
    """The inverse of `_flat`, given the length of each list, or None for a single argument."""
    rest: Iterator[Any] = iter(flat)
    return [next(rest) if size is None else list(islice(rest, size)) for size in layout]


def check_tokens(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    """Check in a fake that q, k and v fit each other."""
    check(q.dim() == dims, lambda: f"q has {q.dim()} dimensions; it must have {dims}")
    check(q.shape == k.shape, lambda: f"q {tuple(q.shape)} and k {tuple(k.shape)} differ")
    check(
        q.shape[:-1] == v.shape[:-1],
        lambda: f"q {tuple(q.shape)} and v {tuple(v.shape)} differ before the last dimension",
    )
    check(q.dtype == k.dtype == v.dtype, lambda: f"dtypes {q.dtype}, {k.dtype} and {v.dtype} differ")


def final_state(q: Tensor, v: Tensor, rows: int, log_decay: Tensor, state: Tensor | None) -> Tensor:
    """For fakes: the state after (B, T, H, D), after a check of log-decays and initial state."""
    heads = q.shape[2]
    check(
        log_decay.dim() == 1 and log_decay.shape[0] == heads,
        lambda: f"log_decay is {tuple(log_decay.shape)}; it must be ({heads},)",
    )
    shape = (rows, heads, q.shape[3], v.shape[3])
    check(
        state is None or state.shape == shape,
        lambda: f"state is {None if state is None else tuple(state.shape)}; it must be {shape}",
    )
    return q.new_empty(shape, dtype=state_dtype(q.dtype))
