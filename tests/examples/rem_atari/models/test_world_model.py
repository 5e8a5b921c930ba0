"""The world model: the loss, what carries none, and that imagination computes what training taught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rem_atari.config import WorldModelConfig
from rem_atari.models.local_past import LocalPast
from rem_atari.models.memory import Memory
from rem_atari.models.parameter_groups import parameter_groups
from rem_atari.models.rewards import reward_classes
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.world_model import WorldModel
from retpop import RetNetConfig, RetNetState

K, CODES, ACTIONS, WIDTH = 4, 7, 3, 16
SMALL = WorldModelConfig(
    embed_dim=WIDTH, num_layers=2, num_heads=2, ffn_dim=24, dropout=0.0, sequence_blocks=5, context_blocks=2
)
OPTIONS = [{}, {"own_token_embedding": True, "position_in_block": True}, {"code_network": 8}]
LOCAL = [{"local_frames": 3}, {"local_outcomes": True}, {"local_frames": 1, "local_outcomes": True}]


def small_world_model(**changes) -> WorldModel:
    torch.manual_seed(0)
    cfg = WorldModelConfig(**{**vars(SMALL), **changes})
    return WorldModel(cfg, num_tokens=K, code_dim=WIDTH, codebook_size=CODES, num_actions=ACTIONS)


def a_codebook() -> torch.Tensor:
    return torch.randn(CODES, WIDTH, generator=torch.Generator().manual_seed(5))


def some_sequences(batch: int = 3, blocks: int = 5) -> SequenceTokens:
    generator = torch.Generator().manual_seed(1)
    return SequenceTokens(
        tokens=torch.randint(CODES, (batch, blocks, K), generator=generator),
        actions=torch.randint(ACTIONS, (batch, blocks), generator=generator),
        rewards=torch.randint(-2, 3, (batch, blocks), generator=generator).float(),
        ended=torch.rand(batch, blocks, generator=generator) < 0.3,
        truncated=torch.zeros(batch, blocks, dtype=torch.bool),
        mask=torch.ones(batch, blocks, dtype=torch.bool),
    )


def gradients(model: WorldModel, batch: SequenceTokens) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss, _, _ = model.loss(batch, a_codebook())
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_published_size_has_the_published_number_of_parameters():
    model = WorldModel(WorldModelConfig(), num_tokens=64, code_dim=256, codebook_size=512, num_actions=18)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_628_997


def predict_next(model: WorldModel, state: RetNetState) -> torch.Tensor:
    """Logits (B, K, V) of the observation that follows a memory, by a pass of the prediction tokens alone."""
    batch_size = state.decoder.position.shape[0]
    predicting = model.prediction_embedding.weight.expand(batch_size, 1, model.num_tokens, -1)
    nothing = torch.empty(batch_size, 0, WIDTH)
    _, predicted, _ = model.decoder.pop(nothing, predicting, state.decoder, block_size=model.block_size)
    return model._token_logits(predicted[:, 0], model.read_codes(a_codebook()))


@pytest.mark.parametrize("options", OPTIONS + LOCAL)
def test_imagination_computes_what_training_taught(options):
    """A sequence at once gives the logits that reading context and stepping block by block gives."""
    model = small_world_model(**options).eval()
    batch, codebook = some_sequences(), a_codebook()
    expected = []
    with torch.no_grad():
        taught = model(batch.tokens, batch.actions, codebook)
        state = model.take_in(batch.tokens[:, :1], batch.actions[:, :1], codebook)
        for block in range(1, 5):
            step = model.step(batch.tokens[:, block], batch.actions[:, block], codebook, state)
            torch.testing.assert_close(step.reward_logits, taught.rewards[:, block], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(step.end_logits, taught.ends[:, block], atol=1e-5, rtol=1e-5)
            expected.append(model.token_logits(step, codebook))
            state = step.state
    for block in range(2, 5):
        torch.testing.assert_close(expected[block - 2], taught.tokens[:, block], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(taught.tokens[:, 2], taught.tokens[:, 3], atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS + LOCAL)
def test_padding_before_the_first_real_block_leaves_no_trace(options):
    model = small_world_model(**options).eval()
    batch, codebook = some_sequences(), a_codebook()
    mask = torch.tensor([[False, False, True, True]]).expand(3, -1)
    with torch.no_grad():
        padded = model.take_in(batch.tokens[:, :4], batch.actions[:, :4], codebook, mask=mask)
        alone = model.take_in(batch.tokens[:, 2:4], batch.actions[:, 2:4], codebook)
    torch.testing.assert_close(padded.decoder.kv, alone.decoder.kv, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.recent, alone.recent)


def test_memories_of_games_are_taken_apart_and_put_together():
    model = small_world_model(local_frames=3).eval()
    batch = some_sequences()
    with torch.no_grad():
        memory = model.take_in(batch.tokens, batch.actions, a_codebook())
    again = Memory.cat([memory.select(slice(0, 1)), memory.select(torch.tensor([1, 2]))])
    assert memory.recent.shape == (3, 2, K, WIDTH)
    assert torch.equal(again.recent, memory.recent)
    assert torch.equal(again.decoder.kv, memory.decoder.kv)


def test_predictions_see_the_last_frames_around_their_place_and_nothing_else_directly():
    past = LocalPast(WIDTH, frames=3, num_tokens=16)
    seen = torch.zeros(1, 3 + 2, 16, WIDTH)
    before = past(seen)
    seen[0, 1, 0] = 1.0
    moved = (past(seen) - before).abs().amax(dim=-1)[0] > 1e-6
    near = torch.zeros(16, dtype=torch.bool)
    near[[0, 1, 4, 5]] = True
    assert torch.equal(moved[0], near)
    assert torch.equal(moved[1], near)
    assert not moved[2].any()


def test_what_one_place_leads_to_is_heard_in_the_outcome():
    """Where nothing is said of a place, its prediction changes neither reward nor end."""
    batch, codebook = some_sequences(), a_codebook()
    for local in (False, True):
        model = small_world_model(local_outcomes=local).eval()
        with torch.no_grad():
            before = model(batch.tokens, batch.actions, codebook)
            model.prediction_embedding.weight[2] *= -5
            after = model(batch.tokens, batch.actions, codebook)
        for name in ("rewards", "ends"):
            assert torch.allclose(getattr(before, name), getattr(after, name), atol=1e-4) is not local


def test_codes_that_look_alike_are_treated_alike():
    """What the network learns about a code holds for one that looks like it and that no sequence shows."""
    codebook, held = a_codebook(), some_sequences()
    held.tokens.clamp_(max=CODES - 3)
    codebook[CODES - 2] = codebook[0] + 0.01
    model = small_world_model(code_network=8)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(held.tokens, held.actions, codebook).tokens

    before = logits()
    model.loss(held, codebook).total.backward()
    torch.optim.SGD(model.code_network.parameters(), lr=0.5).step()
    moved = (logits() - before).flatten(0, 2)
    shown, alike, other = moved[:, 0], moved[:, CODES - 2], moved[:, CODES - 1]
    assert (alike - shown).abs().mean() < 0.1 * shown.abs().mean()
    assert (other - shown).abs().mean() > shown.abs().mean() / 3


def test_tokens_are_embedded_in_one_way():
    with pytest.raises(ValueError, match="wanted 0 or off"):
        small_world_model(code_network=8, own_token_embedding=True)


def test_predictions_that_are_left_out_change_none_of_the_others():
    model, batch, codebook = small_world_model().eval(), some_sequences(), a_codebook()
    whole = model(batch.tokens, batch.actions, codebook)
    part = model(batch.tokens, batch.actions, codebook, skip_blocks=2)
    for logits, rest in zip(whole[:3], part[:3], strict=True):
        torch.testing.assert_close(logits[:, 2:], rest)


def test_codes_that_are_still_to_come_have_no_logits():
    model = small_world_model(own_token_embedding=True).eval()
    batch, codebook = some_sequences(), a_codebook()
    every, some = (model(batch.tokens, batch.actions, codes).tokens for codes in (codebook, codebook[:3]))
    assert some.shape == (3, 5, K, 3)
    torch.testing.assert_close(some, every[..., :3])


@pytest.mark.parametrize("options", OPTIONS)
def test_one_pass_is_two_passes(options):
    """Reading a block and predicting the next in one pass equals reading it first and predicting then."""
    model = small_world_model(**options).eval()
    batch, codebook = some_sequences(), a_codebook()
    with torch.no_grad():
        before = model.take_in(batch.tokens[:, :3], batch.actions[:, :3], codebook)
        step = model.step(batch.tokens[:, 3], batch.actions[:, 3], codebook, before)
        after = model.take_in(batch.tokens[:, 3:4], batch.actions[:, 3:4], codebook, before)
        torch.testing.assert_close(
            model.token_logits(step, codebook), predict_next(model, after), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(step.state.decoder.kv, after.decoder.kv, atol=1e-5, rtol=1e-5)
    assert torch.equal(step.state.decoder.position, after.decoder.position)
    assert step.state.decoder.position.tolist() == [4 * (K + 1)] * 3


def test_stepping_leaves_the_memory_it_was_given_alone():
    model = small_world_model().eval()
    batch = some_sequences()
    state = model.take_in(batch.tokens[:, :1], batch.actions[:, :1], a_codebook())
    before = state.decoder.kv.clone()
    model.step(batch.tokens[:, 1], batch.actions[:, 1], a_codebook(), state)
    assert torch.equal(state.decoder.kv, before)


def test_no_memory_is_the_initial_memory():
    model = small_world_model().eval()
    batch = some_sequences()
    arguments = batch.tokens[:, :2], batch.actions[:, :2], a_codebook()
    torch.testing.assert_close(
        model.take_in(*arguments).decoder.kv,
        model.take_in(*arguments, model.init_state(3)).decoder.kv,
        rtol=0,
        atol=0,
    )


def test_every_place_has_a_prediction_embedding_of_its_own():
    """The one of a place reaches that place and, through the prediction stream, those behind it."""
    model = small_world_model().eval()
    batch, codebook = some_sequences(), a_codebook()
    with torch.no_grad():
        before = model(batch.tokens, batch.actions, codebook)
        model.prediction_embedding.weight[2] *= -1
        after = model(batch.tokens, batch.actions, codebook)
    torch.testing.assert_close(before.tokens[:, :, :2], after.tokens[:, :, :2])
    assert not torch.allclose(before.tokens[:, :, 2], after.tokens[:, :, 2], atol=1e-3)
    assert not torch.allclose(before.tokens[:, :, 3], after.tokens[:, :, 3], atol=1e-4)
    torch.testing.assert_close(before.rewards, after.rewards)


def test_the_decoder_is_the_published_one():
    decoder = WorldModel(
        WorldModelConfig(), num_tokens=64, code_dim=256, codebook_size=512, num_actions=18
    ).decoder
    assert decoder.cfg == RetNetConfig(
        embed_dim=256,
        num_heads=4,
        num_layers=5,
        ffn_dim=1024,
        decay="log_spaced",
        position="retnet",
        dropout=0.1,
        norm="layernorm",
        norm_eps=1e-6,
        norm_first=True,
        final_norm=False,
        head_norm="groupnorm",
        head_norm_eps=1e-6,
        head_norm_affine=False,
        ffn="mlp",
        activation="silu",
        bias=True,
    )


def test_what_comes_later_changes_nothing_before():
    """Tokens depend on earlier blocks only; reward and end on their own observation and action too."""
    model = small_world_model().eval()
    batch, codebook = some_sequences(), a_codebook()
    tokens, actions = batch.tokens.clone(), batch.actions.clone()
    tokens[:, 3] = (tokens[:, 3] + 1) % CODES
    actions[:, 3] = (actions[:, 3] + 1) % ACTIONS
    with torch.no_grad():
        before, after = model(batch.tokens, batch.actions, codebook), model(tokens, actions, codebook)
    torch.testing.assert_close(before.tokens[:, :4], after.tokens[:, :4])
    torch.testing.assert_close(before.rewards[:, :3], after.rewards[:, :3])
    torch.testing.assert_close(before.ends[:, :3], after.ends[:, :3])
    for one, other in zip(before[:3], after[:3], strict=True):
        assert not torch.allclose(one[:, 4], other[:, 4], atol=1e-4)
    assert not torch.allclose(before.rewards[:, 3], after.rewards[:, 3], atol=1e-4)


def test_the_reward_and_end_know_the_action():
    model = small_world_model().eval()
    batch, codebook = some_sequences(), a_codebook()
    other_actions = (batch.actions + 1) % ACTIONS
    with torch.no_grad():
        before = model(batch.tokens[:, :1], batch.actions[:, :1], codebook)
        after = model(batch.tokens[:, :1], other_actions[:, :1], codebook)
    assert not torch.allclose(before.rewards, after.rewards, atol=1e-4)
    assert not torch.allclose(before.ends, after.ends, atol=1e-4)


def test_the_loss_is_the_sum_of_three_cross_entropies():
    model = small_world_model()
    batch, codebook = some_sequences(), a_codebook()
    loss, metrics, _ = model.loss(batch, codebook)
    logits = model(batch.tokens, batch.actions, codebook)
    tokens, rewards, ends = (
        part[:, 2:].log_softmax(dim=-1).gather(-1, target[:, 2:, ..., None])
        for part, target in zip(
            logits[:3], (batch.tokens, reward_classes(batch.rewards), batch.ended.long()), strict=True
        )
    )
    torch.testing.assert_close(metrics["tokens"], -tokens.mean().detach())
    torch.testing.assert_close(metrics["reward"], -rewards.mean().detach())
    torch.testing.assert_close(metrics["end"], -ends.mean().detach())
    torch.testing.assert_close(loss, -(tokens.mean() + rewards.mean() + ends.mean()))
    correct = (logits.tokens[:, 2:].argmax(dim=-1) == batch.tokens[:, 2:]).float().mean()
    torch.testing.assert_close(metrics["token_accuracy"], correct)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_rewards_are_their_sign():
    assert reward_classes(torch.tensor([-7.0, -0.5, 0.0, 1.0, 200.0])).tolist() == [0, 0, 1, 2, 2]


def test_the_context_carries_no_loss():
    model = small_world_model()
    batch = some_sequences()
    rewards, ended = batch.rewards.clone(), batch.ended.clone()
    rewards[:, :2], ended[:, :2] = -rewards[:, :2] + 1, ~ended[:, :2]
    changed = replace(batch, rewards=rewards, ended=ended)
    assert torch.equal(gradients(model, batch)[0], gradients(model, changed)[0])
    no_context = small_world_model(context_blocks=0)
    assert not torch.equal(gradients(no_context, batch)[0], gradients(no_context, changed)[0])


def test_padding_changes_neither_loss_nor_gradients():
    model = small_world_model()
    batch = some_sequences()
    mask = batch.mask.clone()
    mask[0, 3:], mask[1, 4:] = False, False
    masked = replace(batch, mask=mask)
    other = replace(
        masked,
        tokens=torch.where(mask[..., None], batch.tokens, (batch.tokens + 3) % CODES),
        actions=torch.where(mask, batch.actions, (batch.actions + 1) % ACTIONS),
        rewards=torch.where(mask, batch.rewards, -batch.rewards - 1),
        ended=torch.where(mask, batch.ended, ~batch.ended),
        truncated=~mask,
    )
    loss, expected = gradients(model, masked)
    other_loss, found = gradients(model, other)
    torch.testing.assert_close(loss, other_loss, rtol=0, atol=0)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)
    assert not torch.equal(loss, gradients(model, batch)[0])


def test_a_row_that_is_all_padding_behind_its_context_leaves_the_mean_alone():
    model = small_world_model()
    batch = some_sequences()
    mask = batch.mask.clone()
    mask[2] = False
    rows = {name: value[:2] for name, value in vars(batch).items()}
    torch.testing.assert_close(
        model.loss(replace(batch, mask=mask), a_codebook())[0],
        model.loss(SequenceTokens(**rows), a_codebook())[0],
    )
    nothing = replace(batch, mask=torch.zeros_like(batch.mask))
    assert model.loss(nothing, a_codebook())[0] == 0


def test_truncation_does_not_teach_an_end():
    model = small_world_model()
    batch = some_sequences()
    ended, truncated = torch.zeros_like(batch.ended), torch.zeros_like(batch.ended)
    truncated[:, -1] = True
    cut = replace(batch, ended=ended, truncated=truncated)
    _, plain, _ = model.loss(replace(batch, ended=ended), a_codebook())
    _, metrics, _ = model.loss(cut, a_codebook())
    with torch.no_grad():
        ends = model(batch.tokens, batch.actions, a_codebook()).ends.log_softmax(dim=-1)
    torch.testing.assert_close(metrics["end"], -ends[:, 2:-1, 0].mean())
    torch.testing.assert_close(metrics["tokens"], plain["tokens"])
    torch.testing.assert_close(metrics["reward"], plain["reward"])
    ended[:, -1] = True  # an end on the very step of a cut is an end
    _, metrics, _ = model.loss(replace(cut, ended=ended), a_codebook())
    torch.testing.assert_close(metrics["end"], -torch.cat([ends[:, 2:-1, 0], ends[:, -1:, 1]], dim=1).mean())


@pytest.mark.parametrize("options", OPTIONS)
def test_the_codebook_gets_no_gradient_and_all_else_does(options):
    model = small_world_model(**options)
    codebook = a_codebook().requires_grad_()
    model.loss(some_sequences(), codebook)[0].backward()
    assert codebook.grad is None
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_dropout_acts_in_training_only():
    model = small_world_model(dropout=0.5)
    batch, codebook = some_sequences(), a_codebook()
    assert model.loss(batch, codebook)[0] != model.loss(batch, codebook)[0]
    model.eval()
    assert model.loss(batch, codebook)[0] == model.loss(batch, codebook)[0]


def test_it_learns_a_rule():
    """The action decides the next observation, another token in each place, and the reward."""
    model = small_world_model(context_blocks=1)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-2)
    flags = torch.zeros(16, 4, dtype=torch.bool)
    for _ in range(60):
        actions = torch.randint(ACTIONS, (16, 4), generator=generator)
        before = actions.roll(1, dims=1)
        tokens = torch.arange(K) + before[..., None]
        batch = SequenceTokens(tokens, actions, actions.float() - 1, flags, flags, ~flags)
        loss, metrics, _ = model.loss(batch, a_codebook())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["token_accuracy"] > 0.95
    assert metrics["reward_accuracy"] > 0.95


def test_weight_decay_spares_biases_norms_and_embeddings():
    model = small_world_model(**OPTIONS[1])
    decayed, undecayed = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in undecayed["params"]} >= {
        "token_embedding.weight",
        "action_embedding.weight",
        "prediction_embedding.weight",
        "position_embedding.weight",
    }
    assert all(p.dim() == 2 for p in decayed["params"])
    assert not any("embedding" in names[id(p)] or "norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"embed_dim is 32 and tokenizer\.code_dim is 16"):
        small_world_model(embed_dim=32)
    with pytest.raises(ValueError, match=r"context_blocks is 5"):
        small_world_model(context_blocks=5)
    with pytest.raises(ValueError, match="have 2 blocks"):
        small_world_model().loss(some_sequences(blocks=2), a_codebook())


def test_the_weights_of_rewards_and_ends_weigh_their_losses():
    batch, codebook = some_sequences(), a_codebook()
    _, parts, _ = small_world_model().loss(batch, codebook)
    loss, _, _ = small_world_model(reward_weight=10.0, end_weight=3.0).loss(batch, codebook)
    torch.testing.assert_close(loss, parts["tokens"] + 10 * parts["reward"] + 3 * parts["end"])


@pytest.mark.parametrize("bins", [0, 41])
def test_a_sequence_of_weight_2_is_two_sequences_and_one_of_weight_0_none(bins):
    model, batch, codebook = small_world_model(reward_bins=bins), some_sequences(), a_codebook()
    weighted, measured, _ = model.loss(batch, codebook, torch.tensor([2.0, 1.0, 0.0]))
    again = SequenceTokens(*(getattr(batch, name)[[0, 0, 1]] for name in vars(batch)))
    repeated, wanted, _ = model.loss(again, codebook)
    torch.testing.assert_close(weighted, repeated)
    for name in measured:
        torch.testing.assert_close(measured[name], wanted[name], msg=name)


def test_with_bins_the_model_learns_and_imagines_the_size_of_rewards():
    """Two actions, two rewards of different size and sign; before anything is learned, all rewards are 0."""
    model = small_world_model(reward_bins=41, context_blocks=0)
    batch, codebook = some_sequences(batch=8), a_codebook()
    rewards = torch.where(batch.actions == 0, 5.0, torch.where(batch.actions == 1, -0.25, 0.0))
    batch = replace(batch, rewards=rewards)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    state, generator = model.init_state(8), torch.Generator().manual_seed(0)

    def imagined() -> torch.Tensor:
        with torch.no_grad():
            model.eval()
            answer = model.imagine(batch.tokens[:, 0], batch.actions[:, 0], codebook, state, generator)
        model.train()
        return answer.rewards

    assert (imagined().abs() < 1e-3).all()
    for _ in range(150):
        loss, _, _ = model.loss(batch, codebook)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(imagined(), rewards[:, 0], atol=0.15, rtol=0.05)


@pytest.mark.parametrize(("bins", "sure", "gamble"), [(41, 0.1, 2.195), (0, 1.0, -0.1)])
def test_a_gamble_is_worth_its_mean_with_bins_and_its_odds_with_signs(bins, sure, gamble):
    """One action pays 0.1, the other 5 in 9 of 20 games and -0.1 in 11: by signs the small one is better."""
    model = small_world_model(reward_bins=bins, context_blocks=0, sequence_blocks=1)
    actions = torch.tensor([[0]] * 20 + [[1]] * 20)
    paid = torch.tensor([[0.1]] * 20 + [[5.0]] * 9 + [[-0.1]] * 11)
    never = torch.zeros(40, 1, dtype=torch.bool)
    batch = SequenceTokens(
        tokens=torch.zeros(40, 1, K, dtype=torch.int64),
        actions=actions,
        rewards=paid,
        ended=never,
        truncated=never,
        mask=~never,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss, _, _ = model.loss(batch, a_codebook())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    games, generator = 4_000, torch.Generator().manual_seed(0)
    tokens, chosen = batch.tokens[0].expand(games, K), torch.arange(games) % 2
    with torch.no_grad():
        state = model.eval().init_state(games)
        rewards = model.imagine(tokens, chosen, a_codebook(), state, generator).rewards
    torch.testing.assert_close(rewards[chosen == 0].mean(), torch.tensor(sure), atol=0.05, rtol=0)
    torch.testing.assert_close(rewards[chosen == 1].mean(), torch.tensor(gamble), atol=0.08, rtol=0)


def test_the_loss_of_a_sequence_by_itself_is_that_of_a_batch_of_it_alone():
    """But for ends: a sequence's own counts over all its steps, not over those whose end is known."""
    model, batch, codebook = small_world_model(reward_weight=3.0), some_sequences(), a_codebook()
    mask = batch.mask.clone()
    mask[1, 4:] = False
    batch = replace(batch, mask=mask)
    _, _, sequences = model.loss(batch, codebook, torch.tensor([0.5, 2.0, 1.0]))
    alone = [model.loss(batch.select(slice(row, row + 1)), codebook).total.detach() for row in range(3)]
    torch.testing.assert_close(sequences, torch.stack(alone))
