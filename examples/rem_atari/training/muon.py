"""Muon: steps of hidden layers' matrices whose singular values are all alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the iteration's quintic: in five steps they bring singular values from 0.01 to 1 near 1, to a third."""

STEPS = 5

MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the parameter groups with ``"orthogonal": True``, which hold matrices.

    AdamW steps along few directions of a matrix, those with the largest gradients. Muon makes the momentum
    orthogonal, so that each direction moves as far as any other. Its steps are scaled to the size of AdamW's,
    and learning rate and weight decay mean what they mean there.

    ``torch.optim.Muon`` computes in bfloat16, for which few CPUs have units.

    Args:
        groups: parameter groups, see above.
        lr, weight_decay: as AdamW's.

    Source: https://kellerjordan.github.io/posts/muon; the size of the steps: arXiv 2502.16982, equation 4.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        plain = [{"orthogonal": False, **group} for group in groups]
        super().__init__(plain, lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if group["orthogonal"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            slots = self.state[matrix]
            if not slots:
                slots["step"] = torch.zeros(())  # AdamW looks for it when it loads a state
                slots["momentum"] = torch.zeros_like(matrix)
            slots["step"] += 1
            momentum = slots["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
            step = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
            matrix.mul_(1 - lr * group["weight_decay"])
            matrix.add_(step, alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix (m, n) with its singular values brought near 1, to a third, by Newton-Schulz iteration."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
