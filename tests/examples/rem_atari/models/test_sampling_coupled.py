"""Coupled draws: each token has the distribution of its logits, and tokens change together."""

from __future__ import annotations

import torch

from rem_atari.models.sampling import sample_coupled

ROWS, PLACES, CLASSES = 20_000, 3, 5


def some_logits() -> torch.Tensor:
    logits = torch.randn(PLACES, CLASSES, generator=torch.Generator().manual_seed(0)) * 1.5
    logits[1, 2] = -torch.inf
    return logits


def draw(logits: torch.Tensor, before: list[int], rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return sample_coupled(logits.expand(rows, -1, -1), torch.tensor(before).expand(rows, -1), generator)


def test_each_token_alone_has_the_distribution_of_its_logits():
    """Pearson's chi-square with 4 degrees of freedom, whose 99.9th percentile is 18.5."""
    logits = some_logits()
    expected = logits.softmax(dim=-1) * ROWS
    for before in ([0, 1, 2], [4, 2, 0], [3, 3, 3]):
        tokens = draw(logits, before)
        for place in range(PLACES):
            counts = tokens[:, place].bincount(minlength=CLASSES)
            possible = expected[place] > 0
            assert counts[~possible].sum() == 0
            off = (counts - expected[place])[possible].square() / expected[place][possible]
            assert off.sum() < 18.5


def test_tokens_with_equal_chances_to_stay_stay_and_go_together():
    """Where each is drawn for itself they agree in half of the rows only."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, 0.0]])
    tokens = draw(logits, [0, 0])
    stays = tokens == 0
    assert torch.equal(stays[:, 0], stays[:, 1])
    assert 0.48 < stays[:, 0].float().mean() < 0.52
    assert set(tokens[~stays[:, 0], 0].tolist()) == {1}


def test_what_is_certain_is_drawn():
    logits = torch.full((1, 2, CLASSES), -torch.inf)
    logits[0, 0, 3] = logits[0, 1, 4] = 0.0
    assert draw(logits[0], [3, 0]).unique(dim=0).tolist() == [[3, 4]]


def test_logits_that_are_not_finite_give_indices_all_the_same():
    """Whoever checks the loss is to meet them, not whoever looks an index up."""
    tokens = draw(torch.full((PLACES, CLASSES), torch.nan), [0, 1, 2], rows=4)
    assert ((tokens >= 0) & (tokens < CLASSES)).all()
