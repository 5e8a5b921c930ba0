"""The paper's ablations: each is a flag, and each changes what it says and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rem_atari.agent import Agent
from rem_atari.config import Config, ControllerConfig, EnvConfig, TokenizerConfig, WorldModelConfig
from rem_atari.models.controller import Controller, reset_carry
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.token_by_token import TokenByTokenWorldModel
from rem_atari.models.world_model import WorldModel
from rem_atari.play.imagination import ImaginedEnv
from rem_atari.training.actor_critic import controller_loss, start_imagination

ACTIONS, K, CODES, WIDTH = 3, 4, 7, 8
CONFIG = Config(
    env=EnvConfig(frame_size=16),
    tokenizer=TokenizerConfig(
        channels=(4, 4, 4, 4), groups=2, code_dim=WIDTH, codebook_size=CODES, perceptual_weight=0.0
    ),
    world_model=WorldModelConfig(
        embed_dim=WIDTH, num_layers=2, num_heads=2, ffn_dim=16, dropout=0.0, sequence_blocks=5
    ),
    controller=ControllerConfig(
        channels=(4, 4), hidden_dim=8, lstm_dim=6, pixel_channels=(4, 5), burn_in=3, horizon=5
    ),
)
ABLATIONS = {
    "no POP": {"world_model": {"pop": False}},
    "4x4 tokens": {"tokenizer": {"channels": (4, 4, 4, 4, 4)}},
    "shared prediction token": {"world_model": {"shared_prediction_token": True}},
    "separate embeddings": {"world_model": {"own_token_embedding": True}},
    "no action input": {"controller": {"action_input": False}},
    "pixel space": {"controller": {"space": "pixels"}},
    "GRU": {"controller": {"cell": "gru"}},
}
OPTIONS = [{}, {"own_token_embedding": True, "position_in_block": True}]


def small_agent(**changes) -> Agent:
    torch.manual_seed(0)
    cfg = replace(CONFIG, **{part: replace(getattr(CONFIG, part), **new) for part, new in changes.items()})
    agent = Agent.from_config(cfg, ACTIONS)
    torch.nn.init.normal_(agent.tokenizer.codebook.weight)
    return agent.eval()


def some_sequences(agent: Agent, batch: int = 3, steps: int = 5) -> SequenceTokens:
    generator = torch.Generator().manual_seed(1)
    flags = torch.zeros(batch, steps, dtype=torch.bool)
    return SequenceTokens(
        tokens=torch.randint(CODES, (batch, steps, agent.tokenizer.num_tokens), generator=generator),
        actions=torch.randint(ACTIONS, (batch, steps), generator=generator),
        rewards=torch.zeros(batch, steps),
        ended=flags,
        truncated=flags,
        mask=~flags,
    )


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_learns_from_a_batch(name: str):
    """World model and controller get a finite loss, and every parameter of theirs a gradient."""
    agent = small_agent(**ABLATIONS[name])
    batch = some_sequences(agent)
    world_model_loss, _, _ = agent.world_model.loss(batch, agent.tokenizer.codes)
    imagination_loss, _ = controller_loss(
        agent, batch.select(slice(0, 2)), CONFIG.controller, torch.Generator().manual_seed(0)
    )
    for loss, module in ((world_model_loss, agent.world_model), (imagination_loss, agent.controller)):
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        assert torch.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert sum(bool(gradient.any()) for gradient in gradients) == len(gradients)


def a_token_by_token_model(**changes) -> TokenByTokenWorldModel:
    model = small_agent(world_model={"pop": False, **changes}).world_model
    assert isinstance(model, TokenByTokenWorldModel)
    return model


@pytest.mark.parametrize("options", OPTIONS)
def test_writing_token_by_token_draws_what_training_taught(options):
    """Draws read from the logits of the whole sequence, with the same noise, are the draws of `imagine`."""
    model = a_token_by_token_model(**options)
    codebook = torch.randn(CODES, WIDTH, generator=torch.Generator().manual_seed(5))
    tokens = torch.randint(CODES, (3, 2, K), generator=torch.Generator().manual_seed(2))
    actions = torch.randint(ACTIONS, (3, 4), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        before = model.take_in(tokens[:, :1], actions[:, :1], codebook)
        state, shown, answers = model.begin(tokens[:, 1], codebook, before), tokens[:, 1], []
        for step in range(1, 4):
            answers.append(model.imagine(shown, actions[:, step], codebook, state, generator))
            shown, state = answers[-1].tokens, answers[-1].state
        written = torch.cat([tokens, *(answer.tokens[:, None] for answer in answers)], dim=1)
        logits = model(written, torch.cat([actions, actions[:, :1]], dim=1), codebook, skip_blocks=1)
    noise = torch.Generator().manual_seed(4)
    for step, answer in enumerate(answers, start=1):
        for expected, found in (
            (logits.rewards[:, step - 1], answer.rewards + 1),
            (logits.ends[:, step - 1], answer.ended.long()),
            *((logits.tokens[:, step, place], answer.tokens[:, place]) for place in range(K)),
        ):
            drawn = torch.rand(expected.shape[0], 1, generator=noise)
            assert torch.equal((expected.softmax(dim=-1).cumsum(dim=-1) <= drawn).sum(dim=-1), found)


def test_a_token_knows_those_before_it_and_not_those_after():
    model = a_token_by_token_model()
    batch, codebook = some_sequences(small_agent()), torch.randn(CODES, WIDTH)
    changed = batch.tokens.clone()
    changed[:, 3, 1] = (changed[:, 3, 1] + 1) % CODES
    with torch.no_grad():
        before = model(batch.tokens, batch.actions, codebook, skip_blocks=1)
        after = model(changed, batch.actions, codebook, skip_blocks=1)
    torch.testing.assert_close(before.tokens[:, :2], after.tokens[:, :2])
    torch.testing.assert_close(before.tokens[:, 2, :2], after.tokens[:, 2, :2])
    assert not torch.allclose(before.tokens[:, 2, 2], after.tokens[:, 2, 2], atol=1e-4)


def test_writing_token_by_token_takes_a_pass_a_token(monkeypatch):
    """One for the last token and the action, and one for every token but the last."""
    agent = small_agent(world_model={"pop": False})
    env = ImaginedEnv(agent.world_model, agent.tokenizer, torch.Generator().manual_seed(0))
    start_imagination(env, agent, some_sequences(agent), 1)
    passes = []
    forward = agent.world_model.decoder.forward
    monkeypatch.setattr(
        agent.world_model.decoder, "forward", lambda x, *rest: passes.append(x.shape[1]) or forward(x, *rest)
    )
    env.step(torch.zeros(3, dtype=torch.int64))
    assert passes == [2, *[1] * (K - 1)]


def test_without_pop_there_are_no_prediction_tokens_and_a_context_is_needed():
    names = dict(a_token_by_token_model().named_parameters())
    assert not any("prediction" in name for name in names)
    with pytest.raises(ValueError, match="context_blocks is 0"):
        a_token_by_token_model(context_blocks=0)
    with pytest.raises(ValueError, match="skip_blocks is 0"):
        a_token_by_token_model()(
            torch.zeros(1, 2, K).long(), torch.zeros(1, 2).long(), torch.zeros(CODES, WIDTH), skip_blocks=0
        )


def test_a_shared_prediction_token_is_one_row_and_places_still_differ():
    shared, own = small_agent(world_model={"shared_prediction_token": True}).world_model, small_agent()
    assert isinstance(shared, WorldModel)
    assert shared.prediction_embedding.weight.shape == (1, WIDTH)
    assert own.world_model.prediction_embedding.weight.shape == (K, WIDTH)
    batch = some_sequences(own)
    with torch.no_grad():
        tokens = shared(batch.tokens, batch.actions, own.tokenizer.codes, skip_blocks=1).tokens
    assert not torch.allclose(tokens[..., 0, :], tokens[..., 1, :], atol=1e-4)


def test_4x4_tokens_are_one_halving_more():
    tokenizer = TokenizerConfig(channels=(32, 64, 128, 256, 256))
    agent = Agent.from_config(replace(Config(), tokenizer=tokenizer), ACTIONS)
    assert agent.tokenizer.num_tokens == 16
    assert agent.world_model.block_size == 17


def test_without_action_input_the_memory_never_hears_of_actions():
    controller = small_agent(controller={"action_input": False}).controller
    carry = controller.initial_carry(2)
    assert controller.observe_action(torch.tensor([0, 2]), carry) is carry
    seen, mask = torch.randn(2, 3, K, WIDTH), torch.ones(2, 3, dtype=torch.bool)
    one = controller.burn_in(seen, torch.zeros(2, 3, dtype=torch.int64), mask)
    other = controller.burn_in(seen, torch.ones(2, 3, dtype=torch.int64), mask)
    assert torch.equal(one[0], other[0])


def test_in_pixel_space_the_controller_sees_what_the_tokenizer_decodes():
    agent = small_agent(controller={"space": "pixels"})
    tokens = some_sequences(agent).tokens
    images = agent.show(tokens)
    assert images.shape == (3, 5, 3, 16, 16)
    as_bytes = ((images + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1)
    assert torch.equal(as_bytes, agent.tokenizer.decode(tokens))
    env = ImaginedEnv(agent.world_model, agent.tokenizer, torch.Generator().manual_seed(0), agent.show)
    _, shown = start_imagination(env, agent, some_sequences(agent), 1)
    assert torch.equal(shown, images[:, -1])
    assert torch.equal(env.step(torch.zeros(3, dtype=torch.int64)).seen, agent.tokenizer.images(env.tokens))


def test_the_published_pixel_controller_has_1024_features():
    cfg = ControllerConfig(space="pixels")
    controller = Controller(cfg, grid=8, code_dim=256, frame_size=64, num_actions=18)
    assert controller.features(torch.zeros(2, 3, 64, 64)).shape == (2, 1024)
    assert controller.lstm.input_size == 1024


def test_a_frame_too_small_for_the_convolutions_is_named():
    with pytest.raises(ValueError, match=r"env\.frame_size is 8; wanted a frame of at least 16 pixels"):
        Controller(ControllerConfig(space="pixels"), grid=2, code_dim=3, frame_size=8, num_actions=2)


def test_a_gru_has_one_memory_and_forgets_where_it_must():
    controller = small_agent(controller={"cell": "gru"}).controller
    carry = controller.initial_carry(3)
    assert len(carry) == 1
    after = controller(torch.randn(3, K, WIDTH), carry).carry
    kept = reset_carry(after, torch.tensor([False, True, False]))
    assert torch.equal(kept[0][1], carry[0][1])
    assert torch.equal(kept[0][0], after[0][0])
    assert after[0][1].any()
