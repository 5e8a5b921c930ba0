"""A decoder of sizes that every tool takes, and its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retpop import RetNetConfig, RetNetDecoder

CONFIG = RetNetConfig(embed_dim=64, num_heads=2, num_layers=2, ffn_dim=64)


@pytest.fixture
def decoder() -> RetNetDecoder:
    torch.manual_seed(0)
    return RetNetDecoder(CONFIG).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x_pred() -> Tensor:
    return torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(2))
