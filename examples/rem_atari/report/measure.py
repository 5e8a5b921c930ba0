"""Runs the trained networks on held-out steps, and collects the report's measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.films.dreams import Dream, dream_along, dream_freely, make_scenes
from rem_atari.films.pictures import Scene
from rem_atari.models.base_tokenizer import foreground_of
from rem_atari.models.base_world_model import BaseWorldModel
from rem_atari.models.rewards import REWARD_CLASSES, reward_classes
from rem_atari.models.sequence_tokens import SequenceTokens, tokenize
from rem_atari.replay.batch import SequenceBatch
from rem_atari.replay.buffer import Replay
from rem_atari.report.analysis import (
    HorizonErrors,
    StepErrors,
    TokenPredictions,
    TokenScores,
    codebook_use,
    fit_baselines,
    frame_errors,
    has_one_outcome,
    mean_over,
    psnr,
    score_events,
    score_tokens,
    to_signed,
)
from rem_atari.report.drift import Drift, compare_colours
from rem_atari.report.quality import DreamReturns, FrameQuality, PredictionQuality, Redrawn
from rem_atari.training.actor_critic import before_the_end

HELDOUT_FRAMES, TRAINING_FRAMES = 256, 512
"""Frames drawn for the reconstructions, and for the mean frame."""
HELDOUT_SEQUENCES, TRAINING_SEQUENCES = 128, 128
"""Sequences drawn for the world model, and for the predictors that count."""
DREAM_STARTS, HORIZON_STARTS = 256, 128
"""Starts from which dreams are compared with the game, and those of them whose frames are, step by step."""
SHOWN_FRAMES = 9
"""Reconstructions shown in the page."""
SCENES, SCENE_CANDIDATES, SCENE_STEPS = 4, 64, 12
"""Starts shown, starts they are chosen from, and steps imagined from each."""
NO_REWARD, NO_END = 1, 0
"""Classes of the steps on which nothing happens."""

SEQUENCES_AT_ONCE = 16
"""Sequences in one pass of the world model; bounds the memory of its logits."""


def look_at_frames(agent: Agent, training: Replay, heldout: Replay) -> FrameQuality:
    """Reconstruct held-out frames, and compare with the mean of training frames."""
    frames, before = _draw_frames(heldout)
    tokens = agent.tokenizer.encode(frames)
    redrawn = agent.tokenizer.decode(tokens).numpy()
    masks = {
        "foreground": foreground_of(frames, training.median_frame()).numpy(),
        "moving": foreground_of(frames, before).numpy(),
    }
    mean = training.sample_frames(TRAINING_FRAMES).float().mean(dim=0).round().to(torch.uint8).numpy()
    real = frames.numpy()
    ours = frame_errors(real, redrawn, **masks)
    order = ours.per_frame.argsort(kind="stable")
    shown = order[np.linspace(0, len(order) - 1, min(SHOWN_FRAMES, len(order))).round().astype(int)]
    return FrameQuality(
        redrawn=Redrawn(real[shown], redrawn[shown], [psnr(float(mse)) for mse in ours.per_frame[shown]]),
        count=len(real),
        ours=ours,
        mean_frame=frame_errors(real, mean, **masks),
        codebook=codebook_use(tokens.numpy(), agent.tokenizer.codebook_size),
    )


def _draw_frames(heldout: Replay) -> tuple[Tensor, Tensor]:
    """Held-out frames, and the frame before each; where no episode has two, the frames themselves."""
    count = min(HELDOUT_FRAMES, heldout.num_steps)
    if not heldout.ready(2):
        frames = heldout.sample_frames(count)
        return frames, frames
    pairs = heldout.sample_sequences(count, 2, min_real=2).frames
    return pairs[:, 1], pairs[:, 0]


def look_at_predictions(
    agent: Agent, config: Config, training: Replay, heldout: Replay
) -> PredictionQuality | None:
    """The world model's predictions on held-out sequences beside counting predictors.

    None where no held-out or no training episode is long enough.
    """
    first = _context(config)
    length = config.world_model.sequence_blocks
    if not heldout.ready(first + 1) or not training.ready(2):
        return None
    seen = tokenize(training.sample_sequences(TRAINING_SEQUENCES, length, min_real=2), agent.tokenizer)
    unseen = tokenize(
        heldout.sample_sequences(HELDOUT_SEQUENCES, length, min_real=first + 1), agent.tokenizer
    )
    tokens, rewards, ends = predict_sequences(agent.world_model, agent.tokenizer.codes, unseen, first=first)
    counted = fit_baselines(*token_pairs(seen), agent.tokenizer.codebook_size)
    signs = reward_classes(seen.rewards[seen.mask])[:, None].numpy()
    rates = fit_baselines(signs, signs, REWARD_CLASSES)
    real = unseen.mask[:, first:]
    signs_unseen = unseen.rewards[:, first:][real].sign().long().numpy()
    return PredictionQuality(
        one_outcome=has_one_outcome(signs_unseen, unseen.ended[:, first:][real].numpy()),
        tokens=tokens.score(tokens.predictions),
        unigram=tokens.score(counted.predict_unigram(tokens.target)),
        place_unigram=tokens.score(counted.predict_place_unigram(tokens.target)),
        copy=tokens.score(counted.predict_copy(tokens.target, tokens.previous)),
        copy_weight=counted.copy_weight,
        rewards=rewards.score(rewards.predictions),
        base_rate=rewards.score(rates.predict_unigram(rewards.target)),
        reward_events=score_events(rewards.predictions, rewards.target, NO_REWARD, rewards.previous_chance),
        end_events=score_events(ends.predictions, ends.target, NO_END, ends.previous_chance),
    )


@dataclass(frozen=True)
class Ahead:
    """Dreams from held-out starts beside what the game did there.

    Attributes:
        frames: the game's frames, the start the first of them, uint8 (B, T+1, S, S, 3).
        real: the same as tokens, with actions and rewards.
        along: T imagined steps under the actions that were really taken.
        free: T imagined steps in which the controller acts, as it did in the game.
    """

    frames: Tensor
    real: SequenceTokens
    along: Dream
    free: Dream


@torch.no_grad()
def dream_ahead(agent: Agent, config: Config, heldout: Replay) -> Ahead | None:
    """Dreams over the controller's horizon; None where no held-out episode shows what follows a start.

    They begin as those that the controller learns from, after `controller.context_frames` real frames.
    """
    context = _dream_context(config)
    if not heldout.ready(context + 2):
        return None
    # The horizon counts observations, the one it starts from included. Starts are not chosen for what
    # follows, or the game would never end at a first step, as dreams do.
    length = context + config.controller.horizon
    batch = heldout.sample_sequences(DREAM_STARTS, length, min_real=context + 1)
    tokens = tokenize(batch, agent.tokenizer)
    generator = torch.Generator(tokens.tokens.device).manual_seed(0)
    return Ahead(
        batch.frames[:, context:],
        tokens.since(context),
        along=dream_along(agent, tokens, context, generator),
        free=dream_freely(agent, tokens, context, config.evaluation.temperature, generator),
    )


def look_at_horizon(agent: Agent, ahead: Ahead) -> HorizonErrors | None:
    """Imagined frames beside real ones, over the controller's horizon; None without a real one."""
    rows = slice(HORIZON_STARTS)
    real = ahead.real.select(rows)
    errors = list(_errors(agent, ahead.frames[rows], real.tokens, real.mask, ahead.along.tokens[rows]))
    return HorizonErrors(len(real.tokens), errors) if errors else None


