"""A small decoder trained by the kernels, in Triton's interpreter, beside the same one trained by PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import retpop

CONFIG = retpop.RetNetConfig(embed_dim=32, num_heads=2, num_layers=2, ffn_dim=64, decay="log_spaced")


def pop_loss(decoder: retpop.RetNetDecoder, step: int, backend: str) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 3 * 9, 32, generator=generator)
    queries, target = torch.randn(2, 2, 3, 8, 32, generator=generator)
    reset = torch.rand(2, 3, generator=generator) < 0.2
    out, pred, state = decoder.pop(x, queries, block_size=9, reset=reset, backend=backend)
    return (pred - target).square().mean() + out.square().mean() + 1e-3 * state.kv.square().mean()


def sequence_loss(decoder: retpop.RetNetDecoder, step: int, backend: str) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn(2, 2, 37, 32, generator=generator)
    first, state = decoder(x[:, :20], backend=backend)
    rest, state = decoder(x[:, 20:], state, backend=backend)  # the gradient flows through the state between
    return (torch.cat((first, rest), dim=1) - target).square().mean() + 1e-3 * state.kv.square().mean()


@pytest.mark.parametrize("steps", [2, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss_of", [pop_loss, sequence_loss])
def test_the_kernels_train_as_pytorch_does(loss_of, steps: int) -> None:
    """Through steps of AdamW the losses stay within 1e-5 of each other, and fall."""
    torch.manual_seed(0)
    ours = retpop.RetNetDecoder(CONFIG)
    theirs = copy.deepcopy(ours)
    losses: dict[str, list[float]] = {}
    for decoder, backend in ((ours, "triton"), (theirs, "torch")):
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
        losses[backend] = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(decoder, step, backend)
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    torch.testing.assert_close(
        torch.tensor(losses["triton"]), torch.tensor(losses["torch"]), rtol=1e-5, atol=0
    )
    if steps > 2:  # each step has a batch of its own
        assert losses["triton"][-1] < losses["triton"][0]
