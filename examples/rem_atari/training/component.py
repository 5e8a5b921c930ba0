"""One trained part of the agent with its optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rem_atari.config import OptimConfig
from rem_atari.errors import NonFiniteError
from rem_atari.training.muon import Muon
from rem_atari.training.updates import Lap, Metrics, untimed


class Component:
    """A module, its optimiser and the number of updates it has had.

    The optimiser is AdamW, or `Muon` where a group asks for orthogonal steps.

    Args:
        name: name of the part, for messages and for the names of its optimiser's tensors.
        module: the module that trains.
        config: learning rate, weight decay, clipping.
        groups: parameter groups with weight decays of their own; None: all parameters, `config`'s decay.
        precision: "float32", or "bfloat16" for losses computed under autocast.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: OptimConfig,
        groups: list[dict[str, Any]] | None = None,
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.module = module
        self.config = config
        self.updates = 0
        self._precision = precision
        self.optimizer = _make_optimizer(groups or [{"params": list(module.parameters())}], config)

    def autocast(self) -> torch.autocast:
        """The context to compute a loss in, and nothing but a loss."""
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._precision == "bfloat16")

    def apply(self, loss: Tensor, metrics: Metrics, lap: Lap = untimed) -> Metrics:
        """One update: gradient of the loss, clipped to the global norm, and a step of the optimiser.

        One number tells whether everything is finite, because a gradient that is not finite makes the global
        norm so too. The host waits for a GPU once per update.

        Args:
            loss: a scalar.
            metrics: other measurements of the batch, for the message.
            lap: called as "backward" ends.
        Returns:
            The metrics, and ``grad_norm``: the gradient's norm before clipping.
        Raises:
            NonFiniteError: the loss, a gradient or their norm is not finite; the weights stay as they are.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        lap("backward")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        if not torch.isfinite(loss.detach() + norm):
            numbers = {
                "gradient norm": norm,
                **{name: value for name, value in metrics.items() if name != "loss"},
            }
            listed = ", ".join(f"{name} {float(value):.6g}" for name, value in numbers.items())
            raise NonFiniteError(
                f"update {self.updates} of the {self.name.replace('_', ' ')} was not applied, because it"
                f" is not finite: loss {loss.item():.6g}, {listed}"
            )
        self.optimizer.step()
        self.updates += 1
        if self.config.average > 0:
            self._follow(parameters)
        return {**metrics, "grad_norm": norm}

    @torch.no_grad()
    def _follow(self, parameters: list[Tensor]) -> None:
        """Move the running means towards the weights; the optimiser keeps them, and checkpoints with it."""
        slots = [self.optimizer.state[parameter] for parameter in parameters]
        for parameter, slot in zip(parameters, slots, strict=True):
            slot.setdefault("average", parameter.detach().clone())
        means = [slot["average"] for slot in slots]
        torch._foreach_lerp_(means, parameters, 1 - self.config.average)

    @torch.no_grad()
    def settle(self) -> None:
        """At the end of an epoch's updates, replace the weights by their running means, if there are any."""
        for parameter, slot in self.optimizer.state.items():
            if "average" in slot:
                parameter.copy_(slot.pop("average"))

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's tensors by name: ``<component>.<parameter number>.<slot>``."""
        state = self.optimizer.state_dict()["state"]
        return {
            f"{self.name}.{index}.{slot}": value
            for index, slots in state.items()
            for slot, value in slots.items()
        }

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load :meth:`optimizer_tensors`; those of other components are ignored.

        Raises:
            ValueError: they belong to other parameters.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            component, index, slot = name.split(".")
            if component != self.name:
                continue
            # A copy in any case: the optimiser changes its tensors in place, and these are a checkpoint's.
            is_count = slot == "step"
            own = tensor.clone() if is_count else _laid_out_like(parameters[int(index)], name, tensor)
            state.setdefault(int(index), {})[slot] = own
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    if any(group.get("orthogonal", False) for group in groups):
        return Muon(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _laid_out_like(parameter: Tensor, name: str, tensor: Tensor) -> Tensor:
    """An optimiser's tensor in its parameter's shape and memory layout.

    torch does not check it, and the next step fails or silently goes wrong: the fused AdamW walks both in the
    order of memory.
    """
    if tensor.shape != parameter.shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
