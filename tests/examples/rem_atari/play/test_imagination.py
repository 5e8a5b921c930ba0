"""Imagination as an environment, and the controller's loss on what it imagines."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from pretended_graph import pretend_graphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rem_atari.agent import Agent
from rem_atari.config import Config, ControllerConfig, EnvConfig, TokenizerConfig, WorldModelConfig
from rem_atari.models.sequence_tokens import SequenceTokens, tokenize
from rem_atari.play.imagination import ImaginedEnv
from rem_atari.play.rollout import Trajectory, rollout
from rem_atari.training import controller_phase
from rem_atari.training.actor_critic import (
    Imagination,
    actor_critic_loss,
    before_the_end,
    controller_loss,
    imagine,
    learn_from,
    start_imagination,
)
from rem_atari.training.component import Component
from rem_atari.training.controller_phase import ControllerPhase
from rem_atari.training.returns import lambda_return

ACTIONS, K, CODES = 3, 4, 7
CONFIG = Config(
    env=EnvConfig(frame_size=8),
    tokenizer=TokenizerConfig(
        channels=(4, 4, 4), groups=2, code_dim=8, codebook_size=CODES, perceptual_weight=0.0
    ),
    world_model=WorldModelConfig(embed_dim=8, num_layers=2, num_heads=2, ffn_dim=16, dropout=0.5),
    controller=ControllerConfig(channels=(4, 4), hidden_dim=8, lstm_dim=6, burn_in=3, horizon=5),
)


def small_agent(kind: str = "vq", world_model: dict | None = None, **controller) -> Agent:
    torch.manual_seed(0)
    cfg = replace(
        CONFIG,
        tokenizer=replace(CONFIG.tokenizer, kind=kind),
        world_model=replace(CONFIG.world_model, **(world_model or {})),
        controller=replace(CONFIG.controller, **controller),
    )
    agent = Agent.from_config(cfg, ACTIONS)
    if kind == "vq":
        torch.nn.init.normal_(agent.tokenizer.codebook.weight)
    else:
        side = CONFIG.env.frame_size
        agent.tokenizer.grow(torch.randint(256, (CODES, side, side, 3), dtype=torch.uint8))
    return agent.eval()


def some_segments(batch: int = 4, steps: int = 4) -> SequenceTokens:
    generator = torch.Generator().manual_seed(1)
    flags = torch.zeros(batch, steps, dtype=torch.bool)
    return SequenceTokens(
        tokens=torch.randint(CODES, (batch, steps, K), generator=generator),
        actions=torch.randint(ACTIONS, (batch, steps), generator=generator),
        rewards=torch.zeros(batch, steps),
        ended=flags,
        truncated=flags,
        mask=~flags,
    )


def env_of(agent: Agent, seed: int = 0) -> ImaginedEnv:
    return ImaginedEnv(agent.world_model, agent.tokenizer, torch.Generator().manual_seed(seed))


def always(head: torch.nn.Sequential, index: int) -> None:
    """Make a head predict one class whatever it sees."""
    with torch.no_grad():
        head[-1].weight.zero_()
        head[-1].bias.zero_()
        head[-1].bias[index] = 1e6


def test_steps_have_the_shapes_of_an_environment():
    agent, segments = small_agent(), some_segments()
    env = env_of(agent)
    codes = env.reset(segments.tokens[:, -1])
    assert torch.equal(codes, agent.tokenizer.embed(segments.tokens[:, -1]))
    for _ in range(20):
        step = env.step(segments.actions[:, -1])
        assert step.seen.shape == (4, K, 8)
        assert set(step.rewards.tolist()) <= {-1.0, 0.0, 1.0}
        assert step.rewards.dtype == torch.float32
        assert step.ended.dtype == torch.bool
        assert not step.restarted.any()
        assert not step.truncated.any()
        assert not step.seen.requires_grad
    assert env.num_actions == ACTIONS


@pytest.mark.parametrize("reward", [-1, 0, 1])
@pytest.mark.parametrize("end", [False, True])
def test_rewards_ends_and_tokens_come_from_the_heads(reward, end):
    agent, segments = small_agent(), some_segments()
    always(agent.world_model.reward_head, reward + 1)
    always(agent.world_model.end_head, int(end))
    always(agent.world_model.token_head, 5)
    env = env_of(agent)
    env.reset(segments.tokens[:, -1])
    step = env.step(segments.actions[:, -1])
    assert (step.rewards == reward).all()
    assert (step.ended == end).all()
    assert (env.tokens == 5).all()
    assert torch.equal(step.seen, agent.tokenizer.embed(env.tokens))


@pytest.mark.parametrize("world_model", [{}, {"pop": False}, {"draw": "groups"}])
def test_mean_rewards_are_what_drawn_ones_come_to_in_the_long_run(world_model):
    agent, segments = small_agent(world_model=world_model), some_segments(batch=4096, steps=2)
    head = agent.world_model.reward_head[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    paid = {}
    for mean_rewards in (False, True):
        cfg = replace(CONFIG.controller, horizon=3, mean_rewards=mean_rewards)
        found = imagine(agent, segments, cfg, torch.Generator().manual_seed(0))
        paid[mean_rewards] = found.trajectory.rewards
    torch.testing.assert_close(paid[True], torch.full((4096, 2), 0.3))
    assert set(paid[False].unique().tolist()) == {-1.0, 0.0, 1.0}
    # Four standard errors of 8,192 rewards with a variance of 0.61.
    assert abs(paid[False].mean() - 0.3) < 4 * (0.61 / 8192) ** 0.5


def test_imagination_is_repeated_by_its_seed():
    agent, segments = small_agent(), some_segments()

    def play(seed):
        env = env_of(agent, seed)
        env.reset(segments.tokens[:, -1])
        return torch.stack([env.step(segments.actions[:, -1]).rewards for _ in range(8)])

    assert torch.equal(play(0), play(0))
    assert not torch.equal(play(0), play(1))


def test_a_step_is_one_pass_of_the_decoder():
    agent, segments = small_agent(), some_segments()
    env = env_of(agent)
    env.reset(segments.tokens[:, -1], segments.tokens[:, :1], segments.actions[:, :1])
    calls = []
    agent.world_model.decoder.register_forward_hook(lambda *args: calls.append(1))
    env.step(segments.actions[:, -1])
    assert len(calls) == 1


def test_what_is_imagined_follows_the_context_and_the_past_steps():
    """The logits behind a step are those of the whole sequence: context, observation, what was imagined."""
    agent, segments = small_agent(), some_segments()
    model, codebook = agent.world_model, agent.tokenizer.codes
    env = env_of(agent)
    env.reset(segments.tokens[:, 1], segments.tokens[:, :1], segments.actions[:, :1])
    env.step(segments.actions[:, 1])
    imagined = env.tokens
    tokens = torch.stack([segments.tokens[:, 0], segments.tokens[:, 1], imagined, imagined], dim=1)
    seen = []
    model_step = model.step
    model.step = lambda *args: seen.append(model_step(*args)) or seen[-1]
    env.step(segments.actions[:, 2])
    with torch.no_grad():
        whole = model(tokens, segments.actions, codebook)
        token_logits = model.token_logits(seen[0], codebook)
    torch.testing.assert_close(token_logits, whole.tokens[:, 3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[0].reward_logits, whole.rewards[:, 2], atol=1e-5, rtol=1e-5)


def test_a_padded_context_is_no_context():
    agent, segments = small_agent(), some_segments()
    mask = torch.tensor([True, False, True, False])
    states = []
    for context in [(segments.tokens[:, :1], segments.actions[:, :1], mask[:, None]), (None, None, None)]:
        env = env_of(agent)
        env.reset(segments.tokens[:, -1], *context)
        states.append(env._state)
    assert torch.equal(states[0].decoder.kv[:, ~mask], states[1].decoder.kv[:, ~mask])
    assert states[0].decoder.position.tolist() == [K + 1, 0, K + 1, 0]
    assert states[0].decoder.kv[:, mask].any()


def test_misuse_is_named():
    agent, segments = small_agent(), some_segments()
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        env_of(agent).step(segments.actions[:, 0])
    with pytest.raises(ValueError, match="come together"):
        env_of(agent).reset(segments.tokens[:, -1], segments.tokens[:, :1])
    agent.world_model.train()
    with pytest.raises(ValueError, match="training mode"):
        env_of(agent)


def test_segments_prepare_the_controller_and_the_world_model():
    agent, segments = small_agent(), some_segments()
    env = env_of(agent)
    carry, observation = start_imagination(env, agent, segments, 1)
    assert torch.equal(observation, agent.tokenizer.embed(segments.tokens[:, 3]))
    codes = agent.tokenizer.embed(segments.tokens[:, :3])
    wanted = agent.controller.burn_in(codes, segments.actions[:, :3], segments.mask[:, :3])
    torch.testing.assert_close(carry, wanted)
    state = agent.world_model.take_in(
        segments.tokens[:, 2:3], segments.actions[:, 2:3], agent.tokenizer.codes
    )
    torch.testing.assert_close(env._state.decoder.kv, state.decoder.kv)


def test_the_world_model_reads_the_real_frames_of_the_context_and_no_padding():
    agent, segments = small_agent(), some_segments()
    mask = segments.mask.clone()
    mask[1, :1], mask[2, :2], mask[3, :3] = False, False, False
    env = env_of(agent)
    start_imagination(env, agent, replace(segments, mask=mask), 3)
    assert env._state.decoder.position.tolist() == [3 * (K + 1), 2 * (K + 1), K + 1, 0]
    for row, real in enumerate((3, 2, 1)):
        tokens, actions = (
            segments.tokens[row : row + 1, 3 - real : 3],
            segments.actions[row : row + 1, 3 - real : 3],
        )
        alone = agent.world_model.take_in(tokens, actions, agent.tokenizer.codes)
        torch.testing.assert_close(
            env._state.decoder.kv[:, row : row + 1], alone.decoder.kv, atol=1e-6, rtol=1e-5
        )
    assert (env._state.decoder.kv[:, 3] == 0).all()


def test_without_context_the_memory_is_empty():
    agent, segments = small_agent(), some_segments()
    env = env_of(agent)
    start_imagination(env, agent, segments, 0)
    assert (env._state.decoder.kv == 0).all()


def test_a_segment_of_one_real_frame_gives_the_world_model_no_context():
    agent, segments = small_agent(), some_segments()
    mask = segments.mask.clone()
    mask[1, :3] = False
    env = env_of(agent)
    start_imagination(env, agent, replace(segments, mask=mask), 1)
    assert env._state.decoder.position.tolist() == [K + 1, 0, K + 1, K + 1]


def test_the_last_observation_is_judged_but_not_acted_on(monkeypatch):
    """With a horizon of 5 the world model steps four times: only the fifth observation's value is wanted."""
    agent, segments = small_agent(), some_segments()
    steps = []
    one_step = agent.world_model.step
    monkeypatch.setattr(agent.world_model, "step", lambda *args: steps.append(1) or one_step(*args))
    controller_loss(agent, segments, CONFIG.controller, torch.Generator().manual_seed(0))
    assert len(steps) == 4


