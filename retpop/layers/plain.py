"""Whether a module is what it was made as: then, and only then, it may be read instead of called."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


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
