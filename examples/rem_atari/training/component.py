"""One trained part of the agent with its optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rem_atari.config import OptimConfig
from rem_atari.errors import NonFiniteError


class Component:
    """A module, its AdamW and the number of updates it has had.

    Args:
        name: name of the part, for messages and for the names of its optimiser's tensors.
        module: the module that trains.
        config: learning rate, weight decay, clipping.
        groups: parameter groups with weight decays of their own; None: all parameters, `config`'s decay.
    """

    def __init__(
        self, name: str, module: nn.Module, config: OptimConfig, groups: list[dict[str, Any]] | None = None
    ) -> None:
        self.name = name
        self.module = module
        self.config = config
        self.updates = 0
        parameters = list(module.parameters()) if groups is None else groups
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

    def apply(self, loss: Tensor) -> Tensor:
        """One update: gradient of the loss, clipped to the global norm, and an AdamW step.

        Returns:
            The gradient's norm before clipping, a scalar.
        Raises:
            NonFiniteError: the loss or a gradient is not finite; the weights stay as they are.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        if not torch.isfinite(loss.detach() + norm):
            raise NonFiniteError(
                f"update {self.updates} of the {self.name.replace('_', ' ')} was not applied, because it"
                f" is not finite: loss {loss.item()}, gradient norm {norm.item()}"
            )
        self.optimizer.step()
        self.updates += 1
        return norm

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's tensors by name: ``<component>.<parameter number>.<slot>``."""
        state = self.optimizer.state_dict()["state"]
        return {
            f"{self.name}.{index}.{slot}": value
            for index, slots in state.items()
            for slot, value in slots.items()
        }

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Give the optimiser back its :meth:`optimizer_tensors`; those of other components are ignored."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            component, index, slot = name.split(".")
            if component == self.name:
                state.setdefault(int(index), {})[slot] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
