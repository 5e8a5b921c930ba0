"""Which parameters weight decay applies to."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for AdamW: decayed, and the biases, norms and embeddings, which are not.

    Anything with fewer than two dimensions is a bias or belongs to a norm; embeddings are the weights of
    `nn.Embedding`. Frozen parameters are in neither group.

    Args:
        module: whose parameters to group; each goes into one group, in the order of ``module.modules()``.
        weight_decay: the decay of the first group.
    """
    decayed, undecayed = {}, {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            exempt = isinstance(owner, nn.Embedding) or parameter.dim() < 2
            if parameter.requires_grad:
                (undecayed if exempt else decayed)[id(parameter)] = parameter
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(undecayed.values()), "weight_decay": 0.0},
    ]
