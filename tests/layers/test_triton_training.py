"""A small decoder trained by the kernels, in Triton's interpreter, beside the same one trained by PyTorch."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from module_cases import make_decoder
from retention_cases import normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import retpop


def make(num_layers: int) -> retpop.RetNetDecoder:
    cfg = retpop.RetNetConfig(
        embed_dim=32, num_heads=2, num_layers=num_layers, ffn_dim=64, decay="log_spaced"
    )
    torch.manual_seed(0)
    return retpop.RetNetDecoder(cfg)


def pop_loss(decoder: retpop.RetNetDecoder, step: int, backend: str, blocks: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, blocks * 9, 32, generator=generator)
    queries, target = torch.randn(2, 2, blocks, 8, 32, generator=generator)
    reset = torch.rand(2, blocks, generator=generator) < 0.2
    out, pred, state = decoder.pop(x, queries, block_size=9, reset=reset, backend=backend)
    return (pred - target).square().mean() + out.square().mean() + 1e-3 * state.kv.square().mean()


def sequence_loss(decoder: retpop.RetNetDecoder, step: int, backend: str, blocks: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn(2, 2, 1 + 12 * blocks, 32, generator=generator)
    first, state = decoder(x[:, : 7 * blocks], backend=backend)
    rest, state = decoder(x[:, 7 * blocks :], state, backend=backend)  # the gradient flows between
    return (torch.cat((first, rest), dim=1) - target).square().mean() + 1e-3 * state.kv.square().mean()


@pytest.mark.parametrize(
    ("steps", "layers", "blocks"), [(2, 1, 1), pytest.param(32, 2, 3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("loss_of", [pop_loss, sequence_loss])
def test_the_kernels_train_as_pytorch_does(loss_of, steps: int, layers: int, blocks: int) -> None:
    """Through steps of AdamW the losses stay within 1e-5 of each other, and fall."""
    ours = make(layers)
    theirs = copy.deepcopy(ours)
    losses: dict[str, list[float]] = {}
    for decoder, backend in ((ours, "triton"), (theirs, "torch")):
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
        losses[backend] = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(decoder, step, backend, blocks)
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    torch.testing.assert_close(
        torch.tensor(losses["triton"]), torch.tensor(losses["torch"]), rtol=1e-5, atol=0
    )
    if steps > 2:  # each step has a batch of its own
        assert losses["triton"][-1] < losses["triton"][0]


def gradients_of_pop(run, decoder: retpop.RetNetDecoder) -> list[Tensor]:
    """Of a loss of everything that a POP pass gives, in every parameter and both inputs."""
    x, x_pred = (normal(2, *shape, 12, seed=1, dtype=torch.float32) for shape in ((6,), (2, 4)))
    leaves = [*decoder.parameters(), x.requires_grad_(), x_pred.requires_grad_()]
    torch.manual_seed(3)  # dropout
    out, pred, state = run(x, x_pred)
    loss = out.square().mean() + pred.square().mean() + 1e-3 * state.kv.square().mean()
    return list(torch.autograd.grad(loss, leaves))


def test_checkpointed_or_deterministic_training_has_the_same_bits() -> None:
    """A checkpoint runs the forward again in the backward, dropout included.

    `use_deterministic_algorithms` refuses nothing, and fills new memory with NaN, which is never read.
    """
    decoder = make_decoder(torch.float32, num_layers=1, dropout=0.2).train()
    pop = functools.partial(decoder.pop, block_size=3, backend="triton")
    expected = gradients_of_pop(pop, decoder)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        found = gradients_of_pop(functools.partial(checkpoint, pop, use_reentrant=False), decoder)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
