"""Numbers as weights on bins, and rewards as classes."""

from __future__ import annotations

import pytest
import torch

from rem_atari.models.rewards import RewardCode
from rem_atari.models.two_hot import TwoHot

NUMBERS = torch.tensor([0.0, 1.0, -1.0, 0.1, -0.1, 5.0, 777.7, -12_345.6])


def test_the_mean_of_the_weights_is_the_number():
    code = TwoHot.symlog(255, "bins")
    weights = code.encode(NUMBERS)
    assert ((weights > 0).sum(dim=-1) <= 2).all()
    torch.testing.assert_close((weights * code.values).sum(dim=-1), NUMBERS, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(code.mean(weights.log()), NUMBERS, rtol=1e-5, atol=1e-6)
    assert code.values[127] == 0
    torch.testing.assert_close(code.values, -code.values.flip(0))


def test_what_lies_beyond_the_last_bin_counts_as_it():
    code = TwoHot(torch.tensor([-1.0, 0.0, 2.0]))
    assert code.encode(torch.tensor([5.0, -5.0, 2.0])).tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]


def test_the_divergence_is_least_and_0_at_the_number_itself():
    code = TwoHot.symlog(41, "bins")
    best = code.encode(NUMBERS).clamp(min=1e-30).log()
    torch.testing.assert_close(code.divergence(best, NUMBERS), torch.zeros(8), atol=1e-5, rtol=0)
    logits = torch.randn(8, 41, generator=torch.Generator().manual_seed(0))
    assert (code.divergence(logits, NUMBERS) > 0.1).all()


def test_uniform_logits_mean_0():
    assert abs(float(TwoHot.symlog(255, "bins").mean(torch.zeros(255)))) < 1e-3


@pytest.mark.parametrize("bins", [1, 2, 254])
def test_bins_without_a_middle_are_refused(bins):
    with pytest.raises(ValueError, match=rf"world_model\.reward_bins is {bins}; wanted 0"):
        RewardCode(bins)


def test_signs_are_three_classes_whose_loss_is_the_cross_entropy():
    code = RewardCode(0)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    classes = NUMBERS.sign().long() + 1
    wanted = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
    torch.testing.assert_close(code.loss(logits, NUMBERS), wanted)
    torch.testing.assert_close(code.sign_logits(logits), logits.log_softmax(dim=-1))
    generator = torch.Generator().manual_seed(0)
    assert set(code.draw(torch.zeros(200, 3), generator).tolist()) == {-1.0, 0.0, 1.0}


def test_bins_keep_sizes_and_their_signs_add_up():
    code = RewardCode(255)
    logits = code.two_hot.encode(NUMBERS).clamp(min=1e-9).log()
    torch.testing.assert_close(code.draw(logits, torch.Generator()), NUMBERS, rtol=1e-2, atol=0.05)
    assert (code.sign_logits(logits).argmax(dim=-1) - 1).tolist() == NUMBERS.sign().tolist()
    torch.testing.assert_close(code.sign_logits(logits).exp().sum(dim=-1), torch.ones(8))


@pytest.mark.parametrize("bins", [0, 41])
def test_the_base_rate_is_what_the_best_constant_scores(bins):
    code = RewardCode(bins)
    weights = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.5, 1.0, 0.0, 1.0])
    constant = torch.zeros(code.num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([constant], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        losses = code.loss(constant.expand(8, -1), NUMBERS)
        return (losses * weights).sum() / weights.sum()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(code.base_rate(NUMBERS, weights), loss().detach(), atol=2e-3, rtol=0)
