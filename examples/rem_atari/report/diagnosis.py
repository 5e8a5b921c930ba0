"""Why a run does not learn: signs in its metrics and in what the report measured on held-out games, in the
order in which to look for them.

The order is that of cause and effect. The world model cannot predict what the tokenizer does not see, and the
controller cannot learn what the world model does not predict. So begin with the first sign.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rem_atari.config import Config, TokenizerConfig
from rem_atari.report.findings import Finding, findings_of
from rem_atari.report.heldout_signs import check_dreams, check_rewards
from rem_atari.report.history import MetricLine, Series, late, reward_sizes, values_of
from rem_atari.report.text import number

BLIND_FACTOR = 2.0
"""The tokenizer counts as blind above this multiple of the error at which it may freeze; once its freeze is
due, above that error itself."""

COLLAPSED_SHARE = 0.1
"""The entropy counts as near zero below this share of the highest that the run has shown."""

MOVED_NOISES = 3.0
"""The imagined return counts as moved beyond this multiple of its typical change from epoch to epoch."""

RISEN_FACTOR = 1.15
"""The world model's loss counts as rising above this multiple of its lowest."""

LEAST_RISE = 0.1
"""Nats that the loss must also have risen, because a loss near zero multiplies by chance."""

USED_SHARE = 0.1
"""The codebook counts as collapsed when a batch uses a smaller share of its codes."""

LEAST_COVERED = 0.98
"""A codebook of patches counts as too small where a smaller share of new patches has a code."""

CLIPPED_FACTOR = 2.0
"""The value's scale counts as too large with gradients of this multiple of the clipping norm."""

SAME_SIZE = 1.001
"""Rewards count as equally large up to this ratio."""

WINDOW = 3
"""Epochs averaged before a curve's lowest and its present height are compared."""


