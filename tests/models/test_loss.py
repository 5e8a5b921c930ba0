"""The loss in pieces equals the loss at once, and keeps the logits of one piece at most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retpop.models import loss as module
from retpop.models.loss import chunked_cross_entropy

N, E, V = 50, 4, 32


def case() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(E, V, dtype=torch.float64)
    hidden = torch.randn(N, E, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[::7] = -100
    return head, hidden, targets


@pytest.fixture(params=[1, 7, N])
def tokens_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", request.param * V)
    return request.param


def test_in_pieces_it_is_the_same_with_the_same_gradients(tokens_at_once: int) -> None:
    head, hidden, targets = case()
    inputs = (hidden, head.weight, head.bias)
    loss = chunked_cross_entropy(head, hidden, targets, V)
    expected = F.cross_entropy(head(hidden), targets)
    torch.testing.assert_close(loss, expected)
    ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_logits_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * V)
    head, hidden, targets = case()
    kept: list[int] = []
    heights: list[int] = []
    head.register_forward_hook(lambda _, __, logits: heights.append(len(logits)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = chunked_cross_entropy(head, hidden, targets, V)
        forward = max(kept)
        loss.backward()
    assert forward <= max(hidden.numel(), head.weight.numel())
    assert max(heights) == 5
    assert len(heights) == 2 * (N // 5)  # each piece again in the backward pass


def test_low_precision_logits_give_a_float32_loss() -> None:
    head, hidden, targets = case()
    loss = chunked_cross_entropy(head.bfloat16(), hidden.bfloat16(), targets, V)
    assert loss.dtype == torch.float32


def test_where_no_token_counts_there_is_no_mean() -> None:
    head, hidden, targets = case()
    assert chunked_cross_entropy(head, hidden, torch.full_like(targets, -100), V).isnan()
