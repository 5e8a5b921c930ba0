"""The one rollout loop, on an environment that can be checked by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rem_atari.config import ControllerConfig
from rem_atari.models.controller import Controller
from rem_atari.models.sampling import sample_categorical
from rem_atari.play.exploration import Exploration
from rem_atari.play.rollout import TokenStep, rollout

ROWS, ACTIONS = 3, 4


class CountingEnv:
    """Shows its step count as codes; row 1 ends in every third step, row 2 is truncated in the first."""

    num_actions = ACTIONS

    def __init__(self) -> None:
        self.taken: list[Tensor] = []

    def observation(self) -> Tensor:
        return torch.full((ROWS, 4, 3), float(len(self.taken)))

    def step(self, actions: Tensor) -> TokenStep:
        self.taken.append(actions)
        rewards = actions.float() + 10 * len(self.taken)
        ended = torch.tensor([False, len(self.taken) % 3 == 0, False])
        truncated = torch.tensor([False, False, len(self.taken) == 1])
        return TokenStep(self.observation(), rewards, ended, truncated, restarted=ended | truncated)


class RecordingController(Controller):
    """Writes down what it is told."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            ControllerConfig(channels=(4, 4), hidden_dim=8, lstm_dim=6),
            grid=2,
            code_dim=3,
            frame_size=16,
            num_actions=ACTIONS,
        )
        self.told: list[Tensor] = []
        self.carries: list[Tensor] = []

    def forward(self, codes, carry):
        self.carries.append(carry[0].detach())
        return super().forward(codes, carry)

    def observe_action(self, actions, carry):
        self.told.append(actions)
        return super().observe_action(actions, carry)


def play(steps: int, seed: int = 0, **options):
    env, controller = CountingEnv(), RecordingController()
    generator = torch.Generator().manual_seed(seed)
    result = rollout(
        env,
        controller,
        controller.initial_carry(ROWS),
        env.observation(),
        steps,
        generator=generator,
        **options,
    )
    return env, controller, result


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_the_controller_is_told_the_action_taken(epsilon):
    generator, exploration = torch.Generator().manual_seed(1), Exploration()

    def explore(actions: Tensor) -> Tensor:
        return exploration(actions, ACTIONS, generator, epsilon=epsilon, repeat=2)

    env, controller, (trajectory, _, _) = play(6, explore=explore)
    assert torch.equal(torch.stack(controller.told), torch.stack(env.taken))
    assert torch.equal(trajectory.actions, torch.stack(env.taken, dim=1))
    if epsilon == 1.0:  # the policy alone would have acted otherwise
        greedy = trajectory.logits.argmax(dim=-1)
        assert (trajectory.actions != greedy).any()


def test_the_trajectory_is_what_happened():
    env, _, (trajectory, _, observation) = play(6)
    assert trajectory.logits.shape == (ROWS, 6, ACTIONS)
    assert trajectory.values.shape == (ROWS, 6)
    steps = torch.arange(1, 7)
    assert torch.equal(trajectory.rewards, trajectory.actions.float() + 10 * steps)
    assert trajectory.ended.tolist() == [[False] * 6, [False, False, True] * 2, [False] * 6]
    assert trajectory.truncated.sum() == 1
    assert trajectory.truncated[2, 0]
    assert torch.equal(observation, env.observation())


def test_memory_starts_anew_only_where_an_episode_restarts():
    _, controller, (_, carry, _) = play(6)
    blank = torch.stack([(seen == 0).all(dim=-1) for seen in [*controller.carries, carry[0]]], dim=1)
    restarts = [[0], [0, 3, 6], [0, 1]]
    assert [torch.where(row)[0].tolist() for row in blank] == restarts


def test_a_rollout_can_be_cut_in_two():
    whole = play(5)[2][0]
    env, controller = CountingEnv(), RecordingController()
    generator = torch.Generator().manual_seed(0)
    carry, observation, parts = controller.initial_carry(ROWS), env.observation(), []
    for steps in (2, 3):
        part, carry, observation = rollout(env, controller, carry, observation, steps, generator=generator)
        parts.append(part)
    assert torch.equal(whole.actions, torch.cat([part.actions for part in parts], dim=1))
    torch.testing.assert_close(whole.values, torch.cat([part.values for part in parts], dim=1))


def test_gradients_flow_as_the_caller_wants():
    _, controller, (trajectory, _, _) = play(3)
    (trajectory.values.sum() + trajectory.logits.logsumexp(dim=-1).sum()).backward()
    assert all(parameter.grad is not None for parameter in controller.parameters())
    with torch.no_grad():
        trajectory = play(3)[2][0]
    assert not trajectory.logits.requires_grad


def test_no_steps_are_an_error():
    with pytest.raises(ValueError, match="steps is 0"):
        play(0)


def test_the_temperature_reaches_the_actions():
    _, _, (trajectory, _, _) = play(6, temperature=1e-6)
    assert torch.equal(trajectory.actions, trajectory.logits.argmax(dim=-1))


def test_exploration_is_drawn_for_each_row():
    """With a policy that always takes action 0, a share ε of the rows acts uniformly, each on its own."""
    chosen = torch.zeros(4000, dtype=torch.int64)
    actions = Exploration()(chosen, 4, torch.Generator().manual_seed(0), epsilon=0.2, repeat=1)
    shares = torch.bincount(actions, minlength=4) / len(actions)
    torch.testing.assert_close(shares, torch.tensor([0.85, 0.05, 0.05, 0.05]), atol=0.02, rtol=0)


def test_random_actions_last_as_long_as_drawn():
    """With a policy that always takes action 9, which is not random: 1 to 5 steps, each length as often."""
    exploration, generator = Exploration(), torch.Generator().manual_seed(0)
    chosen = torch.full((500,), 9)
    steps = [exploration(chosen, 9, generator, epsilon=0.02, repeat=5) for _ in range(60)]
    lengths = []
    for row in torch.stack(steps, dim=1).tolist():
        runs = [(action, len(list(run))) for action, run in itertools.groupby(row)]
        lengths += [length for action, length in runs[1:-1] if action != 9]
    counts = torch.bincount(torch.tensor(lengths))
    # Two that follow one another with the same action look like a longer one; they are few.
    assert counts[6:].sum() < 0.01 * counts.sum()
    torch.testing.assert_close(counts[1:6] / counts.sum(), torch.full((5,), 0.2), atol=0.06, rtol=0)


def test_exploration_goes_on_from_its_state():
    chosen = torch.full((4,), 9)
    whole, generator = Exploration(), torch.Generator().manual_seed(0)
    wanted = [whole(chosen, 9, generator, epsilon=0.5, repeat=6).tolist() for _ in range(12)]
    part, generator = Exploration(), torch.Generator().manual_seed(0)
    found = [part(chosen, 9, generator, epsilon=0.5, repeat=6).tolist() for _ in range(5)]
    part = Exploration.from_state(part.state())
    found += [part(chosen, 9, generator, epsilon=0.5, repeat=6).tolist() for _ in range(7)]
    assert found == wanted


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0])
    draws = sample_categorical(
        logits.expand(20_000, -1), torch.Generator().manual_seed(0), temperature=temperature
    )
    shares = torch.bincount(draws, minlength=3) / len(draws)
    torch.testing.assert_close(shares, (logits / temperature).softmax(dim=-1), atol=0.012, rtol=0)


def test_samples_depend_on_the_generator_alone():
    logits = torch.zeros(50, 8)
    draws = [sample_categorical(logits, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="temperature is -1"):
        sample_categorical(logits, torch.Generator(), temperature=-1.0)
