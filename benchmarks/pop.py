"""POP beside what it replaces: a pass of retention for every prediction block, from its own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import retpop


class Shape(NamedTuple):
    B: int
    N: int
    L: int
    M: int
    H: int
    D: int


SHAPES = {
    "small": Shape(B=8, N=5, L=10, M=9, H=4, D=16),  # the Catch preset's world model
    "rem": Shape(B=8, N=10, L=65, M=64, H=4, D=64),
}


def block_by_block(main: list[Tensor], pred: list[Tensor], log_decay: Tensor, block_size: int) -> Tensor:
    """Predictions (B, P, M, H, D), P = N, one block after another."""
    state, preds = None, []
    for n in range(pred[0].shape[1]):
        preds.append(retpop.retention(*(x[:, n] for x in pred), log_decay, state=state)[0])
        block = slice(n * block_size, (n + 1) * block_size)
        _, state = retpop.retention(*(x[:, block] for x in main), log_decay, state=state)
    return torch.stack(preds, dim=1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("way", ["pop", "block by block"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pop(
    timed: Callable[[str, Callable[[], object]], None],
    device: torch.device,
    shape: str,
    way: str,
    backward: bool,
) -> None:
    B, N, L, M, H, D = SHAPES[shape]
    main = [torch.randn(B, N * L, H, D, device=device, requires_grad=backward) for _ in range(3)]
    pred = [torch.randn(B, N, M, H, D, device=device, requires_grad=backward) for _ in range(3)]
    log_decay = retpop.log_spaced_decay(H).to(device)

    def all_at_once() -> Tensor:
        return retpop.pop_retention(*main, *pred, log_decay, block_size=L)[1]

    def one_by_one() -> Tensor:
        return block_by_block(main, pred, log_decay, L)

    call = all_at_once if way == "pop" else one_by_one
    torch.testing.assert_close(call(), all_at_once(), rtol=1e-3, atol=1e-3)

    def run() -> None:
        predicted = call()
        if backward:
            predicted.sum().backward()

    timed(f"pop, {shape}, {'with backward' if backward else 'forward'}", run)
