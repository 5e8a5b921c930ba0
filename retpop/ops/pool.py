"""States in a pool, in plain PyTorch: what backends without a kernel for it do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retpop.ops.powers import DecayPowers


def through_states(
    retention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    states: Tensor,
    index: Tensor,
    count: Tensor | None,
) -> Tensor:
    """`retpop.pooled_retention` by a backend's ``retention``, one token at a time."""
    is_here = (index >= 0) & (index < states.shape[0])
    places = index[is_here].long()
    q, k, v = (x[is_here] for x in (q, k, v))
    state = kept = states[places]
    outs = []
    for t in range(q.shape[1]):
        token = (x[:, t : t + 1] for x in (q, k, v))
        out, state = retention(*token, powers, mode="recurrent", state=state, chunk_size=None, packing=None)
        outs.append(out)
        taken = None if count is None else (count[is_here] > t).view(-1, 1, 1, 1)
        kept = state if taken is None else torch.where(taken, state, kept)
    result = v.new_zeros(index.shape[0], *v.shape[1:])
    if outs:
        result[is_here] = torch.cat(outs, dim=1)
    states[places] = kept
    return result
