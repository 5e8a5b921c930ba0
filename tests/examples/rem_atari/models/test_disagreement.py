"""Heads that disagree about what is new, and what imagination pays for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from rem_atari.agent import Agent
from rem_atari.config import Config, ControllerConfig, EnvConfig, TokenizerConfig, WorldModelConfig
from rem_atari.models.disagreement import Disagreement, divergence
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.play.imagination import ImaginedEnv
from rem_atari.training.actor_critic import controller_loss, imagine

ACTIONS, CODES = 3, 7
OFF = Config(
    env=EnvConfig(frame_size=8),
    tokenizer=TokenizerConfig(
        channels=(4, 4, 4), groups=2, code_dim=8, codebook_size=CODES, perceptual_weight=0.0
    ),
    world_model=WorldModelConfig(embed_dim=8, num_layers=1, num_heads=2, ffn_dim=16, dropout=0.0),
    controller=ControllerConfig(channels=(4, 4), hidden_dim=8, lstm_dim=6, burn_in=3, horizon=5),
)


def an_agent(heads: int = 0, **world_model) -> Agent:
    torch.manual_seed(0)
    changed = replace(OFF.world_model, disagreement_heads=heads, **world_model)
    return Agent.from_config(replace(OFF, world_model=changed), ACTIONS).eval()


def some_steps(steps: int = 4) -> SequenceTokens:
    generator = torch.Generator().manual_seed(1)
    flags = torch.zeros(3, steps, dtype=torch.bool)
    return SequenceTokens(
        tokens=torch.randint(CODES, (3, steps, 4), generator=generator),
        actions=torch.randint(ACTIONS, (3, steps), generator=generator),
        rewards=torch.zeros(3, steps),
        ended=flags,
        truncated=flags,
        mask=~flags,
    )


def test_the_divergence_is_0_for_heads_that_agree_and_ln_h_for_heads_with_nothing_in_common():
    alike = torch.randn(1, 5, CODES).expand(3, -1, -1)
    apart = 1e4 * functional.one_hot(torch.tensor([[0], [1], [2]]), CODES).float()
    torch.testing.assert_close(divergence(alike), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(divergence(apart), torch.full((1,), math.log(3)))


def test_heads_disagree_about_what_they_have_not_seen_and_not_about_chance():
    """Two situations are shown, one of which leads to a fair coin's toss; a third is not."""
    torch.manual_seed(0)
    heads = Disagreement(width=16, codebook_size=CODES, heads=4)
    sure, coin, unseen = torch.randn(3, 16)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    seen = torch.stack((sure, sure, coin, coin))
    targets = torch.tensor([0, 0, 1, 2]).expand(4, -1)
    before = divergence(heads(torch.stack((sure, coin)), CODES))
    for _ in range(60):
        loss = functional.cross_entropy(heads(seen, CODES).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    of_sure, of_coin, of_unseen = divergence(heads(torch.stack((sure, coin, unseen)), CODES)).tolist()
    assert max(of_sure, of_coin) < before.min() / 5
    assert of_unseen > 10 * max(of_sure, of_coin)


def test_heads_teach_the_model_nothing_but_themselves():
    """Every other gradient is that of the model without heads, to the last bit."""
    plain, curious = an_agent().world_model, an_agent(heads=3).world_model
    codebook, gradients = torch.randn(CODES, 8), []
    for model in (plain, curious):
        found = model.loss(some_steps(), codebook)
        found.total.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    own = [gradient for name, gradient in gradients[1].items() if name.startswith("disagreement.")]
    assert len(own) == 3 * 4
    assert all(gradient.abs().sum() > 0 for gradient in own)
    assert found.total.item() == pytest.approx(found.metrics["loss"].item())


def test_imagination_pays_for_disagreement_by_its_weight():
    agent = an_agent(heads=3)
    steps = {}
    for weight in (0.0, 0.5, 1.0):
        cfg = replace(OFF.controller, disagreement_weight=weight)
        steps[weight] = imagine(agent, some_steps(), cfg, torch.Generator().manual_seed(0)).trajectory
    assert steps[0.0].bonus is None
    assert (steps[1.0].bonus > 0).all()
    torch.testing.assert_close(steps[1.0].bonus, 2 * steps[0.5].bonus)
    assert torch.equal(steps[1.0].seen, steps[0.0].seen)
    assert torch.equal(steps[1.0].rewards, steps[0.0].rewards)


def test_the_controller_learns_from_the_bonus_and_its_metrics_keep_it_apart():
    agent, measured = an_agent(heads=3), {}
    for weight in (0.0, 100.0):
        cfg = replace(OFF.controller, disagreement_weight=weight)
        _, measured[weight] = controller_loss(agent, some_steps(), cfg, torch.Generator().manual_seed(0))
    without, paid = measured.values()
    assert paid["imagined_reward"] == without["imagined_reward"]
    assert paid["imagined_bonus"] > 0
    assert paid["value"] > 2 * without["value"]
    assert "imagined_bonus" not in without


def test_without_heads_nothing_is_drawn_and_nothing_added():
    """The other weights are those that the same seed gives a model with heads."""
    plain, curious = an_agent().world_model.state_dict(), an_agent(heads=2).world_model.state_dict()
    assert {name for name in curious if not name.startswith("disagreement.")} == set(plain)
    assert all(torch.equal(weights, curious[name]) for name, weights in plain.items())


@pytest.mark.parametrize("changes", [{"pop": False}, {"draw": "refine"}])
def test_models_that_cannot_have_heads_say_so(changes):
    with pytest.raises(ValueError, match=r"world_model\.disagreement_heads is 2; wanted 0 with"):
        an_agent(heads=2, **changes)


def test_a_single_head_is_refused():
    with pytest.raises(ValueError, match=r"disagreement_heads is 1; wanted 0 \(none\) or at least 2"):
        an_agent(heads=1)


def test_a_weight_without_heads_is_refused():
    agent = an_agent()
    with pytest.raises(ValueError, match=r"disagreement_weight is 0\.1 and world_model\.disagreement_heads"):
        ImaginedEnv(
            agent.world_model, agent.tokenizer, torch.Generator().manual_seed(0), disagreement_weight=0.1
        )
