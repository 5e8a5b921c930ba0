"""Whether a module is what it was made as: then, and only then, it may be read instead of called."""

from __future__ import annotations

from torch import Tensor, nn

from retpop._torch import has_global_hook, own_hooks, own_parameters


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is ``kind.forward`` of its own ordinary tensors, and nothing else.

    It is not where something else stands in its place (an adapter, a quantised layer, a parametrisation),
    where a hook sees it (old-style weight norms and pruning are hooks), where its ``forward`` was replaced
    (by accelerate), or where a weight is no ordinary tensor (quantised or sharded).
    """
    return (
        type(module) is kind
        and not any(own_hooks(module))
        and "forward" not in module.__dict__
        and all(
            weight is None or type(weight) in (nn.Parameter, Tensor)
            for weight in own_parameters(module).values()
        )
        and not has_global_hook()
    )
