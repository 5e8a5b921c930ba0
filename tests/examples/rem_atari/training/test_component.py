"""A component's running means of its weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from rem_atari.config import OptimConfig
from rem_atari.training.component import Component

OPTIM = OptimConfig(lr=0.1, weight_decay=0.0, clip_norm=10.0, batch_size=1, updates_per_epoch=3)


def component(average: float) -> Component:
    torch.manual_seed(0)
    return Component("world_model", nn.Linear(3, 1), replace(OPTIM, average=average))


def update(part: Component) -> torch.Tensor:
    """One update; the weights after it."""
    part.apply(part.module(torch.ones(1, 3)).square().sum(), {})
    return part.module.weight.detach().clone()


def test_at_the_end_of_its_updates_a_component_goes_on_from_the_running_mean():
    part = component(average=0.75)
    first, second = update(part), update(part)
    part.settle()
    torch.testing.assert_close(part.module.weight.detach(), 0.75 * first + 0.25 * second)
    settled = part.module.weight.detach().clone()
    third = update(part)
    part.settle()
    assert torch.equal(part.module.weight, third), "the mean begins anew"
    assert not torch.equal(third, settled)


def test_without_an_average_the_weights_stay_the_last_ones():
    part = component(average=0.0)
    last = update(part)
    part.settle()
    assert torch.equal(part.module.weight, last)
    assert not any("average" in name for name in part.optimizer_tensors())


def test_the_running_mean_is_in_a_checkpoint():
    part, other = component(average=0.5), component(average=0.5)
    update(part)
    other.module.load_state_dict(part.module.state_dict())
    other.load_optimizer_tensors(part.optimizer_tensors())
    for each in (part, other):
        update(each)
        each.settle()
    assert torch.equal(part.module.weight, other.module.weight)
