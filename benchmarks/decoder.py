"""A decoder at a world model's work: a pass of training, and a step of imagination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import retpop


@dataclass(frozen=True)
class WorldModel:
    """A decoder's config, and the sizes of a batch: B rows of N blocks of K tokens and an action."""

    config: retpop.RetNetConfig
    B: int
    N: int
    K: int


WORLD_MODELS = {
    "small": WorldModel(
        retpop.RetNetConfig(embed_dim=64, num_heads=4, num_layers=2, ffn_dim=256, decay="log_spaced"),
        B=16,
        N=5,
        K=9,
    ),
    "rem": WorldModel(
        retpop.RetNetConfig(embed_dim=256, num_heads=4, num_layers=5, ffn_dim=1024, decay="log_spaced"),
        B=4,
        N=10,
        K=64,
    ),
}


@pytest.mark.parametrize("size", WORLD_MODELS)
def test_training_pass(
    timed: Callable[[str, Callable[[], object]], None], device: torch.device, size: str
) -> None:
    """Forward and backward over sequences, every block predicted from what came before it."""
    model = WORLD_MODELS[size]
    decoder = retpop.RetNetDecoder(model.config, device=device)
    width = model.config.embed_dim
    x = torch.randn(model.B, model.N * (model.K + 1), width, device=device)
    x_pred = torch.randn(model.B, model.N, model.K, width, device=device)

    def run() -> None:
        out, pred, _ = decoder.pop(x, x_pred, block_size=model.K + 1)
        (out.square().mean() + pred.square().mean()).backward()

    timed(f"decoder, training pass, {size}", run)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("size", WORLD_MODELS)
def test_imagination_step(
    timed: Callable[[str, Callable[[], object]], None], device: torch.device, size: str, passes: int
) -> None:
    """Take in a block and predict the next one: in one pass, or in two."""
    model = WORLD_MODELS[size]
    decoder = retpop.RetNetDecoder(model.config, device=device).eval()
    width = model.config.embed_dim
    x = torch.randn(model.B, model.K + 1, width, device=device)
    x_pred = torch.randn(model.B, 1, model.K, width, device=device)
    state = decoder.init_state(model.B)

    @torch.no_grad()
    def run() -> None:
        if passes == 1:
            decoder.pop(x, x_pred, state, block_size=model.K + 1, offset=1)
        else:
            _, after = decoder(x, state)
            decoder.pop(x[:, :0], x_pred, after, block_size=model.K + 1)

    timed(f"decoder, imagination step, {size}", run)
