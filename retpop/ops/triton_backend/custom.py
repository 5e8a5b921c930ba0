"""How the Triton backend's operations are made: each a `torch.library` op that a graph can hold.

On a GPU an op launches kernels. On a CPU it launches them in Triton's interpreter if TRITON_INTERPRET is on.
Otherwise it computes the same in plain PyTorch, so that an exported or compiled program runs on a CPU too. A
call with `backend="triton"` on a CPU without the interpreter raises earlier.

An op takes tensors (or lists of them), then numbers. Its gradient is a separate op: it
takes the same tensors, the results' gradients, the same numbers, and a flag per tensor whether its gradient
is needed. Unsupported transforms raise and name the backend that supports them.

An eager call goes to the launchers themselves, through one `autograd.Function` where it needs a gradient:
torch.library's dispatch takes several times the host time, and only a graph needs it. What the call and its
gradient launch is planned once for arguments of the same forms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from inspect import signature
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retpop._torch import (
    check,
    float32_precision,
    forward_ad_level,
    is_batched,
    is_tracing,
    mode_is_active,
    transforms_are_active,
)
from retpop.arguments import are_batched, state_dtype, without_autocast

_Run = Callable[..., Any]

_Products = tuple[str, str | None]
"""torch's and Triton's settings of float32 products, which `kernels.launch.dot_precision` follows."""


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


KEPT = 1024
"""Planned calls of an op that are kept, the last used. Each is some kilobytes, and holds no tensor."""

_GRADIENTS_KEPT = 16
"""The same for the gradients of a planned call."""

Planned = Callable[[Sequence[Tensor]], Any]
"""An eager call of an op by kernels, as a function of its tensors; returns one, or several as a tuple."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """How an op is differentiated.

    Attributes:
        launch: computes the gradients by kernels. It takes the op's arguments with the list of its results'
            gradients, and the kept tensor if there is ``keep``, before the numbers, and at the end a flag for
            each tensor or None before the numbers. It gives a gradient or None for each.
        by_ops: the same by operations, for what has to see them: graphs and higher derivatives.
        num_tensors: the number of the op's arguments before the numbers.
        keep: as the op's launch, for eager calls: it also returns a tensor for ``launch``, or None.
        unsaved: the number of tensors, the first ones, that the gradient does not read.
    """

    launch: _Run
    by_ops: _Run
    num_tensors: int
    keep: _Run | None = None
    unsaved: int = 0

    def of(
        self,
        compute: _Run,
        arguments: Sequence[Any],
        kept: Tensor | None,
        grads: Iterable[Tensor | None],
        needs: Iterable[bool | None],
    ) -> Iterator[Tensor | None]:
        """Gradients of the arguments before the numbers, flat, and then None, by ``launch`` or ``by_ops``."""
        tensors, numbers = arguments[: self.num_tensors], arguments[self.num_tensors :]
        more = [] if self.keep is None else [kept]
        found = compute(*tensors, list(grads), *more, *numbers, list(map(bool, needs)))
        return chain(found, repeat(None))

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        """As `torch.library.register_autograd` takes it, for graphs."""
        tensors, ctx.numbers = inputs[: self.num_tensors], inputs[self.num_tensors :]
        ctx.layout = [len(x) if isinstance(x, list) else None for x in tensors]
        ctx.save_for_backward(*_flat(tensors)[self.unsaved :])
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The other half of `save`."""
        inputs = _laid_out([*[None] * self.unsaved, *ctx.saved_tensors], ctx.layout)
        needs = _flat(ctx.needs_input_grad[: self.num_tensors])
        found = self.of(self.by_ops, [*inputs, *ctx.numbers], None, _flat(grads), needs)
        return *_laid_out(found, ctx.layout), *[None] * len(ctx.numbers)