def look_at_drift(agent: Agent, ahead: Ahead) -> Drift | None:
    """How much imagined frames show of each colour beside real ones; None without a frame to compare.

    Only starts whose episode goes on, in the game and in the dream, are compared at a step.
    """
    imagined, real = ahead.along.tokens, ahead.real
    goes_on = (ahead.along.ended.cumsum(dim=1) == 0) & real.mask[:, 1:]
    horizon = goes_on.shape[1]
    found = []
    for step in sorted({2**power for power in range(horizon.bit_length())} | {horizon}):
        rows = goes_on[:, step - 1]
        if rows.any():
            frames = (
                agent.tokenizer.decode(each[rows, step]).cpu().numpy() for each in (imagined, real.tokens)
            )
            found.append(compare_colours(*frames, step=step))
    return Drift(len(imagined), found) if found else None


def look_at_returns(ahead: Ahead, config: Config) -> DreamReturns:
    """What the controller earns in its dreams beside what it earned in the game from the same states."""
    real, steps = ahead.real, ahead.free.rewards.shape[1]
    happened = real.mask[:, :steps]
    # Nothing is earned after the end of an episode; after its truncation it is unknown.
    known = happened | (real.ended[:, :steps].cumsum(dim=1) > 0)
    earned = real.rewards[:, :steps] if config.world_model.reward_bins > 0 else real.rewards[:, :steps].sign()
    earned = earned * happened
    dreamt = ahead.free.rewards * before_the_end(ahead.free.ended) * known
    gaps = (dreamt - earned).sum(dim=1)
    return DreamReturns(
        steps=steps,
        imagined=float(dreamt.sum(dim=1).mean()),
        real=float(earned.sum(dim=1).mean()),
        standard_error=float(gaps.std() / len(gaps) ** 0.5),
        size=float(earned.abs().sum(dim=1).mean()),
    )


