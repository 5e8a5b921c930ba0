"""Shows the trained networks held-out frames, and gathers what the report says about them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.models.sequence_tokens import tokenize
from rem_atari.models.tokenizer import foreground_of
from rem_atari.models.world_model import REWARD_CLASSES, reward_classes
from rem_atari.replay.buffer import Replay, SequenceBatch
from rem_atari.report.analysis import codebook_use, fit_baselines, frame_errors, psnr, score_events
from rem_atari.report.dreams import make_scenes
from rem_atari.report.films import Scene
from rem_atari.report.horizon import HorizonErrors, look_ahead
from rem_atari.report.probe import predict_sequences, token_pairs
from rem_atari.report.quality import FrameQuality, PredictionQuality, Redrawn

HELDOUT_FRAMES, TRAINING_FRAMES = 256, 512
"""Frames drawn for the reconstructions, and for the mean frame."""
HELDOUT_SEQUENCES, TRAINING_SEQUENCES = 128, 128
"""Sequences drawn for the world model, and for the predictors that count."""
HORIZON_STARTS = 128
"""Starts from which imagination is compared with the game, step by step."""
SHOWN_FRAMES = 9
"""Reconstructions shown in the page."""
SCENES, SCENE_CANDIDATES, SCENE_STEPS = 4, 64, 12
"""Starts shown, starts they are chosen from, and steps imagined from each."""
NO_REWARD, NO_END = 1, 0
"""Classes of the steps on which nothing happens."""


def look_at_frames(agent: Agent, training: Replay, heldout: Replay) -> FrameQuality:
    """Reconstruct held-out frames, beside the mean of training frames."""
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
    """The world model's predictions on held-out sequences beside predictors that count.

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
    return PredictionQuality(
        tokens=tokens.score(tokens.predictions),
        unigram=tokens.score(counted.predict_unigram(tokens.target)),
        place_unigram=tokens.score(counted.predict_place_unigram(tokens.target)),
        copy=tokens.score(counted.predict_copy(tokens.target, tokens.previous)),
        copy_weight=counted.copy_weight,
        rewards=rewards.score(rewards.predictions),
        base_rate=rewards.score(rates.predict_unigram(rewards.target)),
        reward_events=score_events(rewards.predictions, rewards.target, NO_REWARD),
        end_events=score_events(ends.predictions, ends.target, NO_END),
    )


def look_at_horizon(agent: Agent, config: Config, heldout: Replay) -> HorizonErrors | None:
    """Imagined frames beside real ones, over the controller's horizon; None where no episode is so long."""
    context = _context(config)
    if not heldout.ready(context + 2):
        return None
    # The horizon counts observations, the one it starts from included.
    batch = heldout.sample_sequences(
        HORIZON_STARTS, context + config.controller.horizon, min_real=context + 2
    )
    return look_ahead(agent, batch.frames, tokenize(batch, agent.tokenizer), context=context, seed=0)


def imagine_scenes(agent: Agent, config: Config, heldout: Replay, action_names: Sequence[str]) -> list[Scene]:
    """Films imagined from held-out starts; empty where no held-out episode is long enough.

    As many as possible of the first half of the starts are ones that a reward or an end follows; the others
    are drawn uniformly.
    """
    context = _context(config)
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
    """Steps that give context alone: those without loss in training, and at least one."""
    return max(1, config.world_model.context_blocks)


def _choose(batch: SequenceBatch, context: int) -> SequenceBatch:
    """SCENES of the candidates: eventful ones for the first half, then the first of the rest."""
    happens = ((batch.rewards != 0) | batch.ended)[:, context:].any(dim=1)
    eventful = happens.nonzero().flatten().tolist()[: SCENES // 2]
    others = [row for row in range(len(happens)) if row not in eventful]
    return batch.select(eventful + others[: SCENES - len(eventful)])
