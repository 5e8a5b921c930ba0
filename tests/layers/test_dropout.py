"""Dropout: who is dropped, what becomes of the others, and where torch's own is called."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from retpop.layers.dropout import dropout

SHAPE = (3, 401, 67)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_is_dropped_and_the_rest_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(SHAPE, dtype=dtype, requires_grad=True)
    y = dropout(x, p, True)
    (3 * y).sum().backward()
    dropped = y == 0
    # Five standard deviations of the share.
    assert dropped.double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert torch.equal(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - p)))
    assert torch.equal(x.grad, 3 * y)
    assert y.dtype == dtype


def test_neighbours_are_dropped_independently() -> None:
    """Four elements share a random word; one of them says nothing of the others."""
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(100_000, 4), 0.5, True) == 0).double()
    assert (torch.corrcoef(dropped.T) - torch.eye(4)).abs().max() < 0.02
    torch.testing.assert_close(dropped.mean(dim=0), torch.full((4,), 0.5).double(), atol=0.01, rtol=0)


def test_the_seed_decides_and_the_input_stays() -> None:
    x = torch.randn(SHAPE)
    kept, results = x.clone(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(dropout(x, 0.3, True))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(x, kept)


def test_nothing_is_dropped_in_eval_or_at_zero() -> None:
    x = torch.randn(SHAPE)
    assert torch.equal(dropout(x, 0.5, False), x)
    assert torch.equal(dropout(x, 0.0, True), x)
    assert (dropout(x, 1.0, True) == 0).all()
    assert dropout(torch.ones(2, 0, 3), 0.5, True).shape == (2, 0, 3)
    assert dropout(x[:, ::2].mT, 0.5, True).shape == x[:, ::2].mT.shape


def test_compiled_and_under_functorch_it_is_torchs_own() -> None:
    x = torch.randn(4, 5)
    torch.manual_seed(0)
    wanted = F.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(torch.compile(dropout, backend="eager", fullgraph=True)(x, 0.5, True), wanted)
    mapped = torch.func.vmap(lambda row: dropout(row, 0.5, True), randomness="different")(x)
    assert ((mapped == 0) | torch.isclose(mapped, 2 * x)).all()
