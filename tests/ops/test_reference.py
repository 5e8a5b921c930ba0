"""The reference against the formulas of the papers, written as sums over scalars, without a state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from retention_cases import PopCase, RetentionCase, assert_same_results

Array = NDArray[np.float64]


def weight(log_decay: float, steps: int) -> float:
    """γ^steps, with γ^0 = 1 for every γ, 0 included."""
    return 1.0 if steps == 0 else float(np.exp(steps * log_decay))


def read_out(q: Array, past: list[tuple[Array, Array, int]], log_decay: float, scale: float) -> Array:
    """What a query reads: the sum over past tokens of c · γ^age (q·k) v, token by token."""
    return scale * sum(weight(log_decay, age) * np.dot(q, key) * value for key, value, age in past)


def as_tokens(state: Array, age: int) -> list[tuple[Array, Array, int]]:
    """A state as a token for each of its rows: the key is a unit vector, the value the row."""
    return [(np.eye(len(state))[row], state[row], age) for row in range(len(state))]


def retention_by_hand(case: RetentionCase, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, log_decay, state = (t.numpy() for t in (case.q, case.k, case.v, case.log_decay, case.state))
    B, T, H, _ = q.shape
    out, final = np.zeros_like(v), np.zeros_like(state)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                past = [(k[b, s, h], v[b, s, h], t - s) for s in range(t + 1)]
                past += as_tokens(state[b, h], t + 1)
                out[b, t, h] = read_out(q[b, t, h], past, log_decay[h], scale)
            final[b, h] = weight(log_decay[h], T) * state[b, h]
            for s in range(T):
                final[b, h] += weight(log_decay[h], T - 1 - s) * np.outer(k[b, s, h], v[b, s, h])
    return torch.from_numpy(out), torch.from_numpy(final)


def predictions_by_hand(case: PopCase, scale: float) -> torch.Tensor:
    """Each prediction token reads its own block, and those main tokens that a reset does not hide from it."""
    names = ("q_pred", "k_pred", "v_pred", "k", "v", "log_decay", "state", "reset")
    q_pred, k_pred, v_pred, k, v, log_decay, state, reset = (getattr(case, name).numpy() for name in names)
    B, P, M, H, _ = q_pred.shape
    N, L = reset.shape[1], case.block_size
    pred = np.zeros_like(v_pred)
    for b, p, i, h in np.ndindex(B, P, M, H):
        boundary = p + case.offset
        resets = [n for n in range(min(boundary + 1, N)) if reset[b, n]]
        first_block = max(resets, default=0)
        past = [(k[b, s, h], v[b, s, h], boundary * L - s + i) for s in range(first_block * L, boundary * L)]
        if not resets:
            past += as_tokens(state[b, h], boundary * L + i + 1)
        past += [(k_pred[b, p, j, h], v_pred[b, p, j, h], i - j) for j in range(i + 1)]
        pred[b, p, i, h] = read_out(q_pred[b, p, i, h], past, log_decay[h], scale)
    return torch.from_numpy(pred)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_retention_is_the_sum_over_the_past(seed: int, scale: float | None) -> None:
    case = RetentionCase.make(2, 7, 3, 4, 5, seed=seed)
    expected = retention_by_hand(case, scale if scale is not None else 0.5)
    assert_same_results(case.run(backend="reference", scale=scale), expected, 1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("P", "offset"), [(3, 0), (4, 0), (1, 1), (2, 2), (1, 3)])
def test_predictions_are_the_sum_over_what_resets_leave(P: int, offset: int, seed: int) -> None:
    case = PopCase.make(2, 3, 2, P, 3, 2, 4, 5, offset=offset, seed=seed, with_reset=True)
    _, pred, _ = case.run(backend="reference")
    torch.testing.assert_close(pred, predictions_by_hand(case, 0.5), rtol=1e-11, atol=1e-11)


def test_a_worked_example() -> None:
    """γ = 1/2, scale 1, one head of dim 1: small enough to follow with pencil and paper."""
    q = torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1, 1)
    k = torch.tensor([1.0, 2.0, 1.0]).view(1, 3, 1, 1)
    v = torch.tensor([4.0, 1.0, 3.0]).view(1, 3, 1, 1)
    case = RetentionCase(
        q=q, k=k, v=v, log_decay=torch.tensor([0.5]).log(), state=torch.tensor([8.0]).view(1, 1, 1, 1)
    )
    out, state = case.run(backend="reference", scale=1.0)
    # S: 8/2 + 1·4 = 8; 8/2 + 2·1 = 6; 6/2 + 1·3 = 6.
    torch.testing.assert_close(out.flatten(), torch.tensor([8.0, 6.0, 12.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([6.0]))


def test_the_default_scale_is_one_over_the_root_of_the_key_dim() -> None:
    case = RetentionCase.make(1, 5, 2, 16, 3)
    assert_same_results(case.run(backend="reference"), case.run(backend="reference", scale=0.25), 1e-15)
