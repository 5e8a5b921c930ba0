"""The definition of retention and POP, as a loop over tokens.

    S_n = γ S_{n-1} + k_nᵀ v_n                      S: (Dk, Dv), one a head
    o_n = c · q_n S_n

Slow and obviously right: every other form is tested against this one. It runs in float64 for float64 inputs
and in float32 for all others, and is differentiable.

Source: RetNet, arXiv 2307.08621, equation 6; POP, arXiv 2402.05643, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retpop.arguments import state_dtype


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None,
    scale: float,
    bounds: list[int] | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention of (B, T, H, D) inputs, token by token; with ``bounds``, packed sequence by sequence.

    Where ``reset`` (B, T), the state is 0 before the token.
    """
    if bounds is None:
        return _one_sequence(q, k, v, log_decay, _initial_state(q, v, state, q.shape[0]), scale, reset)
    state = _initial_state(q, v, state, len(bounds) - 1)
    outs, states = [v[:, :0]], [state[:0]]
    for s in range(len(bounds) - 1):
        tokens = slice(bounds[s], bounds[s + 1])
        out, last = _one_sequence(
            q[:, tokens],
            k[:, tokens],
            v[:, tokens],
            log_decay,
            state[s : s + 1],
            scale,
            None if reset is None else reset[:, tokens],
        )
        outs.append(out)
        states.append(last)
    return torch.cat(outs, dim=1), torch.cat(states)


def pop_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    *,
    block_size: int,
    offset: int,
    state: Tensor | None,
    scale: float,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """POP, block by block: at each boundary the predictions that start there, then the block of tokens."""
    batch, length = q.shape[:2]
    num_blocks, num_predictions = length // block_size, q_pred.shape[1]
    current = _initial_state(q, v, state, batch)
    outs, preds = [v[:, :0]], [v_pred[:, :0]]
    for n in range(num_blocks + 1):
        if reset is not None and n < num_blocks:
            current = _restarted(current, reset[:, n])
        if offset <= n < offset + num_predictions:
            p = n - offset
            # A prediction reads the state and does not change it.
            pred, _ = _one_sequence(q_pred[:, p], k_pred[:, p], v_pred[:, p], log_decay, current, scale)
            preds.append(pred.unsqueeze(1))
        if n < num_blocks:
            tokens = slice(n * block_size, (n + 1) * block_size)
            out, current = _one_sequence(q[:, tokens], k[:, tokens], v[:, tokens], log_decay, current, scale)
            outs.append(out)
    return torch.cat(outs, dim=1), torch.cat(preds, dim=1), current


def _one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    gamma = log_decay.to(state.dtype).exp()[:, None, None]
    outs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t].to(state.dtype) for x in (q, k, v))  # (B, H, D)
        if reset is not None:
            state = _restarted(state, reset[:, t])
        state = gamma * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append(scale * (q_t.unsqueeze(-2) @ state).squeeze(-2))
    if not outs:
        return v.clone(), state
    return torch.stack(outs, dim=1).to(v.dtype), state


def _restarted(state: Tensor, reset: Tensor) -> Tensor:
    """The state (B, H, Dk, Dv), or 0 in the rows of ``reset`` (B,)."""
    return torch.where(reset[:, None, None, None], torch.zeros_like(state), state)


def _initial_state(q: Tensor, v: Tensor, state: Tensor | None, rows: int) -> Tensor:
    if state is not None:
        return state.clone()  # the result is never an input itself, not even with no tokens
    return q.new_zeros(rows, *q.shape[2:], v.shape[-1], dtype=state_dtype(q.dtype))
