"""Sequences with events in every batch, weighted so that nothing is learned but what uniform draws teach."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rem_atari.replay.buffer import Replay
from rem_atari.replay.sequence_sampler import SequenceSampler

LENGTH, SKIP = 4, 1


def chain(steps: int = 600, chance: float = 0.06, seed: int = 0) -> Replay:
    """Episodes of 2 to 12 steps; action 1 pays with a small chance, action 0 never does."""
    generator = np.random.default_rng(seed)
    replay = Replay((1, 1, 3), steps, seed=seed)
    left = 0
    for _ in range(steps):
        left = left or int(generator.integers(2, 13))
        left -= 1
        action = int(generator.integers(2))
        reward = float(action == 1 and generator.random() < chance)
        # A third of the episodes is cut short, which is no event.
        terminated = left == 0 and generator.random() < 2 / 3
        frame = np.zeros((1, 1, 3), dtype=np.uint8)
        replay.append(0, frame, action, reward, terminated, left == 0 and not terminated)
    return replay


def sampler_of(replay: Replay, share: float) -> SequenceSampler:
    sampler = SequenceSampler(replay, LENGTH, skip=SKIP, event_share=share)
    sampler.refresh()
    return sampler


def counted(batch) -> torch.Tensor:
    """The steps that carry a loss."""
    mask = batch.mask.clone()
    mask[:, :SKIP] = False
    return mask


def test_every_batch_holds_its_share_of_rewards_and_of_ends():
    sampler = sampler_of(chain(chance=0.02), 0.5)
    for _ in range(20):
        batch, weights = sampler.draw(16)
        pays = ((batch.rewards != 0) & counted(batch)).any(dim=1)
        ends = (batch.ended & counted(batch)).any(dim=1) & ~pays
        # A quarter of the batch each, and their part of the other half.
        assert 4 <= pays.sum() <= 6
        assert 4 <= ends.sum() <= 9
        assert weights[pays].max() < weights[ends].min() < 1 < weights[~pays & ~ends].min()
        assert weights.max() <= 1 / (1 - 0.5)


def every_sequence(replay: Replay):
    return replay.sequences_at(replay.sequence_starts(SKIP + 1), LENGTH)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_learned_chance_of_a_reward_is_the_real_one(share):
    """The weighted share of rewards, which is what a model that minimises the weighted loss foretells."""
    replay = chain()
    sampler = sampler_of(replay, share)
    batches = [sampler.draw(16) for _ in range(1500)]
    wanted = every_sequence(replay)
    real = counted(wanted)
    for action in (0, 1):
        seen = paid = unweighted = 0.0
        for batch, weights in batches:
            steps = counted(batch) & (batch.actions == action)
            seen += float((steps * weights[:, None]).sum())
            paid += float((steps * weights[:, None] * batch.rewards).sum())
            unweighted += float((steps * batch.rewards).sum()) / (16 * 1500)
        chance = float(wanted.rewards[real & (wanted.actions == action)].mean())
        assert paid / seen == pytest.approx(chance, rel=0.08)
        if action == 1:
            assert unweighted > 1.5 * float((wanted.rewards * real).sum() / len(real)), "or it proves nothing"


def test_the_expected_gradient_is_that_of_uniform_draws():
    """Of a model with one logit for each action, at a place where it is wrong."""
    replay = chain()
    logits = torch.tensor([0.3, -1.0], requires_grad=True)

    def gradient(batch, weights) -> torch.Tensor:
        steps = counted(batch).float() * weights[:, None]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits[batch.actions], (batch.rewards > 0).float(), reduction="none"
        )
        return torch.autograd.grad((losses * steps).sum(), logits)[0] / len(batch.mask)

    wanted = every_sequence(replay)
    exact = gradient(wanted, torch.ones(len(wanted.mask)))
    sampler = sampler_of(replay, 0.6)
    drawn = torch.stack([gradient(*sampler.draw(16)) for _ in range(1500)])
    error = drawn.std(dim=0) / 1500**0.5
    assert ((drawn.mean(dim=0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("events", [0.0, 1.0])
def test_where_all_sequences_are_alike_draws_are_uniform(events):
    replay = chain()
    replay._rows.rewards[:] = events
    replay._rows.terminated[:] = False
    _, weights = sampler_of(replay, 0.5).draw(6)
    assert weights.tolist() == [1.0] * 6


def test_a_sequence_starts_wherever_enough_steps_follow():
    replay = chain()
    starts = replay.sequence_starts(3)
    drawn = replay.sample_sequences(5000, LENGTH, min_real=3).rows[:, 0].unique()
    assert starts.tolist() == drawn.tolist()


def test_without_a_share_draws_are_those_of_the_replay():
    first, second = chain(), chain()
    batch, weights = sampler_of(first, 0.0).draw(5)
    assert weights is None
    assert torch.equal(batch.rows, second.sample_sequences(5, LENGTH, min_real=SKIP + 1).rows)


def test_draws_are_allotted_by_chance_as_evenly_as_can_be():
    replay, chances = chain(), np.array([0.05, 0.0, 0.62, 0.33])
    counts = np.array([replay.allot(10, chances) for _ in range(2000)])
    assert (counts.sum(axis=1) == 10).all()
    assert (np.abs(counts - 10 * chances) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0), 10 * chances, atol=0.05)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_its_range_is_refused(share):
    with pytest.raises(ValueError, match="wanted 0 <= event_share < 1"):
        SequenceSampler(chain(), LENGTH, skip=SKIP, event_share=share)


def test_to_draw_before_looking_is_refused():
    with pytest.raises(ValueError, match=r"call refresh\(\) first"):
        SequenceSampler(chain(), LENGTH, skip=SKIP, event_share=0.5).draw(3)


def by_losses(replay: Replay, share: float, event_share: float = 0.0) -> SequenceSampler:
    sampler = SequenceSampler(replay, LENGTH, skip=SKIP, event_share=event_share, priority_share=share)
    sampler.refresh()
    return sampler


def note(sampler: SequenceSampler, replay: Replay, starts: np.ndarray, losses: np.ndarray) -> None:
    sampler.note(replay.sequences_at(starts, LENGTH), torch.from_numpy(losses.astype(np.float32)))


def test_a_share_is_drawn_by_the_softmax_of_the_losses():
    replay = chain(steps=60)
    sampler, starts = by_losses(replay, 1.0), replay.sequence_starts(SKIP + 1)
    losses = np.linspace(0, 3, len(starts))
    note(sampler, replay, starts, losses)
    batch, weights = sampler.draw(40_000)
    counts = np.bincount(batch.rows[:, 0].numpy(), minlength=60)[starts]
    wanted = np.exp(losses) / np.exp(losses).sum()
    np.testing.assert_allclose(counts / 40_000, wanted, atol=0.005)
    assert (weights == 1).all()


def test_new_sequences_count_as_the_worst():
    replay = chain(steps=60)
    sampler, starts = by_losses(replay, 1.0), replay.sequence_starts(SKIP + 1)
    note(sampler, replay, starts[2:], np.full(len(starts) - 2, -20.0))
    note(sampler, replay, starts[2:3], np.array([5.0]))
    batch, _ = sampler.draw(3000)
    assert set(batch.rows[:, 0].tolist()) == set(starts[:3].tolist())


def test_the_others_are_drawn_by_their_events():
    replay = chain()
    sampler = by_losses(replay, 0.25, event_share=0.5)
    note(sampler, replay, replay.sequence_starts(SKIP + 1), np.zeros(len(replay.sequence_starts(SKIP + 1))))
    _, weights = sampler.draw(16)
    assert (weights[:4] == 1).all()
    assert (weights[4:] < 1).sum() >= 6


def test_losses_survive_a_checkpoint():
    replay = chain(steps=60)
    first, second = by_losses(replay, 0.5), by_losses(chain(steps=60), 0.5)
    starts = replay.sequence_starts(SKIP + 1)[::3]
    note(first, replay, starts, np.arange(len(starts)))
    second.load_tensors(first.tensors())
    rows = [sampler.draw(50)[0].rows for sampler in (first, second)]
    assert torch.equal(*rows)
