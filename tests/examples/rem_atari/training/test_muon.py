"""Muon: what a step is, next to torch's own, and that AdamW's parameters do not notice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rem_atari.config import OptimConfig
from rem_atari.models.parameter_groups import parameter_groups
from rem_atari.training.component import Component
from rem_atari.training.muon import Muon, orthogonal

CONFIG = OptimConfig(lr=0.01, weight_decay=0.1, clip_norm=1e9, batch_size=1, updates_per_epoch=1)


def a_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def a_component(network: nn.Sequential) -> Component:
    """The middle layer's matrix goes orthogonal steps."""
    return Component("network", network, CONFIG, parameter_groups(network, 0.1, [network[2]]))


def train(component: Component, network: nn.Sequential, start: int, stop: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(stop):
        x = torch.randn(32, 6, generator=generator)
        if step >= start:
            component.apply(network(x).square().mean(), {})


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4)])
def test_a_step_keeps_directions_and_evens_out_their_sizes(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    along = torch.diagonal(u.T @ orthogonal(matrix) @ v.T)
    assert sizes.max() > 1.5 * sizes.min()
    assert (along > 0.6).all()
    assert (along < 1.3).all()
    torch.testing.assert_close(orthogonal(3 * matrix), orthogonal(matrix), atol=1e-4, rtol=1e-4)


def test_steps_are_those_of_torch_but_for_bfloat16():
    network, same = a_network(), a_network()
    train(a_component(network), network, 0, 5)
    theirs = torch.optim.Muon(
        [same[2].weight], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    groups = parameter_groups(same, 0.1)
    others = [
        {**group, "params": [p for p in group["params"] if p is not same[2].weight]} for group in groups
    ]
    adam = torch.optim.AdamW(others, lr=0.01, fused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        same.zero_grad()
        same(torch.randn(32, 6, generator=generator)).square().mean().backward()
        theirs.step()
        adam.step()
    start = a_network()[2].weight.detach()
    ours, torchs = network[2].weight.detach() - start, same[2].weight.detach() - start
    assert nn.functional.cosine_similarity(ours.flatten(), torchs.flatten(), dim=0) > 0.99
    torch.testing.assert_close(ours.norm(), torchs.norm(), rtol=0.03, atol=0)
    torch.testing.assert_close(network[0].weight, same[0].weight, atol=2e-3, rtol=0)


def test_without_orthogonal_groups_it_is_adamw():
    network, same = a_network(), a_network()
    ours = Muon(parameter_groups(network, 0.1), lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(parameter_groups(same, 0.1), lr=0.01, weight_decay=0.1, fused=True)
    for module, optimizer in ((network, ours), (same, theirs)):
        module(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
    for mine, other in zip(network.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_component_goes_on_where_it_was_saved():
    network = a_network()
    component = a_component(network)
    train(component, network, 0, 2)
    saved = copy.deepcopy(network.state_dict()), component.optimizer_tensors()
    saved = saved[0], {name: tensor.clone() for name, tensor in saved[1].items()}
    assert any(name.endswith(".momentum") for name in saved[1])
    train(component, network, 2, 4)
    again = a_network()
    again.load_state_dict(saved[0])
    other = a_component(again)
    other.load_optimizer_tensors(saved[1])
    train(other, again, 2, 4)
    for mine, same in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, same)
