"""REM's imagination captured as a CUDA graph is imagination, to the last bit."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rem_atari.agent import Agent
from rem_atari.config import Config, ControllerConfig
from rem_atari.config.presets import PRESETS
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.training.actor_critic import Imagination, imagine, learn_from
from retpop import capture

pytestmark = pytest.mark.gpu

ACTIONS, BATCH = 5, 6
PAPER = PRESETS["paper"]
CONFIG = replace(PAPER, controller=replace(PAPER.controller, burn_in=4, horizon=5))


@pytest.fixture(scope="module", autouse=True)
def _on_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CUDA graph wants a GPU")


def some_segments(seed: int, steps: int, device: torch.device) -> SequenceTokens:
    generator = torch.Generator().manual_seed(seed)
    flags = torch.zeros(BATCH, steps, dtype=torch.bool)
    real = torch.randint(1, steps + 1, (BATCH, 1), generator=generator)
    segments = SequenceTokens(
        tokens=torch.randint(PAPER.tokenizer.codebook_size, (BATCH, steps, 64), generator=generator),
        actions=torch.randint(ACTIONS, (BATCH, steps), generator=generator),
        rewards=torch.zeros(BATCH, steps),
        ended=flags,
        truncated=flags,
        mask=torch.arange(steps) >= steps - real,
    )
    return SequenceTokens(*(tensor.to(device) for tensor in astuple(segments)))


def tensors_of(imagination: Imagination) -> list[Tensor]:
    before, trajectory, bootstrap = imagination
    found = tree_leaves((before, astuple(trajectory), bootstrap))
    return [tensor.clone() for tensor in found if tensor is not None]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("changes", "world_model"),
    [
        ({}, {}),
        ({"space": "pixels"}, {}),
        ({"cell": "gru"}, {}),
        ({"mean_rewards": True}, {}),
        ({"disagreement_weight": 0.5}, {"disagreement_heads": 2}),
        ({}, {"draw": "groups", "code_network": 32, "local_frames": 3}),
    ],
    ids=str,
)
def test_a_graph_is_the_function(
    changes: dict, world_model: dict, precision: torch.dtype, device: torch.device
) -> None:
    """Results and what is left in the generator are the same, also once the weights have changed."""
    config: Config = replace(
        CONFIG,
        world_model=replace(CONFIG.world_model, **world_model),
        controller=replace(CONFIG.controller, **changes),
    )
    cfg: ControllerConfig = config.controller
    torch.manual_seed(0)
    agent = Agent.from_config(config, ACTIONS).to(device).eval()
    torch.nn.init.normal_(agent.tokenizer.codebook.weight)
    generators = [torch.Generator(device).manual_seed(0) for _ in range(2)]
    captured = capture(
        lambda **columns: imagine(agent, SequenceTokens(**columns), cfg, generators[0]),
        generators=generators[:1],
        warm_up=1,
    )
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-2, fused=True)
    for seed in range(5):
        segments = some_segments(seed, cfg.burn_in + 1, device)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            found = captured(**vars(segments))
            wanted = imagine(agent, segments, cfg, generators[1])
            for a, b in zip(tensors_of(found), tensors_of(wanted), strict=True):
                assert torch.equal(a, b)
            loss, _ = learn_from(found, agent.controller, cfg)
        states = [generator.get_state() for generator in generators]
        assert torch.equal(*states)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in agent.controller.parameters())
        for parameter in agent.world_model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        if seed == 2:  # as a resumed run would
            for generator in generators:
                generator.set_state(states[0])
