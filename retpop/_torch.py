"""Every private name of torch that the package uses, its purpose, and the questions that need one.

All of them exist in torch 2.9, 2.13 and 2.14. If another torch lacks one, only this module has to change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

__all__ = [
    "FakeTensor",
    "check",
    "constant_in_graphs",
    "float32_precision",
    "forward_ad_level",
    "is_batched",
    "is_plain",
    "is_tracing",
    "mode_is_active",
    "pytree",
    "transforms_are_active",
]

Function = TypeVar("Function", bound=Callable[..., Any])

transforms_are_active = torch._C._are_functorch_transforms_active
"""Whether any transform of `torch.func` (grad, jvp, vmap, ...) is active."""

forward_ad_level = partial(getattr, forward_ad, "_current_level")
"""The number of open levels of forward-mode AD, minus one."""

is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether a gradient stands for a batch of them (`torch.autograd.grad(..., is_grads_batched=True)`)."""

is_tracing = torch._C._is_tracing
"""Whether `torch.jit.trace` is at work."""

mode_is_active = torch._C._len_torch_dispatch_stack
"""The number of active dispatch modes, which see every operator: fake tensors, tracers, counters."""

float32_precision = partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
"""`torch.backends.cuda.matmul.fp32_precision`, for which that name takes many times as long."""

check = torch._check
"""Raise unless a condition holds, also for symbolic shapes; for fakes of operations."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is just ``kind.forward`` of its own ordinary tensors.

    It is not if the module was replaced (by an adapter, a quantised layer, a parametrisation), has a hook
    (old-style weight norms and pruning are hooks), has a new ``forward`` (from accelerate), or has a weight
    that is not an ordinary tensor (quantised or sharded).
    """
    return (
        type(module) is kind
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__
        and all(
            weight is None or type(weight) in (nn.Parameter, Tensor) for weight in module._parameters.values()
        )
        and not _has_any_global_hook()
    )


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The stored parameter ``name``; None if there is none or the module computes it on each access."""
    return module._parameters.get(name)


def constant_in_graphs(function: Function) -> Function:
    """Decorate a function whose result a compiled graph treats as a constant.

    This is `torch.compiler.assume_constant_result` without its import of the whole compiler.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function