def imagine_scenes(agent: Agent, config: Config, heldout: Replay, action_names: Sequence[str]) -> list[Scene]:
    """Films imagined from held-out starts; empty where no held-out episode is long enough.

    In the first half of the starts, as many as possible are followed by a reward or an end; the others are
    drawn uniformly.
    """
    context = _dream_context(config)
    length = context + 1 + SCENE_STEPS
    real = next((steps for steps in range(length, context + 1, -1) if heldout.ready(steps)), None)
    if real is None:
        return []
    batch = _choose(heldout.sample_sequences(SCENE_CANDIDATES, length, min_real=real), context)
    return make_scenes(
        agent,
        batch.frames,
        tokenize(batch, agent.tokenizer),
        context=context,
        action_names=action_names,
        temperature=config.evaluation.temperature,
        seed=0,
    )


def _context(config: Config) -> int:
    """Steps that only give context: those without loss in training, at least one."""
    return max(1, config.world_model.context_blocks)


def _dream_context(config: Config) -> int:
    """Real steps before an imagined one: as many as before those that the controller learns from."""
    return max(1, config.controller.context_frames)


def _choose(batch: SequenceBatch, context: int) -> SequenceBatch:
    """SCENES of the candidates: eventful ones for the first half, then the first of the rest."""
    happens = ((batch.rewards != 0) | batch.ended)[:, context:].any(dim=1)
    eventful = happens.nonzero().flatten().tolist()[: SCENES // 2]
    others = [row for row in range(len(happens)) if row not in eventful]
    return batch.select(eventful + others[: SCENES - len(eventful)])


@dataclass(frozen=True)
class Evidence:
    """Predictions beside the outcomes.

    Attributes:
        predictions: the world model's, (N, K).
        target: the outcomes, (N, K).
        previous: the earlier values, against which changes are counted, (N, K).
        previous_chance: the world model's probability of the earlier value, (N, K).
    """

    predictions: TokenPredictions
    target: NDArray[np.int64]
    previous: NDArray[np.int64]
    previous_chance: NDArray[np.float64]

    def score(self, predictions: TokenPredictions) -> TokenScores:
        """The scores of the given predictions against the outcomes."""
        return score_tokens(predictions, self.target, self.previous)


def token_pairs(batch: SequenceTokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of frames and of the frame before each, (N, K) both, wherever a sequence has two in a row."""
    follows = batch.mask[:, 1:] & batch.mask[:, :-1]
    return batch.tokens[:, 1:][follows].cpu().numpy(), batch.tokens[:, :-1][follows].cpu().numpy()


@torch.no_grad()
def predict_sequences(
    world_model: BaseWorldModel, codebook: Tensor, batch: SequenceTokens, *, first: int
) -> tuple[Evidence, Evidence, Evidence]:
    """The world model's predictions of next frames, rewards and ends, given the real past.

    With `world_model.draw` groups a token is also given its neighbours of earlier groups, see
    `GroupedWorldModel`.

    Args:
        world_model: in eval mode.
        codebook: the tokenizer's codes, (V, E).
        batch: held-out sequences of more than `first` steps, padding on the right.
        first: steps before this one only give context; at least 1, since a first frame has none before it.
    Returns:
        Evidence for tokens (N, K); for reward classes (N, 1), whose "previous" is the class of no reward; and
        for ends (M, 1), whose "previous" is no end, without steps after which an episode was cut short.
    """
    tokens: list[Evidence] = []
    rewards: list[Evidence] = []
    ends: list[Evidence] = []
    for part in _parts(batch):
        logits = world_model(part.tokens, part.actions, codebook, skip_blocks=first)
        real = part.mask[:, first:]
        target = part.tokens[:, first:][real]
        tokens.append(_evidence(logits.tokens[real], target, part.tokens[:, first - 1 : -1][real]))
        signs = reward_classes(part.rewards[:, first:][real])[:, None]
        said = world_model.reward_code.sign_logits(logits.rewards[real])
        rewards.append(_evidence(said[:, None], signs, torch.ones_like(signs)))
        known = real & ~(part.truncated & ~part.ended)[:, first:]
        ended = part.ended[:, first:][known].long()[:, None]
        ends.append(_evidence(logits.ends[known][:, None], ended, torch.zeros_like(ended)))
    return _join(tokens), _join(rewards), _join(ends)


def _parts(batch: SequenceTokens) -> Iterator[SequenceTokens]:
    """The batch, SEQUENCES_AT_ONCE sequences at a time."""
    for start in range(0, batch.tokens.shape[0], SEQUENCES_AT_ONCE):
        yield batch.select(slice(start, start + SEQUENCES_AT_ONCE))


def _evidence(logits: Tensor, target: Tensor, previous: Tensor) -> Evidence:
    """Evidence from logits (N, K, V) and targets (N, K)."""
    chances = functional.log_softmax(logits.double(), dim=-1)
    log_prob, stays = (chances.gather(-1, each[..., None])[..., 0] for each in (target, previous))
    predictions = TokenPredictions(log_prob.cpu().numpy(), logits.argmax(dim=-1).cpu().numpy())
    return Evidence(predictions, target.cpu().numpy(), previous.cpu().numpy(), stays.exp().cpu().numpy())


def _join(parts: Sequence[Evidence]) -> Evidence:
    return Evidence(
        TokenPredictions(
            np.concatenate([part.predictions.log_prob for part in parts]),
            np.concatenate([part.predictions.choice for part in parts]),
        ),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.previous for part in parts]),
        np.concatenate([part.previous_chance for part in parts]),
    )


def _errors(
    agent: Agent, frames: Tensor, tokens: Tensor, real: Tensor, imagined: Tensor
) -> Iterator[StepErrors]:
    """Errors after each step that has real frames; all arguments begin with the start, (B, T, ...)."""
    for step in range(1, frames.shape[1]):
        rows = real[:, step]
        if not rows.any():
            return
        start, wanted = frames[rows, 0], frames[rows, step]
        moving = foreground_of(wanted, start).numpy()
        imagined_errors = _squared(agent.tokenizer.decode(imagined[rows, step]), wanted)
        copied_errors = _squared(start, wanted)
        yield StepErrors(
            step=step,
            count=int(rows.sum()),
            imagined=float(imagined_errors.mean(dtype=np.float64)),
            copied=float(copied_errors.mean(dtype=np.float64)),
            redrawn=float(
                _squared(agent.tokenizer.decode(tokens[rows, step]), wanted).mean(dtype=np.float64)
            ),
            imagined_moving=mean_over(imagined_errors, moving),
            copied_moving=mean_over(copied_errors, moving),
        )


def _squared(frames: Tensor, wanted: Tensor) -> np.ndarray:
    """Squared errors of uint8 frames (N, S, S, 3) in [-1, 1]."""
    return (to_signed(frames.cpu().numpy()) - to_signed(wanted.cpu().numpy())) ** 2