def test_padding_on_the_left_changes_nothing():
    agent, segments = small_agent(), some_segments()
    mask = segments.mask.clone()
    mask[0, :2], mask[1, :3] = False, False
    masked = replace(segments, mask=mask)
    other = replace(
        masked,
        tokens=torch.where(mask[..., None], segments.tokens, (segments.tokens + 1) % CODES),
        actions=torch.where(mask, segments.actions, (segments.actions + 1) % ACTIONS),
    )
    losses = [
        controller_loss(agent, batch, CONFIG.controller, torch.Generator().manual_seed(0))[0]
        for batch in (masked, other, segments)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_segment_may_be_a_single_frame():
    agent = small_agent(burn_in=0)
    loss, _ = controller_loss(
        agent, some_segments(steps=1), CONFIG.controller, torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(loss)


@pytest.mark.parametrize("autocast", [False, True])  # whose cache torch 2.9 and 2.13 keep differently
def test_the_loss_trains_the_controller_and_nothing_else(autocast):
    agent, segments = small_agent(), some_segments()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, metrics = controller_loss(agent, segments, CONFIG.controller, torch.Generator().manual_seed(0))
    loss.backward()
    without = [name for name, p in agent.controller.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    for part in (agent.tokenizer, agent.world_model):
        assert all(parameter.grad is None for parameter in part.parameters())
    assert set(metrics) == {
        "loss", "policy", "value", "entropy", "imagined_return", "imagined_reward", "imagined_end"
    }  # fmt: skip
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("draw", ["independent", "coupled", "refine", "groups"])
def test_all_ways_to_draw_work_under_autocast(draw: str):
    """A code network's embeddings are then in bfloat16, and the decoder's outputs in float32."""
    agent, segments = small_agent(world_model={"draw": draw, "code_network": 4}), some_segments()
    always(agent.world_model.token_head, 5)
    env = env_of(agent)
    with torch.autocast("cpu", torch.bfloat16):
        env.reset(segments.tokens[:, -1])
        env.step(segments.actions[:, -1])
    assert (env.tokens == 5).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cell": "gru"},
        {"action_input": False},
        {"heads_see_features": True},
        {"normalize_codes": True},
    ],
)
def test_judging_all_steps_at_once_is_judging_them_in_the_rollout(options):
    """Logits, values and the gradient are those of a rollout with gradient."""
    agent, segments = small_agent(**options), some_segments()
    controller = agent.controller
    before, imagined, bootstrap = imagine(
        agent, segments, CONFIG.controller, torch.Generator().manual_seed(0)
    )
    assert not any(tensor.requires_grad for tensor in (imagined.logits, imagined.values, bootstrap, *before))
    env = env_of(agent)
    carry, observation = start_imagination(env, agent, segments, 1)
    wanted, _, _ = rollout(env, controller, carry, observation, 4, generator=torch.Generator().manual_seed(0))
    logits, critic = controller.judge(wanted.seen, wanted.actions, carry)
    found = logits, controller.values(critic)
    gradients = []
    for logits, values in ((wanted.logits, wanted.values), found):
        torch.testing.assert_close(logits, wanted.logits, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(values, wanted.values, atol=1e-6, rtol=1e-5)
        controller.zero_grad()
        (logits.square().sum() + (3 * values).cos().sum()).backward()
        gradients.append([parameter.grad for parameter in controller.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def a_trajectory(batch: int = 3, steps: int = 4) -> tuple[Trajectory, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ended = torch.zeros(batch, steps, dtype=torch.bool)
    ended[0, 1], ended[1, 3] = True, True
    trajectory = Trajectory(
        seen=torch.zeros(batch, steps, 0),
        logits=torch.randn(batch, steps, ACTIONS, generator=generator).requires_grad_(),
        values=torch.randn(batch, steps, generator=generator).requires_grad_(),
        actions=torch.randint(ACTIONS, (batch, steps), generator=generator),
        rewards=torch.randn(batch, steps, generator=generator),
        ended=ended,
        truncated=torch.zeros_like(ended),
    )
    return trajectory, torch.randn(batch, generator=generator)


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_by_hand(masked):
    cfg = replace(CONFIG.controller, mask_after_end=masked, entropy_weight=0.1, gamma=0.9, td_lambda=0.8)
    trajectory, bootstrap = a_trajectory()
    loss, metrics = actor_critic_loss(trajectory, bootstrap, cfg)
    values = trajectory.values.detach()
    returns = lambda_return(trajectory.rewards, trajectory.ended, values, bootstrap, gamma=0.9, lambda_=0.8)
    terms = []
    for row in range(3):
        for step in range(4):
            if masked and trajectory.ended[row, :step].any():
                continue
            log_policy = trajectory.logits[row, step].log_softmax(dim=0)
            advantage = returns[row, step] - values[row, step]
            policy = -log_policy[trajectory.actions[row, step]] * advantage
            value = (trajectory.values[row, step] - returns[row, step]) ** 2
            entropy = -(log_policy.exp() * log_policy).sum()
            terms.append(policy + value - 0.1 * entropy)
    assert len(terms) == (10 if masked else 12)
    wanted = torch.stack(terms).mean()
    torch.testing.assert_close(loss, wanted)
    parameters = [trajectory.logits, trajectory.values]
    for found, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(found, expected)
    rewards = [trajectory.rewards[0, :2], trajectory.rewards[1], trajectory.rewards[2]]
    torch.testing.assert_close(metrics["imagined_return"], torch.stack([r.sum() for r in rewards]).mean())
    torch.testing.assert_close(metrics["imagined_reward"], torch.cat(rewards).mean())
    assert metrics["imagined_end"] == pytest.approx(2 / 10)


def test_what_follows_an_imagined_end_is_masked():
    trajectory, bootstrap = a_trajectory()
    other = replace(trajectory, rewards=trajectory.rewards.clone())
    other.rewards[0, 2:] += 100.0
    masked = CONFIG.controller
    unmasked = replace(masked, mask_after_end=False)
    assert (
        actor_critic_loss(trajectory, bootstrap, masked)[0] == actor_critic_loss(other, bootstrap, masked)[0]
    )
    assert (
        actor_critic_loss(trajectory, bootstrap, unmasked)[0]
        != actor_critic_loss(other, bootstrap, unmasked)[0]
    )


def test_before_the_end():
    ended = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
    assert before_the_end(ended).tolist() == [[True, True, False, False], [True] + [False] * 3, [True] * 4]


def test_the_controller_learns_which_action_pays():
    """In a world whose reward is the action, the policy moves to the action that pays."""
    agent, segments = small_agent(horizon=3), some_segments(batch=16)
    cfg = replace(CONFIG.controller, horizon=3, entropy_weight=0.001, gamma=0.5)

    class Paying(ImaginedEnv):
        def step(self, actions):
            return replace(super().step(actions), rewards=actions.float() - 1)

    optimizer = torch.optim.Adam(agent.controller.parameters(), lr=3e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        env = Paying(agent.world_model, agent.tokenizer, generator)
        carry, observation = start_imagination(env, agent, segments, 1)
        trajectory, carry, observation = rollout(
            env, agent.controller, carry, observation, 2, generator=generator
        )
        bootstrap = agent.controller(observation, carry).value.detach()
        loss, _ = actor_critic_loss(trajectory, bootstrap, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (trajectory.actions == 2).float().mean() > 0.8


def test_a_replay_batch_is_tokenised():
    agent = small_agent()
    sequence = some_segments()
    frames = torch.randint(0, 256, (4, 4, 8, 8, 3), dtype=torch.uint8)
    batch = type("Batch", (), {**vars(sequence), "frames": frames})()
    tokens = tokenize(batch, agent.tokenizer)
    assert torch.equal(tokens.tokens, agent.tokenizer.encode(frames))
    assert torch.equal(tokens.actions, sequence.actions)
    assert torch.equal(tokens.mask, sequence.mask)


def test_the_published_agent():
    agent = Agent.from_config(Config(), 18)
    assert sum(parameter.numel() for parameter in agent.parameters()) == 3_189_667 + 4_628_997 + 4_586_707
    assert agent.controller.num_actions == 18


class Operations(TorchDispatchMode):
    """Writes down every operation with the shapes it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.seen.append((func.name(), shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"space": "pixels", "pixel_channels": (4,)},
        {"burn_in_actions": False},
        {"context_frames": 3, "value_bins": 5},
        {"kind": "patches", "world_model": {"draw": "coupled", "reward_bins": 5}},
        {"kind": "patches", "space": "pixels", "pixel_channels": (4,)},
        {"world_model": {"draw": "refine"}},
        {"world_model": {"draw": "groups"}},
        {"context_frames": 3, "world_model": {"local_frames": 3, "local_outcomes": True}},
        {"disagreement_weight": 0.5, "world_model": {"disagreement_heads": 2}},
        {"mean_rewards": True},
    ],
)
def test_imagination_can_be_captured(options):
    """The same operations on the same shapes whatever the segments hold, and none that waits for the host."""
    agent, segments = small_agent(**options), some_segments()
    read = ("context_frames", "disagreement_weight", "mean_rewards")
    cfg = replace(CONFIG.controller, **{name: options[name] for name in read if name in options})
    other = replace(
        segments,
        tokens=(segments.tokens + 1) % CODES,
        actions=(segments.actions + 1) % ACTIONS,
        mask=segments.mask & (torch.arange(4) > 1),
    )
    seen = []
    # Tables that layers keep are made by the first call, which is never the one that is captured.
    imagine(agent, segments, cfg, torch.Generator().manual_seed(0))
    for batch in (segments, other):
        with Operations() as operations:
            imagine(agent, batch, cfg, torch.Generator().manual_seed(0))
        seen.append(operations.seen)
    assert seen[0] == seen[1]
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")
    assert not [name for name, _ in seen[0] if name.removeprefix("aten::").split(".")[0] in waiting]


def leaves(imagination: Imagination) -> list[torch.Tensor]:
    before, trajectory, bootstrap = imagination
    found = tree_leaves((before, vars(trajectory), bootstrap))
    return [tensor for tensor in found if tensor is not None]


def test_a_graph_gives_what_the_function_gives(monkeypatch):
    """But for the graph itself, see tests/gpu: its results, and what the generator holds."""
    graphs = pretend_graphs(monkeypatch)
    agent, segments = small_agent(world_model={"disagreement_heads": 2}), some_segments()
    # With the steps after an end, which the CPU's phase would otherwise skip.
    cfg = replace(CONFIG.controller, disagreement_weight=0.5, mask_after_end=False)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    component = Component("controller", agent.controller, cfg.optim)
    eager, captured = (
        ControllerPhase(agent, component, MagicMock(), MagicMock(), cfg, each, print, cuda_graph=graph)
        for graph, each in enumerate(generators)
    )
    captured.go_on()
    for shift in range(6):
        batch = replace(segments, tokens=(segments.tokens + shift) % CODES)
        wanted, found = leaves(eager.imagine(batch)), leaves(captured.imagine(batch))
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        assert not any(tensor.requires_grad for tensor in found)
        assert torch.equal(*(generator.get_state() for generator in generators))
    assert [graph.registered for graph in graphs] == [[generators[1]]]


def policy_gradient(cfg: ControllerConfig, moved: torch.Tensor) -> torch.Tensor:
    """The gradient of the policy's loss with respect to its logits, after these have moved by so much."""
    trajectory, bootstrap = a_trajectory()
    logits = (trajectory.logits.detach() + moved).requires_grad_()
    new = replace(trajectory, logits=logits, values=trajectory.values.detach())
    loss, _ = actor_critic_loss(new, bootstrap, replace(cfg, entropy_weight=0.0), acted=trajectory.logits)
    return torch.autograd.grad(loss, logits)[0]


def test_the_first_of_several_uses_has_the_gradient_of_a_single_one():
    once, twice = (policy_gradient(replace(CONFIG.controller, uses=uses), torch.zeros(())) for uses in (1, 2))
    torch.testing.assert_close(twice, once)


def test_chances_that_have_moved_far_enough_gain_nothing_more():
    """Actions made likelier by more than the clip have a gradient only where they are unwelcome."""
    cfg = replace(CONFIG.controller, uses=2, clip_ratio=0.1)
    trajectory, bootstrap = a_trajectory()
    moved = 3.0 * torch.nn.functional.one_hot(trajectory.actions, trajectory.logits.shape[-1])
    gradient = policy_gradient(cfg, moved)
    returns = lambda_return(
        trajectory.rewards,
        trajectory.ended,
        trajectory.values.detach(),
        bootstrap,
        gamma=cfg.gamma,
        lambda_=cfg.td_lambda,
    )
    welcome = returns > trajectory.values
    alive = before_the_end(trajectory.ended)
    assert (welcome & alive).any()
    assert (gradient[welcome] == 0).all()
    assert (gradient[~welcome & alive].abs().sum(dim=-1) > 0).all()


def test_scaled_advantages_do_not_depend_on_the_size_of_rewards():
    trajectory, bootstrap = a_trajectory()
    cfg = replace(CONFIG.controller, scale_advantages=True)
    policy = []
    for factor in (1.0, 100.0):
        scaled = replace(trajectory, rewards=factor * trajectory.rewards, values=factor * trajectory.values)
        policy.append(actor_critic_loss(scaled, factor * bootstrap, cfg)[1]["policy"])
    torch.testing.assert_close(policy[0], policy[1])


def a_phase(agent: Agent, segments: SequenceTokens, cfg: ControllerConfig) -> ControllerPhase:
    """The controller's turn on the same segments at every update."""
    component = Component("controller", agent.controller, cfg.optim)
    generator = torch.Generator().manual_seed(0)
    phase = ControllerPhase(agent, component, MagicMock(num_steps=1), MagicMock(), cfg, generator, print)
    phase.draw = lambda: segments
    return phase


@pytest.mark.parametrize("minibatches", [1, 3])
def test_imagined_steps_are_used_as_often_as_asked_for(minibatches, monkeypatch):
    """Imagination happens once, and each use goes over all episodes, in parts of about the same size."""
    cfg = replace(CONFIG.controller, uses=2, minibatches=minibatches)
    agent, segments = small_agent(), some_segments(batch=5)
    phase = a_phase(agent, segments, cfg)
    imagined, learned = [], []
    imagine_once = phase.imagine
    phase.imagine = lambda *arguments: imagined.append(imagine_once(*arguments)) or imagined[-1]

    def spy(part: Imagination, *arguments):
        learned.append(part)
        return learn_from(part, *arguments)

    monkeypatch.setattr(controller_phase, "learn_from", spy)
    phase.update()
    (whole,) = imagined
    assert phase.component.updates == len(learned) == 2 * minibatches
    assert phase.more_metrics({"rate": 1.0})["imagined_per_env_step"] == cfg.optim.batch_size * 4
    assert {len(part.bootstrap) for part in learned} == ({5} if minibatches == 1 else {1, 2})
    orders = []
    for use in range(2):
        parts = learned[use * minibatches : (use + 1) * minibatches]
        joined = [torch.cat(columns) for columns in zip(*map(leaves, parts), strict=True)]
        rows = [whole.bootstrap.tolist().index(value) for value in joined[-1].tolist()]
        assert sorted(rows) == list(range(5))
        assert all(torch.equal(all_[rows], one) for all_, one in zip(leaves(whole), joined, strict=True))
        orders.append(rows)
    assert (orders[0] == orders[1] == list(range(5))) == (minibatches == 1)


def test_a_single_minibatch_draws_nothing():
    """Runs without minibatches stay as they were, to the last bit."""
    cfg, segments = replace(CONFIG.controller, uses=3), some_segments()
    agents = [small_agent(), small_agent()]
    phase = a_phase(agents[0], segments, cfg)
    found = phase.update()
    generator = torch.Generator().manual_seed(0)
    component = Component("controller", agents[1].controller, cfg.optim)
    imagination = imagine(agents[1], segments, cfg, generator, skip_ended=True)
    wanted, *_ = (component.apply(*learn_from(imagination, agents[1].controller, cfg)) for _ in range(3))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    weights = (agent.controller.parameters() for agent in agents)
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    assert torch.equal(phase._generator.get_state(), generator.get_state())


def test_metrics_of_minibatches_are_the_means_of_the_first_use():
    cfg = replace(CONFIG.controller, uses=2, minibatches=2, optim=replace(CONFIG.controller.optim, lr=0.0))
    agent = small_agent()
    always(agent.world_model.end_head, 0)
    found, whole = (
        a_phase(agent, some_segments(), replace(cfg, minibatches=parts)).update() for parts in (2, 1)
    )
    assert found.keys() == whole.keys()
    # Two parts of the same size of episodes that do not end, and a learning rate of 0.
    for name in ("imagined_return", "imagined_reward", "entropy"):
        torch.testing.assert_close(found[name], whole[name], msg=name)


def test_minibatches_are_clipped_as_uses_are():
    cfg = replace(CONFIG.controller, clip_ratio=0.1)
    moved = torch.tensor([5.0, 0.0, -5.0])
    parts, uses = replace(cfg, minibatches=2), replace(cfg, uses=2)
    assert torch.equal(policy_gradient(parts, moved), policy_gradient(uses, moved))
    assert not torch.equal(policy_gradient(parts, moved), policy_gradient(cfg, moved))


def some_end(agent: Agent) -> None:
    """Let about a fifth of the steps end an episode."""
    with torch.no_grad():
        agent.world_model.end_head[-1].weight.zero_()
        agent.world_model.end_head[-1].bias.copy_(torch.tensor([1.4, 0.0]))


@pytest.mark.parametrize("world_model", [{}, {"pop": False}, {"local_frames": 2, "disagreement_heads": 2}])
def test_ended_episodes_are_imagined_no_further(world_model):
    """Steps up to an end are those of a world model that imagines them alone; later ones show nothing new."""
    weight = 0.5 if "disagreement_heads" in world_model else 0.0
    agent, segments = small_agent(world_model=world_model), some_segments(batch=16)
    some_end(agent)
    cfg = replace(CONFIG.controller, disagreement_weight=weight)
    imagined = []
    imagine_once = agent.world_model.imagine

    def spy(tokens, *rest, **options):
        imagined.append(imagine_once(tokens, *rest, **options))
        return imagined[-1]

    agent.world_model.imagine = spy
    found = imagine(agent, segments, cfg, torch.Generator().manual_seed(0), skip_ended=True)
    alive = before_the_end(found.trajectory.ended)
    assert [len(answer.rewards) for answer in imagined] == alive.sum(dim=0).tolist()
    assert 0 < alive[:, -1].sum() < 16
    for step, answer in enumerate(imagined):
        rows = alive[:, step]
        assert torch.equal(found.trajectory.rewards[rows, step], answer.rewards)
        assert torch.equal(found.trajectory.ended[rows, step], answer.ended)
        assert not found.trajectory.rewards[~rows, step].any()
        if weight:
            assert torch.equal(found.trajectory.bonus[rows, step], weight * answer.disagreement)
        if step + 1 < len(imagined):
            seen = found.trajectory.seen[:, step + 1]
            assert torch.equal(seen[rows], agent.show(answer.tokens))
            assert torch.equal(seen[~rows], found.trajectory.seen[~rows, step])


def test_episodes_that_all_end_at_once_are_imagined_to_the_end():
    agent, segments = small_agent(), some_segments()
    always(agent.world_model.end_head, 1)
    found = imagine(agent, segments, CONFIG.controller, torch.Generator().manual_seed(0), skip_ended=True)
    assert found.trajectory.ended.all()


def test_nothing_changes_before_the_first_end_and_what_is_skipped_teaches_nothing():
    agent, segments = small_agent(), some_segments(batch=8)
    some_end(agent)
    ways = [
        imagine(agent, segments, CONFIG.controller, torch.Generator().manual_seed(0), skip_ended=skipped)
        for skipped in (False, True)
    ]
    whole, skipped = (way.trajectory for way in ways)
    first = int(whole.ended.any(dim=0).int().argmax())
    assert torch.equal(whole.rewards[:, : first + 1], skipped.rewards[:, : first + 1])
    assert torch.equal(whole.ended[:, : first + 1], skipped.ended[:, : first + 1])
    alive = before_the_end(skipped.ended)
    assert not alive.all()
    spoilt = replace(skipped, rewards=torch.where(alive, skipped.rewards, 7.0))
    losses = [actor_critic_loss(each, ways[1].bootstrap, CONFIG.controller)[0] for each in (skipped, spoilt)]
    assert torch.equal(*losses)