class KernelOp:
    """An op that kernels compute; call it with its arguments in order.

    Attributes:
        op: as torch.library knows it.
    """

    def __init__(self, op: torch.library.CustomOpDef, launch: _Run, changed: Sequence[int] = ()) -> None:
        """Take the op, its launcher, and the places of the arguments that it changes."""
        self.op, self._launch, self._changed = op, launch, changed
        self._gradient: Gradient | None = None
        self._plan = lru_cache(maxsize=KEPT)(self._planned)

    def differentiate_by(self, gradient: Gradient) -> None:
        """Register a gradient, for eager calls and for graphs."""
        self.op.register_autograd(gradient.differentiate, setup_context=gradient.save)
        self._gradient = gradient

    def __call__(self, *arguments: Any) -> Any:
        """The results: a tensor, or several as a tuple or a list."""
        if not (torch.compiler.is_compiling() or is_observed()):
            tensors: list[Tensor] = []
            call = self.planned(arguments, tensors)
            if call is not None:
                results = call(tensors)
                for place in self._changed:  # autograd must see it if it has saved the tensor
                    torch.autograd.graph.increment_version(arguments[place])
                return results
        return self.op(*arguments)

    def planned(self, arguments: Sequence[Any], tensors: list[Tensor]) -> Planned | None:
        """The planned call with such arguments, whose tensors go into a list; None if only the op can run."""
        forms = kernels("repeat").forms_of(arguments, tensors)
        if forms is None or not run_kernels(tensors[0]):
            return None
        return self._plan(forms, *setting())

    def _planned(self, forms: tuple[Any, ...], products: _Products, with_gradient: bool) -> Planned | None:
        repeats = kernels("repeat")
        if with_gradient and any(requires_grad for *_, requires_grad in repeats.tensor_forms(forms)):
            gradient = self._gradient
            return None if gradient is None else _Differentiable(self._launch, gradient, forms, products)
        call: Planned = repeats.recorded_call(self._launch, forms)
        return call


