"""λ-returns against the definition as a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rem_atari.training.returns import lambda_return


def lambda_return_by_hand(rewards, ended, values, bootstrap, gamma, lambda_):
    """One row at a time, by recursion on the definition."""
    rows = []
    for row in range(rewards.shape[0]):
        row_values = [*values[row].tolist(), bootstrap[row].item()]

        def g(t, row=row, row_values=row_values):
            if t == rewards.shape[1]:
                return row_values[t]
            behind = (1 - lambda_) * row_values[t + 1] + lambda_ * g(t + 1)
            return rewards[row, t].item() + (0.0 if ended[row, t] else gamma * behind)

        rows.append([g(t) for t in range(rewards.shape[1])])
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    steps=st.integers(1, 6),
    gamma=st.floats(0, 1),
    lambda_=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_equals_the_definition(batch, steps, gamma, lambda_, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(batch, steps, generator=generator, dtype=torch.float64)
    values = torch.randn(batch, steps, generator=generator, dtype=torch.float64)
    ended = torch.rand(batch, steps, generator=generator) < 0.3
    bootstrap = torch.randn(batch, generator=generator, dtype=torch.float64)
    result = lambda_return(rewards, ended, values, bootstrap, gamma=gamma, lambda_=lambda_)
    wanted = lambda_return_by_hand(rewards, ended, values, bootstrap, gamma, lambda_)
    torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


def test_nothing_behind_an_end_counts():
    rewards = torch.tensor([[1.0, 2.0, 100.0]])
    ended = torch.tensor([[False, True, False]])
    values = torch.tensor([[0.0, 0.0, 1000.0]])
    result = lambda_return(rewards, ended, values, torch.tensor([1e4]), gamma=0.5, lambda_=1.0)
    assert result[0, 1] == 2.0
    assert result[0, 0] == 1.0 + 0.5 * 2.0


def test_shapes_that_do_not_fit_are_named():
    rewards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"bootstrap \(3,\)"):
        lambda_return(rewards, rewards.bool(), rewards, torch.zeros(3), gamma=1.0, lambda_=1.0)
