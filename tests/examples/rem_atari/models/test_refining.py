"""Draws in several passes: what is known carries no loss, is read, and makes tokens agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rem_atari.config import WorldModelConfig
from rem_atari.models.base_world_model import BaseWorldModel
from rem_atari.models.refining import RefiningWorldModel, _schedule, _some
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.world_model import WorldModel

K, CODES, WIDTH = 4, 3, 16
CFG = WorldModelConfig(
    embed_dim=WIDTH,
    num_layers=1,
    num_heads=2,
    ffn_dim=32,
    dropout=0.0,
    sequence_blocks=2,
    context_blocks=1,
    own_token_embedding=True,
    draw="refine",
)


def make(kind: type[WorldModel], **changes) -> WorldModel:
    torch.manual_seed(0)
    return kind(replace(CFG, **changes), num_tokens=K, code_dim=WIDTH, codebook_size=CODES, num_actions=2)


def coins(batch: int, seed: int) -> SequenceTokens:
    """After a frame of zeros comes one of ones or one of twos, by the throw of one coin (1 : 3)."""
    generator = torch.Generator().manual_seed(seed)
    thrown = 1 + (torch.rand(batch, generator=generator) < 0.75).long()
    never = torch.zeros(batch, 2, dtype=torch.bool)
    return SequenceTokens(
        tokens=torch.stack((torch.zeros(batch, K, dtype=torch.int64), thrown[:, None].expand(-1, K)), dim=1),
        actions=torch.zeros(batch, 2, dtype=torch.int64),
        rewards=torch.zeros(batch, 2),
        ended=never,
        truncated=never,
        mask=~never,
    )


def imagined(model: BaseWorldModel, rows: int = 4000) -> torch.Tensor:
    start, codes = coins(rows, seed=9), torch.zeros(CODES, WIDTH)
    model.eval()
    with torch.no_grad():
        answer = model.imagine(
            start.tokens[:, 0],
            start.actions[:, 0],
            codes,
            model.init_state(rows),
            torch.Generator().manual_seed(1),
        )
    return answer.tokens


def train(model: BaseWorldModel, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for step in range(steps):
        # Small steps at the end: chances are to be those of the coin, not of the last batches.
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 0.8 * steps else 1e-3
        loss = model.loss(coins(64, seed=step), torch.zeros(CODES, WIDTH)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_frames_that_must_agree_do_and_come_as_often_as_they_should():
    model = make(RefiningWorldModel)
    train(model, steps=250)
    tokens = imagined(model)
    agrees = (tokens == tokens[:, :1]).all(dim=1)
    assert agrees.float().mean() > 0.97
    assert (tokens == 2).float().mean() == pytest.approx(0.75, abs=0.06)
    plain = make(WorldModel)
    train(plain, steps=50)
    apart = imagined(plain)
    assert (apart == apart[:, :1]).all(dim=1).float().mean() < 0.5, "or it was no problem"


def test_it_has_the_parameters_of_the_model_that_draws_at_once():
    ours, theirs = (
        {name: parameter.shape for name, parameter in make(kind).named_parameters()}
        for kind in (RefiningWorldModel, WorldModel)
    )
    assert ours == theirs


@pytest.mark.parametrize("local_frames", [0, 2])
def test_a_step_predicts_what_the_sequence_does(local_frames):
    model = make(RefiningWorldModel, local_frames=local_frames).eval()
    batch, codes = coins(5, seed=0), torch.zeros(CODES, WIDTH)
    with torch.no_grad():
        taught = model(batch.tokens, batch.actions, codes, skip_blocks=1)
        step = model.step(batch.tokens[:, 0], batch.actions[:, 0], codes, model.init_state(5))
    assert taught.unknown is None
    torch.testing.assert_close(model.token_logits(step, codes), taught.tokens[:, 0], atol=1e-5, rtol=1e-5)


def test_outcomes_cannot_be_read_off_predictions_that_have_seen_a_part_of_them():
    with pytest.raises(ValueError, match=r"world_model\.local_outcomes is on with world_model\.draw refine"):
        make(RefiningWorldModel, local_outcomes=True)


def test_known_tokens_are_read_and_carry_no_loss(monkeypatch):
    model, batch, codes = make(RefiningWorldModel).train(), coins(5, seed=0), torch.zeros(CODES, WIDTH)
    known = torch.zeros(5, 2, K, dtype=torch.bool)
    known[:, 1, 0] = True
    monkeypatch.setattr("rem_atari.models.refining._some", lambda tokens: known)
    told = model(batch.tokens, batch.actions, codes, skip_blocks=1)
    assert torch.equal(told.unknown, ~known[:, 1:])
    loss = model.loss(batch, codes).total
    losses = torch.nn.functional.cross_entropy(
        told.tokens[:, 0, 1:].flatten(0, 1), batch.tokens[:, 1, 1:].flatten()
    )
    metrics = model.loss(batch, codes).metrics
    torch.testing.assert_close(metrics["tokens"], losses.detach())
    torch.testing.assert_close(loss.detach(), metrics["tokens"] + metrics["reward"] + metrics["end"])
    other = model(torch.where(known, 0, batch.tokens), batch.actions, codes, skip_blocks=1)
    assert not torch.allclose(other.tokens, told.tokens), "what is known matters"


def test_half_of_the_blocks_know_nothing():
    torch.manual_seed(0)
    known = _some(torch.zeros(500, 4, 16))
    shares = known.float().mean(dim=-1)
    assert (shares == 0).float().mean() == pytest.approx(0.53, abs=0.05)
    assert shares[shares > 0].mean() == pytest.approx(0.53, abs=0.05)


def test_fewer_and_fewer_tokens_are_left():
    assert _schedule(25, 2) == [25, 5, 0]
    assert _schedule(64, 3) == [64, 16, 4, 0]
    assert _schedule(4, 4) == [4, 3, 2, 1, 0]
    assert _schedule(1, 3) == [1, 0]
