"""A trained world model foretells as many rewards and ends as come.

The whole path takes part: batches with more events than uniform draws hold, importance weights, weights in
the loss, and the mean of the weights over the updates. Each alone could bend the chances.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.models.parameter_groups import parameter_groups
from rem_atari.models.sequence_tokens import tokenize
from rem_atari.replay.buffer import Replay
from rem_atari.training.component import Component
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.world_model_phase import WorldModelPhase

SIDE, ACTIONS, UPDATES = 4, 3, 150
PAYS, ENDS = 0.25, 0.06

MINATAR = PRESETS["minatar"].world_model
"""Its event_share, reward_weight, end_weight, local_outcomes, muon and average are what is tested."""

TOY = replace(
    PRESETS["debug"],
    env=replace(PRESETS["debug"].env, frame_size=SIDE),
    tokenizer=replace(PRESETS["debug"].tokenizer, kind="patches", channels=(4, 4), codebook_size=4),
    world_model=replace(
        MINATAR,
        embed_dim=16,
        num_layers=1,
        ffn_dim=32,
        sequence_blocks=6,
        code_network=16,
        local_frames=1,
        optim=replace(MINATAR.optim, updates_per_epoch=UPDATES, first_updates=None),
    ),
)


class Chain(NamedTuple):
    """A replay, and whether a reward is possible at each of its rows."""

    replay: Replay
    may_pay: np.ndarray


def play_chain(steps: int, seed: int) -> Chain:
    """A white patch jumps between two corners; action 1 at the first pays with chance PAYS, no other does.

    Any step may be the last, with chance ENDS.
    """
    generator = np.random.default_rng(seed)
    replay, may_pay = Replay((SIDE, SIDE, 3), steps, seed=seed), np.zeros(steps, dtype=bool)
    for row in range(steps):
        frame, corner = np.zeros((SIDE, SIDE, 3), dtype=np.uint8), int(generator.integers(2))
        frame[2 * corner : 2 * corner + 2, :2] = 255
        action = int(generator.integers(ACTIONS))
        may_pay[row] = corner == 0 and action == 1
        reward = float(may_pay[row] and generator.random() < PAYS)
        replay.append(0, frame, action, reward, bool(generator.random() < ENDS), False)
    return Chain(replay, may_pay)


def train(config: Config, replay: Replay) -> Agent:
    """An agent whose world model had an epoch's updates."""
    torch.manual_seed(0)
    agent = Agent.from_config(config, ACTIONS).eval()
    agent.tokenizer.grow(replay.stored_frames(0))
    optim = config.world_model.optim
    groups = parameter_groups(agent.world_model, optim.weight_decay, agent.world_model.hidden_layers())
    component = Component("world_model", agent.world_model, optim, groups)
    tokens = TokenCache(replay, agent.tokenizer)
    phase = WorldModelPhase(agent.world_model, component, replay, tokens, config.world_model, pytest.fail)
    assert phase.prepare(0)
    agent.world_model.train()
    for _ in range(optim.updates_per_epoch):
        phase.update()
    component.settle()
    agent.eval()
    return agent


def test_the_chances_of_rewards_and_ends_are_the_real_ones() -> None:
    agent = train(TOY, play_chain(4_000, seed=0).replay)
    heldout, may_pay = play_chain(1_000, seed=1)
    batch = heldout.sequences_at(heldout.sequence_starts(2), 6)
    sequences = tokenize(batch, agent.tokenizer)
    with torch.no_grad():
        logits = agent.world_model(sequences.tokens, sequences.actions, agent.tokenizer.codes, skip_blocks=1)
    real = sequences.mask[:, 1:]
    pays = agent.world_model.reward_code.sign_logits(logits.rewards).exp()[..., 2][real]
    ends = logits.ends.softmax(dim=-1)[..., 1][real]
    possible = torch.from_numpy(may_pay)[batch.rows[:, 1:][real]]
    assert 0.8 < float(pays.sum() / (PAYS * possible.sum())) < 1.25
    assert 0.8 < float(ends.mean()) / ENDS < 1.25
    # Calibrated, and not only on average.
    assert float(pays[possible].mean()) > 5 * float(pays[~possible].mean())
