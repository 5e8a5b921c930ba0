"""The controller: an actor-critic with a memory, which sees observations as codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.config import ControllerConfig

Carry = tuple[Tensor, Tensor]
"""The LSTM's hidden and cell state, (B, lstm_dim) each: all that the controller remembers."""


class Decision(NamedTuple):
    """What the controller makes of an observation.

    Attributes:
        logits: of the policy, (B, A).
        value: the critic's estimate of the discounted return from here on, (B,).
        carry: the memory after the observation.
    """

    logits: Tensor
    value: Tensor
    carry: Carry


def reset_carry(carry: Carry, restarted: Tensor) -> Carry:
    """The carry with the rows in `restarted` (B,) bool back at its start, which is zero."""
    hidden, cell = carry
    rows = restarted[:, None]
    return hidden.masked_fill(rows, 0.0), cell.masked_fill(rows, 0.0)


class Controller(nn.Module):
    """Two convolutions and a linear layer over the square of codes, an LSTM cell, linear actor and critic.

    The LSTM takes two steps for each step of the environment: one on the observation, after which actor and
    critic read its hidden state, and one on the embedding of the action that was taken. Weights start as
    torch initialises them.

    Args:
        cfg: sizes and what the memory is fed.
        grid: side of the square of tokens; an observation has grid² codes.
        code_dim: dimension of a code.
        num_actions: number of actions.

    Raises:
        ValueError: the configured horizon leaves no step to learn from.

    Source: arXiv 2402.05643, the controller in token space (4,586,707 parameters with 18 actions).
    """

    def __init__(self, cfg: ControllerConfig, *, grid: int, code_dim: int, num_actions: int) -> None:
        super().__init__()
        if cfg.horizon < 2:
            raise ValueError(
                f"controller.horizon is {cfg.horizon}; it must be at least 2, because the last imagined "
                "observation only gives the value that the others bootstrap from."
            )
        self.grid = grid
        self.num_actions = num_actions
        self.normalize_codes = cfg.normalize_codes
        self.burn_in_actions = cfg.burn_in_actions
        first, second = cfg.channels
        self.cnn = nn.Sequential(
            nn.Conv2d(code_dim, first, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(first, second, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(second * grid * grid, cfg.hidden_dim),
            nn.SiLU(),
        )
        self.action_embedding = nn.Embedding(num_actions, cfg.hidden_dim)
        self.lstm = nn.LSTMCell(cfg.hidden_dim, cfg.lstm_dim)
        self.actor = nn.Linear(cfg.lstm_dim, num_actions)
        self.critic = nn.Linear(cfg.lstm_dim, 1)

    def initial_carry(self, batch_size: int) -> Carry:
        """The memory at the start of `batch_size` episodes: zeros."""
        zeros = self.critic.weight.new_zeros(batch_size, self.lstm.hidden_size)
        return zeros, zeros.clone()

    def features(self, codes: Tensor) -> Tensor:
        """What the LSTM is fed for observations: codes (..., K, E) to (..., hidden_dim).

        Observations do not depend on each other here, so any number of steps may go in at once.
        """
        leading = codes.shape[:-2]
        if self.normalize_codes:
            codes = codes / (codes.std(dim=(-2, -1), keepdim=True) + 1e-6)
        squares = rearrange(codes.flatten(0, -3), "n (h w) e -> n e h w", h=self.grid)
        return self.cnn(squares).unflatten(0, leading)

    def decide(self, features: Tensor, carry: Carry) -> Decision:
        """Take in an observation's `features` (B, hidden_dim) and judge the situation."""
        hidden, cell = self.lstm(features, carry)
        return Decision(self.actor(hidden), self.critic(hidden).squeeze(-1), (hidden, cell))

    def forward(self, codes: Tensor, carry: Carry) -> Decision:
        """Take in an observation (B, K, E) and judge the situation."""
        return self.decide(self.features(codes), carry)

    def observe_action(self, actions: Tensor, carry: Carry) -> Carry:
        """Take in the actions (B,) that were taken."""
        return self.lstm(self.action_embedding(actions), carry)

    @torch.no_grad()
    def burn_in(self, codes: Tensor, actions: Tensor, mask: Tensor) -> Carry:
        """The memory after T past steps, without gradient.

        The convolutions see all steps at once; only the LSTM goes through them one after another.

        Args:
            codes: observations, (B, T, K, E); T may be 0.
            actions: the actions taken, (B, T) int64; unused unless the configuration feeds them.
            mask: (B, T) bool, False where a step is padding: it leaves the memory as it is.
        """
        carry = self.initial_carry(codes.shape[0])
        features = self.features(codes)
        for step in range(codes.shape[1]):
            after = self.lstm(features[:, step], carry)
            if self.burn_in_actions:
                after = self.observe_action(actions[:, step], after)
            real = mask[:, step, None]
            carry = torch.where(real, after[0], carry[0]), torch.where(real, after[1], carry[1])
        return carry


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distributions with these logits, (..., A) to (...)."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
