"""The controller: a recurrent actor-critic that sees observations as codes or as images."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.config import ControllerConfig
from rem_atari.models.two_hot import TwoHot

Carry = tuple[Tensor, ...]
"""The controller's memory, (B, lstm_dim) each: an LSTM's hidden and cell state, a GRU's hidden state."""


class Decision(NamedTuple):
    """The controller's output for one observation.

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
    rows = restarted[:, None]
    return tuple(part.masked_fill(rows, 0.0) for part in carry)


class Controller(nn.Module):
    """Convolutions over what it sees, a recurrent cell, linear actor and critic.

    In token space it sees an observation as the square of its codes: two convolutions and a linear layer. In
    pixel space (an ablation of the paper) it sees the frame that the tokenizer decodes: convolutions that
    each halve it. The cell, an LSTM's or a GRU's, takes two steps for each step of the environment: one on
    the observation, after which actor and critic read its hidden state, and one on the embedding of the
    action that was taken (unless `action_input` is off). With `heads_see_features` they also read the
    features of the observation. Weights start as torch initialises them.

    Args:
        cfg: sizes, and the inputs of the memory.
        grid: side of the square of tokens; an observation has grid² codes.
        code_dim: dimension of a code.
        frame_size: side of a frame in pixels.
        num_actions: number of actions.

    Raises:
        ValueError: the horizon leaves no step to learn from, or a frame is too small for the convolutions.

    Source: arXiv 2402.05643; in token space 4,586,707 parameters with 18 actions.
    """

    def __init__(
        self, cfg: ControllerConfig, *, grid: int, code_dim: int, frame_size: int, num_actions: int
    ) -> None:
        super().__init__()
        if cfg.horizon < 2:
            raise ValueError(
                f"controller.horizon is {cfg.horizon}; it must be at least 2, because the last imagined "
                "observation only gives the value that the others bootstrap from."
            )
        self.grid = grid
        self.num_actions = num_actions
        self.sees_pixels = cfg.space == "pixels"
        self.normalize_codes = cfg.normalize_codes
        self.burn_in_actions = cfg.burn_in_actions
        if self.sees_pixels:
            self.cnn, width = _pixel_cnn(cfg.pixel_channels, frame_size)
        else:
            self.cnn, width = _code_cnn(cfg, code_dim, grid), cfg.hidden_dim
        self.action_embedding = nn.Embedding(num_actions, width) if cfg.action_input else None
        self.lstm = CELLS[cfg.cell](width, cfg.lstm_dim)
        self.heads_see_features = cfg.heads_see_features
        read = cfg.lstm_dim + (width if cfg.heads_see_features else 0)
        self.actor = nn.Linear(read, num_actions)
        self.critic = nn.Linear(read, max(cfg.value_bins, 1))
        if cfg.heads_see_features:  # nearly uniform: no preference among actions at the start
            nn.init.orthogonal_(self.actor.weight, gain=0.01)
            nn.init.zeros_(self.actor.bias)
        self.value_code = None
        if cfg.value_bins > 0:
            self.value_code = TwoHot.symlog(cfg.value_bins, "controller.value_bins")
            # The mean of all bins: values start at 0.
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)

    def initial_carry(self, batch_size: int) -> Carry:
        """The memory at the start of `batch_size` episodes: zeros."""
        shape = (batch_size, self.lstm.hidden_size)
        parts = 2 if isinstance(self.lstm, nn.LSTMCell) else 1
        return tuple(self.critic.weight.new_zeros(shape) for _ in range(parts))

    def features(self, seen: Tensor) -> Tensor:
        """The cell's input for observations: (..., hidden_dim), or in pixel space (..., flattened image).

        Observations do not interact here, so any number of steps may be given at once.

        Args:
            seen: codes (..., K, E), or in pixel space images (..., 3, S, S) about [-1, 1].
        """
        if self.sees_pixels:
            return self.cnn(seen.flatten(0, -4)).unflatten(0, seen.shape[:-3])
        leading = seen.shape[:-2]
        if self.normalize_codes:
            seen = seen / (_deviation(seen) + 1e-6)
        squares = rearrange(seen.flatten(0, -3), "n (h w) e -> n e h w", h=self.grid)
        return self.cnn(squares).unflatten(0, leading)

    def decide(self, features: Tensor, carry: Carry) -> Decision:
        """One step of the cell on an observation's `features` (B, hidden_dim), then actor and critic."""
        carry = self._remember(features, carry)
        read = self._read(carry[0], features)
        # float32 also under autocast: losses and returns are computed from these.
        return Decision(self.actor(read).float(), self.values(self.critic(read)), carry)

    def forward(self, seen: Tensor, carry: Carry) -> Decision:
        """`decide` on the features of an observation, which has one leading dimension, see `features`."""
        return self.decide(self.features(seen), carry)

    def values(self, critic: Tensor) -> Tensor:
        """Values of the critic's outputs, (..., C) to (...), float32."""
        return critic.squeeze(-1).float() if self.value_code is None else self.value_code.mean(critic)

    def value_loss(self, critic: Tensor, returns: Tensor) -> Tensor:
        """The loss of the critic's outputs (..., C) for returns (...): squared error, or that of bins."""
        if self.value_code is None:
            return (self.values(critic) - returns).square()
        return self.value_code.divergence(critic, returns)

    def judge(self, seen: Tensor, actions: Tensor, carry: Carry) -> tuple[Tensor, Tensor]:
        """The results of `forward` and `observe_action` in turn over T given steps, computed at once.

        The convolutions see all steps together, and so do actor and critic; only the cell goes through them
        one after another.

        Args:
            seen: observations as `features` sees them, (B, T, ...).
            actions: the actions taken on them, (B, T) int64.
            carry: the memory before them.

        Returns:
            The policy's logits (B, T, A), float32, and the critic's outputs (B, T, C), see `values`.
        """
        told = features = self.features(seen)
        if self.action_embedding is not None:
            # The cell's inputs in order: an observation, the action taken on it, the next observation, ...
            told = torch.stack((told, self.action_embedding(actions).to(told.dtype)), dim=2).flatten(1, 2)
        remembered = self._remember_all(told, carry)[:, :: told.shape[1] // seen.shape[1]]
        read = self._read(remembered, features)
        return self.actor(read).float(), self.critic(read)

    def observe_action(self, actions: Tensor, carry: Carry) -> Carry:
        """One step of the cell on the actions taken (B,), if `action_input` is on."""
        if self.action_embedding is None:
            return carry
        return self._remember(self.action_embedding(actions), carry)

    @torch.no_grad()
    def burn_in(self, seen: Tensor, actions: Tensor, mask: Tensor) -> Carry:
        """The memory after T past steps, without gradient.

        The convolutions see all steps at once; only the LSTM goes through them one after another.

        Args:
            seen: observations as `features` sees them, (B, T, ...); T may be 0.
            actions: the actions taken, (B, T) int64; unused unless the configuration feeds them.
            mask: (B, T) bool, False where a step is padding: it leaves the memory as it is.
        """
        carry = self.initial_carry(seen.shape[0])
        features = self.features(seen)
        for step in range(seen.shape[1]):
            after = self._remember(features[:, step], carry)
            if self.burn_in_actions:
                after = self.observe_action(actions[:, step], after)
            real = mask[:, step, None]
            carry = tuple(torch.where(real, new, old) for new, old in zip(after, carry, strict=True))
        return carry

    def _read(self, remembered: Tensor, features: Tensor) -> Tensor:
        """The input of actor and critic: the memory (..., lstm_dim), and the features if they see them."""
        if not self.heads_see_features:
            return remembered
        return torch.cat((remembered, features.to(remembered.dtype)), dim=-1)

    def _remember(self, features: Tensor, carry: Carry) -> Carry:
        """One step of the cell."""
        if isinstance(self.lstm, nn.LSTMCell):
            return self.lstm(features, carry)
        return (self.lstm(features, *carry),)

    def _remember_all(self, told: Tensor, carry: Carry) -> Tensor:
        """The cell's hidden state after each of T steps, (B, T, hidden_dim) to (B, T, lstm_dim)."""
        if told.device.type == "cpu":  # torch's LSTM over all steps is two to three times as fast as its cell
            weights = list(self.lstm.parameters())
            start = [part[None] for part in carry]
            if isinstance(self.lstm, nn.LSTMCell):
                return torch.lstm(told, start, weights, True, 1, 0.0, self.training, False, True)[0]
            return torch.gru(told, start[0], weights, True, 1, 0.0, self.training, False, True)[0]
        hidden = []
        for step in told.unbind(1):
            carry = self._remember(step, carry)
            hidden.append(carry[0])
        return torch.stack(hidden, dim=1)


CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


def _deviation(codes: Tensor) -> Tensor:
    """The standard deviation of each observation's codes, (..., K, E) to (..., 1, 1)."""
    # Many times faster on a CPU than `codes.std(dim=(-2, -1))`, which reduces them one by one.
    deviations = codes - codes.mean(dim=(-2, -1), keepdim=True)
    freedom = codes.shape[-2] * codes.shape[-1] - 1
    return torch.linalg.vector_norm(deviations, dim=(-2, -1), keepdim=True) / freedom**0.5


class OverSquares(nn.Linear):
    """A linear layer over whole squares, (N, h w c) to (N, out), with weights as for (N, c h w).

    Convolutions leave their channels last in memory. To flatten that as it lies saves copies, and gradients
    in another layout than the activations'.

    Args:
        channels, grid: c, and h and w.
        out: features.
    """

    def __init__(self, channels: int, grid: int, out: int) -> None:
        super().__init__(channels * grid * grid, out)
        self.grid = grid

    def forward(self, squares: Tensor) -> Tensor:
        """Map flattened squares."""
        weight = rearrange(self.weight, "o (c h w) -> o (h w c)", h=self.grid, w=self.grid)
        return functional.linear(squares, weight, self.bias)


def _code_cnn(cfg: ControllerConfig, code_dim: int, grid: int) -> nn.Sequential:
    """Map a square of codes to hidden_dim features."""
    first, second = cfg.channels
    return nn.Sequential(
        nn.Conv2d(code_dim, first, kernel_size=3, padding=1),
        nn.SiLU(),
        nn.Conv2d(first, second, kernel_size=3, padding=1),
        nn.SiLU(),
        Rearrange("n c h w -> n (h w c)"),
        OverSquares(second, grid, cfg.hidden_dim),
        nn.SiLU(),
    )


def _pixel_cnn(channels: tuple[int, ...], frame_size: int) -> tuple[nn.Sequential, int]:
    """Map an image to its flattened features; also gives their number; every convolution halves the image."""
    side = frame_size >> len(channels)
    if side == 0:
        raise ValueError(
            f"controller.pixel_channels has {len(channels)} entries, each of which halves the image, but"
            f" env.frame_size is {frame_size}; wanted a frame of at least {1 << len(channels)} pixels."
        )
    layers: list[nn.Module] = []
    for before, after in pairwise((3, *channels)):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten()), channels[-1] * side * side


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distributions with these logits, (..., A) to (...)."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
