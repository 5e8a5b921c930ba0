"""Retention in its three modes, forward and with backward, beside yet-another-retnet's.

Theirs keeps the last matrix of decays in a global cache, so in a loop like this one it computes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from yet_another_retnet.retention import retention_chunkwise, retention_parallel, retention_recurrent

import retpop

CHUNK = 64


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    D: int


SHAPES = {
    "small": Shape(B=4, T=256, H=4, D=16),
    "rem": Shape(B=8, T=650, H=4, D=64),  # the world model's sequence: 10 blocks of 65 tokens
    "long": Shape(B=1, T=4096, H=4, D=64),
}

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(mode: str, log_decay: Tensor) -> Run:
    return lambda q, k, v: retpop.retention(q, k, v, log_decay, mode=mode)[0]


def theirs(mode: str) -> Run:
    """Their functions take (B, H, T, D); chunks and tokens are the caller's loop."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if mode == "parallel":
            return retention_parallel(q, k, v)[0].transpose(1, 2)
        outs, state = [], None
        if mode == "chunkwise":
            for part in zip(*(x.split(CHUNK, dim=2) for x in (q, k, v)), strict=True):
                out, state = retention_chunkwise(*part, prev_state=state)
                outs.append(out)
            return torch.cat(outs, dim=2).transpose(1, 2)
        for token in zip(*(x.unbind(2) for x in (q, k, v)), strict=True):
            out, state = retention_recurrent(*token, prev_state=state)
            outs.append(out)
        return torch.stack(outs, dim=1)

    return run


# Token by token is for generating: without gradient, and not for long inputs.
CASES = [
    pytest.param(shape, mode, backward, id=f"{shape}-{mode}-{'backward' if backward else 'forward'}")
    for shape in SHAPES
    for mode in ("parallel", "chunkwise", "recurrent")
    for backward in (False, True)
    if mode != "recurrent" or not (backward or shape == "long")
]


@pytest.mark.parametrize("name", ["retpop", "yet-another-retnet"])
@pytest.mark.parametrize(("shape", "mode", "backward"), CASES)
def test_retention(
    timed: Callable[[str, Callable[[], object]], None],
    device: torch.device,
    shape: str,
    mode: str,
    backward: bool,
    name: str,
) -> None:
    B, T, H, D = SHAPES[shape]
    q, k, v = (torch.randn(B, T, H, D, device=device, requires_grad=backward) for _ in range(3))
    # The decay that theirs has built in.
    log_decay = retpop.log_spaced_decay(H).to(device)
    call = ours(mode, log_decay) if name == "retpop" else theirs(mode)
    torch.testing.assert_close(call(q, k, v), ours("chunkwise", log_decay)(q, k, v), rtol=1e-3, atol=1e-3)

    def run() -> None:
        out = call(q, k, v)
        if backward:
            out.sum().backward()

    timed(f"{mode}, {shape}, {'with backward' if backward else 'forward'}", run)
