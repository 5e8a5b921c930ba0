"""Every private name of torch that the package touches, and what each is for, or what is asked with it.

All of them are in torch 2.9, 2.13 and 2.14. If another torch lacks one, this module is what changes.
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
    "forward_ad_level",
    "is_batched",
    "is_plain",
    "pytree",
    "transforms_are_active",
]

Function = TypeVar("Function", bound=Callable[..., Any])

transforms_are_active = torch._C._are_functorch_transforms_active
"""Whether a transform of `torch.func` (grad, jvp, vmap, ...) is at work on anything."""

forward_ad_level = partial(getattr, forward_ad, "_current_level")
"""How many levels of forward-mode AD are open, less one."""

is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether a gradient stands for a batch of them (`torch.autograd.grad(..., is_grads_batched=True)`)."""

check = torch._check
"""Raises unless a condition holds, also of shapes that a graph does not know yet; for fakes of operations."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is ``kind.forward`` of its own ordinary tensors, and nothing else.

    It is not where something else stands in its place (an adapter, a quantised layer, a parametrisation),
    where a hook sees it (old-style weight norms and pruning are hooks), where its ``forward`` was replaced
    (by accelerate), or where a weight is no ordinary tensor (quantised or sharded).
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


def constant_in_graphs(function: Function) -> Function:
    """Decorates what a graph that is being compiled calls as it stands, and keeps the answer of.

    It is `torch.compiler.assume_constant_result` without its import of the whole compiler.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function