def diagnose(
    lines: Sequence[MetricLine], config: Config, quality: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Run every check, in the order in which to act on them.

    Args:
        lines: lines of metrics.jsonl; the run may still train.
        config: its configuration.
        quality: the JSON data of what was measured on held-out games (`Quality.to_dict`); None: nothing was.
    """
    held_out = quality or {}
    return [
        check_moving_pixels(lines, config),
        check_rewards(lines, held_out),
        check_dreams(held_out),
        check_entropy(lines),
        check_world_model_loss(lines),
        check_codebook(lines, config),
        check_value_scale(lines, config),
        check_reward_sizes(lines, config),
    ]


def check_moving_pixels(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether the tokenizer sees what moves: its error on pixels that differ from the median frame."""
    found = findings_of("moving_pixels", "Error on moving pixels")
    learned = config.tokenizer.kind != "patches"
    if not learned and not config.tokenizer.patch_means:
        return _check_patches(found, lines, config)
    errors = values_of(lines, "tokenizer", "foreground_error")
    limit = config.tokenizer.freeze_foreground_error
    if len(errors.y) < 2:
        return found(None, "The tokenizer has left too few figures so far.")
    # Patches are frozen from the start.
    frozen = learned and _last(values_of(lines, "tokenizer", "frozen")) > 0
    # Its first epoch begins with an untrained tokenizer.
    error = statistics.fmean(errors.y[1:][-WINDOW:])
    freeze = config.tokenizer.freeze_epoch
    due = freeze is not None and errors.x[-1] >= freeze
    bound = limit if due else BLIND_FACTOR * limit
    figures = {"error": error, "epoch": errors.x[-1] + 1, "limit": bound, "frozen": float(frozen)}
    granted = "; it has been found good enough to rest" if frozen else ""
    says = (
        f"It was {number(error)} up to epoch {figures['epoch']:.0f}, the last in which the tokenizer saw"
        f" frames (mean of up to {WINDOW} epochs; limit {number(bound)}){granted}."
    )
    more = "Raise tokenizer.foreground_weight or tokenizer.optim.updates_per_epoch (first_updates)"
    more = more if learned else "Raise tokenizer.codebook_size"
    advice = (
        f"The tokenizer does not see the objects, so nothing behind it can. {more}, or give it more pixels or"
        " tokens (env.frame_size, tokenizer.channels); look at the reconstructions in the report."
    )
    return found(error > bound and not frozen, says, advice, figures)


def _check_patches(found: Callable[..., Finding], lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether a growing codebook has room for the patches of new frames."""
    covered, codes = values_of(lines, "tokenizer", "covered"), values_of(lines, "tokenizer", "codes")
    if not covered.y:
        return found(None, "The tokenizer has left no figures so far.")
    share, size = statistics.fmean(covered.y[-WINDOW:]), codes.y[-1]
    bound = config.tokenizer.codebook_size
    says = (
        f"Of the patches of new frames {share:.1%} had a code (mean of up to {WINDOW} epochs);"
        f" {size:.0f} of {bound} codes are taken."
    )
    advice = (
        "The codebook is full, and patches that have no code are drawn as others. Raise"
        " tokenizer.codebook_size or tokenizer.patch_threshold, or make patches smaller (tokenizer.channels)."
    )
    figures = {"covered": share, "codes": size, "size": float(bound)}
    return found(share < LEAST_COVERED, says, advice, figures)


def check_entropy(lines: Sequence[MetricLine]) -> Finding:
    """Whether the policy stopped exploring before it had learned anything in imagination."""
    found = findings_of("entropy", "Entropy near zero before the imagined return moves")
    entropy, gained = (values_of(lines, "controller", name) for name in ("entropy", "imagined_return"))
    if len(entropy.y) < 2 or len(gained.y) != len(entropy.y):
        return found(None, "The controller has left too few figures so far.")
    # Random play has the highest possible entropy.
    highest = max(entropy.y + values_of(lines, "collect_random", "entropy").y)
    figures = {"entropy": entropy.y[-1], "highest": highest, "imagined_return": gained.y[-1]}
    low = next((at for at, value in enumerate(entropy.y) if value < COLLAPSED_SHARE * highest), None)
    if low is None:
        return found(
            False,
            f"It is {number(entropy.y[-1])} nats; at its highest it was {number(highest)}.",
            "",
            figures,
        )
    noise = statistics.median(
        abs(after - before) for before, after in zip(gained.y, gained.y[1:], strict=False)
    )
    gain = gained.y[low] - gained.y[0]
    figures |= {"epoch": entropy.x[low] + 1, "gain": gain, "noise": noise}
    says = (
        f"It fell to {number(entropy.y[low])} nats in epoch {figures['epoch']:.0f} (highest:"
        f" {number(highest)}). By then the imagined return had risen by {number(gain)}; from epoch to epoch"
        f" it changes by {number(noise)}."
    )
    advice = (
        "The policy stopped exploring before it had anything to prefer. Raise controller.entropy_weight, let"
        " the controller start later (controller.optim.start_epoch), when the world model knows rewards, or"
        " lower controller.optim.lr."
    )
    return found(gain <= MOVED_NOISES * noise, says, advice, figures)


def check_world_model_loss(lines: Sequence[MetricLine]) -> Finding:
    """Whether the world model chases tokens whose meaning changes."""
    found = findings_of("world_model_loss", "World-model loss rising")
    loss = values_of(lines, "world_model", "tokens")
    means = [statistics.fmean(loss.y[at : at + WINDOW]) for at in range(len(loss.y) - WINDOW + 1)]
    if len(means) < WINDOW:
        return found(None, "The world model has left too few figures so far.")
    lowest = min(range(len(means)), key=means.__getitem__)
    moving = _last(values_of(lines, "tokenizer", "updates")) > 0
    epoch = loss.x[lowest + WINDOW - 1] + 1
    figures = {"loss": means[-1], "lowest": means[lowest], "epoch": epoch, "tokenizer_trains": float(moving)}
    says = (
        f"The loss of the tokens is {number(means[-1])} nats (mean of {WINDOW} epochs); at its lowest, up to"
        f" epoch {epoch:.0f}, it was {number(means[lowest])}. The tokenizer"
        f" {'still trains' if moving else 'rests'}."
    )
    advice = (
        "Tokens change their meaning while the tokenizer trains. Let it rest earlier (tokenizer.freeze_epoch,"
        " with freeze_foreground_error as the guard) or train it less (tokenizer.optim.updates_per_epoch,"
        " lr)."
        if moving
        else "The tokenizer is not the cause: the game shows what it did not show before. Train the world"
        " model more (world_model.optim.updates_per_epoch), and see whether the frozen tokenizer keeps what"
        " is new (the report's reconstructions)."
    )
    risen = means[-1] > max(RISEN_FACTOR * means[lowest], means[lowest] + LEAST_RISE)
    return found(risen, says, advice, figures)


def check_codebook(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether frames that differ share a few codes; what that means depends on the kind of tokenizer."""
    found = findings_of("codebook", "Codebook use")
    tokenizer = config.tokenizer
    if tokenizer.kind == "patches" and not tokenizer.patch_means:
        apart = "" if tokenizer.patch_threshold == 0 else " by more than tokenizer.patch_threshold"
        return found(
            False,
            f"The codes are patches of pixels: those that differ{apart} have codes of their own as long as"
            " there is room, which the first check looks at.",
        )
    in_batches = values_of(lines, "tokenizer", "codes_used").y
    if not in_batches:
        return found(None, "The tokenizer has left no figures so far.")
    used = in_batches[-1]
    size, least, advice = _codes_wanted(tokenizer)
    figures = {"used": used, "size": float(size), "least": least}
    says = f"A batch of frames uses {number(used)} of {size} codes; fewer than {number(least)} are a sign."
    return found(used < least, says, f"Frames that differ get the same tokens. {advice}", figures)


def _codes_wanted(tokenizer: TokenizerConfig) -> tuple[int, float, str]:
    """The number of codes, the fewest that a batch should use, and what to do where it uses fewer."""
    size, least = tokenizer.codebook_size, max(2.0, USED_SHARE * tokenizer.codebook_size)
    if tokenizer.kind == "fsq":
        # Codes are combinations and none can die. With fewer than this, one number would do for all.
        size, least = math.prod(tokenizer.fsq_levels), float(max(tokenizer.fsq_levels))
        advice = (
            "The encoder's outputs hardly vary: train it more (tokenizer.optim.updates_per_epoch, lr), or"
            " raise tokenizer.foreground_weight."
        )
    elif tokenizer.kind == "patches":
        advice = (
            "The codes are means of the patches of the first epoch's frames and never change, and the game"
            " now shows others: collect more before that epoch (schedule.random_steps)."
        )
    else:
        advice = (
            "Start the codes from data (tokenizer.init_from_data), restart unused ones"
            " (tokenizer.restart_dead_codes), or raise tokenizer.commitment_weight."
        )
    return size, least, advice


def check_value_scale(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether the critic's errors drown the policy's signal."""
    found = findings_of("value_scale", "Value scale")
    value, norm = (values_of(lines, "controller", name) for name in ("value", "grad_norm"))
    if len(value.y) < 2 or not norm.y:
        return found(None, "The controller has left too few figures so far.")
    figures = {
        "error": late(value) ** 0.5,
        "grad_norm": late(norm),
        "clip_norm": config.controller.optim.clip_norm,
    }
    says = (
        f"The value is off by {number(figures['error'])} (root of its mean squared error; a reward is 1), and"
        f" the controller's gradient has a norm of {number(figures['grad_norm'])}, clipped to"
        f" {number(figures['clip_norm'])}."
    )
    advice = (
        "The value's error fills the gradient, and clipping leaves little of the policy's. Lower"
        " controller.gamma or horizon, so that returns are smaller, or raise controller.optim.clip_norm; with"
        " dense rewards look whether the value loss falls at all (controller.optim.lr)."
    )
    too_large = figures["error"] > 1 and figures["grad_norm"] > CLIPPED_FACTOR * figures["clip_norm"]
    return found(too_large, says, advice, figures)


def check_reward_sizes(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether rewards differ in size, which a world model of reward signs does not learn."""
    found = findings_of("reward_sizes", "Rewards of different sizes")
    sizes = reward_sizes(lines)
    if sizes is None:
        return found(None, "No reward has been seen so far, or the run did not note how large they are.")
    smallest, largest = sizes
    figures = {"smallest": smallest, "largest": largest}
    if largest <= SAME_SIZE * smallest:
        return found(False, f"Every reward that is not 0 has the size {number(largest)}.", "", figures)
    says = f"Those that are not 0 are from {number(smallest)} to {number(largest)} in size"
    if config.world_model.reward_bins > 0:
        return found(False, f"{says}, and the world model learns their sizes.", "", figures)
    advice = (
        "The agent takes the smallest reward for as good as the largest, and may prefer what pays little but"
        " surely. Let the world model learn sizes (world_model.reward_bins and controller.value_bins 255), or"
        " give rewards of one size for what really counts by a wrapper (env.wrapper)."
    )
    return found(True, f"{says}, and the world model learns their signs alone.", advice, figures)


def _last(series: Series) -> float:
    """A curve's last value; 0 without any."""
    return series.y[-1] if series.y else 0.0
