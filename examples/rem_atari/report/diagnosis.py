"""Why a run does not learn: signs in metrics.jsonl, in the order in which to look for them.

The order is that of cause and effect. The world model cannot predict what the tokenizer does not see, and the
controller cannot learn what the world model does not predict. So begin with the first sign.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rem_atari.config import Config
from rem_atari.report.history import MetricLine, Series, reward_sizes, values_of
from rem_atari.report.text import number

BLIND_FACTOR = 2.0
"""The tokenizer counts as blind above this multiple of the error at which it may freeze; once its freeze is
due, above that error itself."""

STUCK_SHARE = 0.8
"""The reward loss counts as stuck above this share of the base rate's loss."""

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


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check.

    Attributes:
        check: its name, for scripts.
        title: what it checks.
        sign: whether the sign is there; None if the metrics do not show it (yet).
        says: the figures in a sentence.
        advice: what to try; empty without a sign.
        figures: the same figures by name.
    """

    check: str
    title: str
    sign: bool | None
    says: str
    advice: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


def diagnose(lines: Sequence[MetricLine], config: Config) -> list[Finding]:
    """Run every check, in the order in which to act on them.

    Args:
        lines: lines of metrics.jsonl; the run may still train.
        config: its configuration.
    """
    return [check(lines, config) for check in CHECKS]


def first_sign(findings: Sequence[Finding]) -> Finding | None:
    """The first check that found its sign; begin there."""
    return next((finding for finding in findings if finding.sign), None)


def check_moving_pixels(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether the tokenizer sees what moves: its error on pixels that differ from the median frame."""
    found = _finding("moving_pixels", "Error on moving pixels")
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


def check_reward_loss(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether the world model predicts rewards better than their base rate does."""
    found = _finding("reward_loss", "Reward loss stuck high")
    loss, base = values_of(lines, "world_model", "reward"), values_of(lines, "world_model", "reward_base")
    if len(loss.y) < 2 or len(base.y) < 2:
        return found(None, "The world model has left too few figures of its reward loss and the base rate's.")
    figures = {"loss": _late(loss), "base_rate": _late(base), "first": loss.y[0]}
    if figures["base_rate"] == 0:
        return found(
            True,
            "The experience that it trains on holds no reward.",
            "There is nothing to learn from yet: raise schedule.random_steps or controller.epsilon, or let"
            " single runs of the game be longer (env.max_raw_frames).",
            figures,
        )
    says = (
        f"It is {number(figures['loss'])} nats; knowing only how often each sign of a reward occurs gives"
        f" {number(figures['base_rate'])}. In the first epoch it was {number(figures['first'])}."
    )
    advice = (
        "The world model does not foresee rewards. If the error on moving pixels is low, train it more"
        " (world_model.optim.updates_per_epoch, lr), give it more context (world_model.context_blocks,"
        " sequence_blocks) or more random experience (schedule.random_steps)."
    )
    return found(figures["loss"] > STUCK_SHARE * figures["base_rate"], says, advice, figures)


def check_entropy(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether the policy stopped exploring before it had learned anything in imagination."""
    found = _finding("entropy", "Entropy near zero before the imagined return moves")
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


def check_world_model_loss(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether the world model chases tokens whose meaning changes."""
    found = _finding("world_model_loss", "World-model loss rising")
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
    """Whether a few codes encode all frames."""
    found = _finding("codebook", "Codebook use")
    used = values_of(lines, "tokenizer", "codes_used")
    if config.tokenizer.kind == "patches":
        return found(False, "The codes are patches of pixels: those that differ have codes of their own.")
    if not used.y:
        return found(None, "The tokenizer has left no figures so far.")
    size = config.tokenizer.codebook_size
    figures = {"used": used.y[-1], "size": float(size)}
    advice = (
        "Frames that differ get the same tokens. Start the codes from data (tokenizer.init_from_data),"
        " restart unused ones (tokenizer.restart_dead_codes), or raise tokenizer.commitment_weight."
    )
    says = f"A batch of frames uses {number(used.y[-1])} of {size} codes."
    return found(used.y[-1] < max(2.0, USED_SHARE * size), says, advice, figures)


def check_value_scale(lines: Sequence[MetricLine], config: Config) -> Finding:
    """Whether the critic's errors drown the policy's signal."""
    found = _finding("value_scale", "Value scale")
    value, norm = (values_of(lines, "controller", name) for name in ("value", "grad_norm"))
    if len(value.y) < 2 or not norm.y:
        return found(None, "The controller has left too few figures so far.")
    figures = {
        "error": _late(value) ** 0.5,
        "grad_norm": _late(norm),
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
    found = _finding("reward_sizes", "Rewards of different sizes")
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


CHECKS: tuple[Callable[[Sequence[MetricLine], Config], Finding], ...] = (
    check_moving_pixels,
    check_reward_loss,
    check_entropy,
    check_world_model_loss,
    check_codebook,
    check_value_scale,
    check_reward_sizes,
)
"""The checks, in the order in which to act on them."""


def _finding(check: str, title: str) -> Callable[..., Finding]:
    """Returns a function that makes the findings of one check; advice is only given with a sign."""

    def make(
        sign: bool | None, says: str, advice: str = "", figures: Mapping[str, float] | None = None
    ) -> Finding:
        return Finding(
            check=check,
            title=title,
            sign=sign,
            says=says,
            advice=advice if sign else "",
            figures=figures or {},
        )

    return make


def _late(series: Series) -> float:
    """Mean of the last quarter of a curve's values, of the last one at least."""
    return statistics.fmean(series.y[-max(1, len(series.y) // 4) :])


def _last(series: Series) -> float:
    """A curve's last value; 0 without any."""
    return series.y[-1] if series.y else 0.0