class _Differentiable:
    """A planned call that autograd knows.

    Attributes:
        run: launches for the arguments' tensors, without a gradient.
        keeps: whether the last of its results is a tensor for the gradient, or None.
        unsaved: see `Gradient`.
    """

    def __init__(self, launch: _Run, gradient: Gradient, forms: tuple[Any, ...], products: _Products) -> None:
        self._gradient, self._forms, self._products = gradient, forms, products
        self.keeps, self.unsaved = gradient.keep is not None, gradient.unsaved
        self.run: Planned = kernels("repeat").recorded_call(gradient.keep or launch, forms)
        self._plan = lru_cache(maxsize=_GRADIENTS_KEPT)(self._planned)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        return _Function.apply(self, *tensors)

    def gradients(
        self, saved: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> Any:
        """The gradients of the tensors, None where there is none.

        Args:
            saved: the tensors but for the unsaved ones, and the kept one.
            grads: of the results.
            needs: for each tensor, whether its gradient is needed.
        """
        tensors: list[Tensor] = []
        forms = kernels("repeat").forms_of((*saved, *grads), tensors)
        if forms is None or torch.is_grad_enabled() or is_observed() or any(map(is_batched, tensors)):
            return self._computed(self._gradient.by_ops, saved[:-1], None, grads, needs)
        return self._plan(forms, needs, products_setting())(tensors)

    def _planned(self, forms: tuple[Any, ...], needs: tuple[bool, ...], products: _Products) -> Planned:
        def launch(*given: Tensor | None) -> list[Tensor | None]:
            *saved, kept = given[: len(needs) - self.unsaved + 1]
            # A kept tensor is of the tiles that these settings chose.
            kept = kept if products == self._products else None
            return self._computed(self._gradient.launch, saved, kept, given[len(saved) + 1 :], needs)

        call: Planned = kernels("repeat").recorded_call(launch, forms)
        return call

    def _computed(
        self,
        compute: _Run,
        saved: Sequence[Tensor | None],
        kept: Tensor | None,
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        filled = kernels("repeat").filled
        arguments = filled(self._forms, iter([*[None] * self.unsaved, *saved]))
        flags = _flat(filled(self._forms[: self._gradient.num_tensors], iter(needs)))
        found = self._gradient.of(compute, arguments, kept, grads, flags)
        return [x for x, flag in zip(found, flags, strict=False) if flag is not None]


class _Function(torch.autograd.Function):
    """A planned call as a function of its tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Differentiable, *tensors: Tensor) -> Any:
        results, kept = call.run(tensors), None
        if call.keeps:
            *results, kept = results
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[call.unsaved :], kept)
        return results if isinstance(results, Tensor) else tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *ctx.call.gradients(ctx.saved_tensors, grads, ctx.needs_input_grad[1:])


def is_observed() -> bool:
    """Whether a mode, a transform or a tracer has to see an op."""
    return bool(mode_is_active() or transforms_are_active() or is_tracing())


def products_setting() -> _Products:
    """The settings of float32 products now."""
    return float32_precision(), kernels("launch").float32_default()


def setting() -> tuple[_Products, bool]:
    """What beside its arguments a planned call depends on: settings of float32 products, and grad mode."""
    return products_setting(), torch.is_grad_enabled()


def run_kernels(x: Tensor) -> bool:
    """Whether kernels run on a tensor's device."""
    return x.is_cuda or (x.is_cpu and interpreting())


def kernel_op(
    name: str,
    schema: str,
    *,
    launch: _Run,
    compute: _Run,
    fake: _Run,
    changes: Sequence[str] = (),
) -> KernelOp:
    """An op that kernels compute.

    Args:
        name: after ``retpop::``.
        schema: arguments and results.
        launch: computes by kernels, on a GPU or in the interpreter.
        compute: computes the same in plain PyTorch.
        fake: the results' shapes, after checking those of the arguments.
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
    return KernelOp(op, launch, [names.index(name) for name in changes])


def add_gradient(
    op: KernelOp,
    name: str,
    schema: str,
    *,
    launch: _Run,
    compute: _Run,
    num_tensors: int,
    keep: _Run | None = None,
) -> None:
    """Make the op ``name`` that computes the gradients of ``op``, and register it with autograd.

    Args:
        op: the op whose first ``num_tensors`` arguments are tensors, None, or lists of tensors.
        name: after ``retpop::``.
        schema: arguments (see the module), and the gradients that are wanted, in order.
        launch: computes gradients by kernels, None for those that are not needed.
        compute: computes the same in plain PyTorch.
        num_tensors: the number of its arguments before the numbers.
        keep: see `Gradient`. With it, the gradient's op takes the kept tensor, or None, after the results'
            gradients.
    """

    def fake(*arguments: Any) -> list[Tensor]:
        inputs, needs = _flat(arguments[:num_tensors]), arguments[-1]
        check(len(needs) == len(inputs), lambda: f"needs has {len(needs)} flags; it must have {len(inputs)}")
        return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]

    def owned(*arguments: Any) -> list[Tensor]:
        return [own(x) for x in compute(*arguments) if x is not None]

    def launched(*arguments: Any) -> list[Tensor]:
        # PyTorch negates views that are still to be negated, but not those in a list with None.
        grads = [None if x is None else x.resolve_neg() for x in arguments[num_tensors]]
        found = launch(*arguments[:num_tensors], grads, *arguments[num_tensors + 1 :])
        return [x for x in found if x is not None]

    gradient = kernel_op(name, schema, launch=launched, compute=owned, fake=fake)

    def refuse(ctx: object, *grads: object) -> None:
        raise RuntimeError(
            f'retpop::{name}: the Triton backend has no derivative of a derivative; backend="torch" has.'
        )

    gradient.op.register_autograd(refuse)

    def by_ops(*arguments: Any) -> list[Tensor | None]:
        if are_batched(arguments[num_tensors]):
            raise RuntimeError(
                f'retpop::{name}: the Triton backend takes no batches of gradients; backend="torch" does.'
            )
        found = iter(gradient(*arguments))
        return [next(found) if need else None for need in arguments[-1]]

    op.differentiate_by(Gradient(launch=launch, by_ops=by_ops, num_tensors=num_tensors, keep=keep))


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
