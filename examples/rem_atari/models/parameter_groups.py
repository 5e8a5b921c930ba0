"""Which parameters weight decay applies to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    module: nn.Module, weight_decay: float, orthogonal: Iterable[nn.Module] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: decayed, and the biases, norms and embeddings, which are not.

    Anything with fewer than two dimensions is a bias or belongs to a norm; embeddings are the weights of
    `nn.Embedding`. Frozen parameters are in neither group.

    Args:
        module: whose parameters to group; each goes into one group, in the order of ``module.modules()``.
        weight_decay: the decay of the first group.
        orthogonal: parts of the module whose linear layers' matrices go into a third group, decayed too, for
            `Muon`; there is none without such parts.
    """
    linear = (layer for part in orthogonal for layer in part.modules() if isinstance(layer, nn.Linear))
    matrices = {id(layer.weight): layer.weight for layer in linear if layer.weight.requires_grad}
    decayed, undecayed = {}, {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            exempt = isinstance(owner, nn.Embedding) or parameter.dim() < 2
            if parameter.requires_grad and id(parameter) not in matrices:
                (undecayed if exempt else decayed)[id(parameter)] = parameter
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(undecayed.values()), "weight_decay": 0.0},
    ]
    if matrices:
        third = {"params": list(matrices.values()), "weight_decay": weight_decay, "orthogonal": True}
        groups.append(third)
    return groups
