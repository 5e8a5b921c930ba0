"""λ-returns."""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_return(
    rewards: Tensor, ended: Tensor, values: Tensor, bootstrap: Tensor, *, gamma: float, lambda_: float
) -> Tensor:
    """λ-returns of T steps, computed backwards from the value of what lies behind them.

        G_t = r_t + γ (1 - e_t) ((1 - λ) V_{t+1} + λ G_{t+1}),   G_T = V_T = bootstrap,   t = 0 .. T-1

    Args:
        rewards: r, (B, T).
        ended: e, (B, T) bool: the episode ended with this step, and nothing behind it counts.
        values: V of the observations acted on, (B, T).
        bootstrap: V_T, the value of the observation after the last step, (B,).
        gamma: γ, the discount.
        lambda_: λ, between one-step targets (0) and Monte Carlo with bootstrap (1).

    Returns:
        G, (B, T). Gradients flow through; detach G to use it as a target.

    Raises:
        ValueError: the shapes do not fit.

    Source: arXiv 2402.05643, as in DreamerV2 (arXiv 2010.02193, equation 4).
    """
    if not rewards.shape == ended.shape == values.shape or bootstrap.shape != rewards.shape[:1]:
        raise ValueError(
            f"lambda_return(): rewards is {tuple(rewards.shape)}, ended {tuple(ended.shape)}, values "
            f"{tuple(values.shape)}, bootstrap {tuple(bootstrap.shape)}; wanted (B, T) thrice and (B,)."
        )
    discounts = gamma * (~ended).to(values.dtype)
    following = torch.cat([values[:, 1:], bootstrap[:, None]], dim=1)
    result = bootstrap
    results = []
    for step in reversed(range(rewards.shape[1])):
        mixed = (1 - lambda_) * following[:, step] + lambda_ * result
        result = rewards[:, step] + discounts[:, step] * mixed
        results.append(result)
    return torch.stack(results[::-1], dim=1)
