"""Context parallelism: each rank of a process group holds a slice of every sequence, in rank order.

    group = torch.distributed.new_group(...)             # or a DeviceMesh of one dimension
    own = x.tensor_split(group.size(), dim=1)[group.rank()]
    out, state = decoder(own, state, context_parallel=group)

- Slices may differ in length, and may be empty. POP's slices are whole blocks, each rank with the predictions
  that start from its own boundaries.
- A row of packed sequences is cut like any other; every rank passes ``cu_seqlens`` of the whole row.
- A state that is passed in belongs to the start of the whole sequence and is the same on every rank. Every
  rank returns the state after the whole sequence.
- The loss is the sum of the ranks' losses, and every rank calls backward. The gradient of a shared tensor (a
  weight, a decay, a state passed in) is then the sum of the ranks' gradients.
- Every rank makes the same calls, or the others wait until the group's timeout.

A rank's slice changes a state by S -> γ^n S + C, so only C moves, one state per layer and row: an
all-gather forward, and a reduce-scatter of gradients backward, each over (ranks - 1) states per rank. Each
packed sequence moves one state, and retention runs twice, the first time for C alone. The numbers of tokens
are gathered once per call.

This module holds the group and the collectives; `retpop.ops.slices` holds the arithmetic.

Source: LASP-2, arXiv 2502.07563, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "check_agreement", "process_group"]

# Renamed in torch 2.13, where the old names warn. A torch without torch.distributed has neither.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def process_group(where: str, group: object) -> Any:
    """The process group that a user named: a group of this process, or a device mesh of one dimension.

    Raises:
        TypeError: it is something else, or a group that this process is not a member of.
        RuntimeError: this torch has no `torch.distributed`.
    """
    if not dist.is_available():
        raise RuntimeError(f"{where}: context_parallel was given, but this torch has no torch.distributed.")
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{where}: context_parallel is a mesh of {group.ndim} dimensions {group.mesh_dim_names}; "
                "it must have one: choose it by name, as in mesh['cp']."
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{where}: context_parallel is {group!r} ({type(group).__name__}); it must be a process group "
            "that this process is a member of, or a DeviceMesh."
        )
    return group


def check_agreement(where: str, facts: Mapping[str, int], group: Any) -> None:
    """Raise ValueError on every rank if one fact, such as a number of heads, differs between ranks."""
    ranks = all_gather(torch.tensor(list(facts.values()), dtype=torch.int64), group).tolist()
    for name, values in zip(facts, zip(*ranks, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{where}: with context_parallel all ranks must agree in {name}; "
                f"ranks 0 to {len(values) - 1} have {', '.join(map(str, values))}."
            )


def all_gather(x: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, (ranks, ...), each of the shape of ``x``.

    Its gradient is the sum of the ranks' gradients of this rank's tensor, by one reduce-scatter. It cannot be
    differentiated twice.
    """
    gathered: Tensor = _AllGather.apply(x, group)
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(group.size() * x.numel())
        _all_gather(gathered, x.reshape(-1), group=group)
        return gathered.view(-1, *x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[1:])
        _reduce_scatter(own.view(-1), grad.reshape(-1), group=ctx.group)
        return own, None
