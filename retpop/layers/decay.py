"""Decays that learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from retpop.arguments import state_dtype


class LearnedDecay(nn.Module):
    """ln γ = -exp(log_rate), one a head.

    ``log_rate`` is the logarithm of the rate at which a head forgets, so a step of it changes a horizon of 32
    tokens and one of 512 by the same factor, and ln γ stays below 0. It is float32, or float64 in a float64
    module, even after a cast to 16 bits: bfloat16 cannot tell horizons apart that differ by under 3 %.

    Args:
        log_decays: ln γ at the start, each finite and below 0.
        device, dtype: of the module's other weights.
    """

    def __init__(
        self,
        log_decays: tuple[float, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = state_dtype(dtype or torch.get_default_dtype())
        self.log_rate = nn.Parameter(torch.empty(len(log_decays), device=device, dtype=dtype))
        self._first = log_decays
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the decays to those at construction."""
        self.start(self._first)

    @torch.no_grad()
    def start(self, log_decays: tuple[float, ...]) -> None:
        """Set the log-decays from which learning continues.

        Raises:
            ValueError: one is 0 or infinite.
        """
        for value in log_decays:
            if not -torch.inf < value < 0:
                raise ValueError(
                    f"MultiScaleRetention: log_decay holds {value}; a learned one must be finite and below 0."
                )
        rates = torch.tensor(log_decays, dtype=torch.float64, device="cpu").neg()
        self.log_rate.copy_(rates.log())

    def forward(self) -> Tensor:
        """ln γ of each head, (H,)."""
        return -self.log_rate.to(state_dtype(self.log_rate.dtype)).exp()  # FSDP may have cast it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast the parameter as torch does, but never below float32."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == state_dtype(moved.dtype) else x.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """The number of heads, for ``print(model)``."""
        return f"{len(self._first)} heads"
