"""The signs that held-out games show: whether rewards are foretold as they come, and whether dreams drift.

A loss in training says little of them: experience is finite and is learned by heart, and a policy finds the
states in which the world model pays too much. Read is what the report measured, the JSON data of `Quality`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rem_atari.report.findings import Finding, findings_of
from rem_atari.report.history import MetricLine, last_value, late, values_of
from rem_atari.report.text import number
from rem_atari.runs.reading import is_number

STUCK_SHARE = 0.8
"""The reward loss counts as stuck above this share of the base rate's loss."""

CALIBRATED = (0.8, 1.25)
"""Rewards foretold for each that comes, within which the world model counts as calibrated."""

FEWEST_EVENTS = 10
"""With fewer rewards in the held-out steps they say nothing of recall and calibration."""

CLEAR_ERRORS = 3.0
"""The imagined return counts as wrong if it is off by more than so many standard errors ..."""

CLEAR_SHARE = 0.25
"""... and by more than this share of the rewards that the game gave."""

MOST_DRIFT = 0.25
"""Dreams count as drifting if a larger share of their frames shows too much or too little of a colour."""

FEWEST_FRAMES = 30
"""Steps with fewer frames to compare are not judged."""


class Judgement(NamedTuple):
    """One part of a finding: whether it is a sign, a sentence, and the figures in it."""

    sign: bool
    says: str
    figures: dict[str, float]


def check_rewards(lines: Sequence[MetricLine], quality: Mapping[str, Any]) -> Finding:
    """Whether the world model foretells rewards as they come.

    Args:
        lines: lines of metrics.jsonl.
        quality: the JSON data of the held-out measurements; empty without any.
    """
    found = findings_of("rewards", "Rewards foretold")
    base = values_of(lines, "world_model", "reward_base")
    if len(base.y) >= 2 and late(base) == 0:
        return found(
            True,
            "The experience that it trains on holds no reward.",
            "There is nothing to learn from yet: raise schedule.random_steps or controller.epsilon, or let"
            " single runs of the game be longer (env.max_raw_frames).",
            {"base_rate": 0.0},
        )
    judged = [_judge_predictions(quality) or _judge_training(lines), _judge_returns(quality)]
    parts = [part for part in judged if part is not None]
    if not parts:
        return found(None, "The world model has left too few figures of its reward loss and the base rate's.")
    advice = (
        "The world model does not foretell rewards as they come, so imagination pays for something else. If"
        " the error on moving pixels is low, train it more (world_model.optim.updates_per_epoch, lr), give it"
        " more context (world_model.context_blocks, sequence_blocks) or more experience"
        " (schedule.random_steps, steps_per_epoch); world_model.event_share shows it more rewards, and"
        " world_model.optim.average steadies its calibration."
    )
    figures = {name: value for part in parts for name, value in part.figures.items()}
    return found(any(part.sign for part in parts), " ".join(part.says for part in parts), advice, figures)


def _judge_predictions(quality: Mapping[str, Any]) -> Judgement | None:
    """Predictions on held-out steps; None where too few rewards came."""
    names = ("steps", "events", "recall", "calibration")
    figures = {name: figure_at(quality, "rewards", name) for name in names}
    figures["held_out_loss"] = figure_at(quality, "rewards", "cross_entropy", "world_model")
    figures["held_out_base_rate"] = figure_at(quality, "rewards", "cross_entropy", "base_rate")
    known = {name: value for name, value in figures.items() if value is not None}
    if len(known) < len(figures) or known["events"] < FEWEST_EVENTS:
        return None
    precision = figure_at(quality, "rewards", "precision")
    right = "" if precision is None else f", and {precision:.0%} of what it foretold came"
    events, calibration = known["events"], known["calibration"]
    says = (
        f"On {known['steps']:,.0f} held-out steps with {events:,.0f} rewards it foretold"
        f" {known['recall']:.0%} of them{right}. Its chances add up to {number(calibration)} rewards for each"
        f" that came. Its loss is {number(known['held_out_loss'])} nats; knowing only how often each sign of"
        f" a reward occurs gives {number(known['held_out_base_rate'])}."
    )
    # Rewards that come with every end, and at no other step, are no test of the loss.
    trivial = quality["rewards"].get("one_outcome") is True
    stuck = not trivial and known["held_out_loss"] > STUCK_SHARE * known["held_out_base_rate"]
    low, high = CALIBRATED
    by_chance = 2 * math.sqrt(events) / events
    wrong = not low <= calibration <= high and abs(calibration - 1) > by_chance
    return Judgement(stuck or wrong, says, known | ({} if precision is None else {"precision": precision}))


def _judge_training(lines: Sequence[MetricLine]) -> Judgement | None:
    """The loss in training, the best there is without held-out rewards; None with too few figures."""
    loss, base = values_of(lines, "world_model", "reward"), values_of(lines, "world_model", "reward_base")
    if len(loss.y) < 2 or len(base.y) < 2:
        return None
    figures = {"loss": late(loss), "base_rate": late(base), "first": loss.y[0]}
    says = (
        f"Judged by the loss in training, for want of held-out rewards: it is {number(figures['loss'])} nats;"
        f" knowing only how often each sign of a reward occurs gives {number(figures['base_rate'])}. In the"
        f" first epoch it was {number(figures['first'])}."
    )
    return Judgement(figures["loss"] > STUCK_SHARE * figures["base_rate"], says, figures)


def _judge_returns(quality: Mapping[str, Any]) -> Judgement | None:
    """What the policy earns in dreams and in the game from the same states; None where it is not known."""
    names = ("steps", "imagined", "real", "standard_error", "size")
    figures = {name: figure_at(quality, "returns", name) for name in names}
    known = {name: value for name, value in figures.items() if value is not None}
    if len(known) < len(figures):
        return None
    gap = abs(known["imagined"] - known["real"])
    wrong = gap > CLEAR_ERRORS * known["standard_error"] and gap > CLEAR_SHARE * known["size"]
    says = (
        f"In {known['steps']:.0f} steps of its dreams the policy earns {number(known['imagined'])}, from the"
        f" same states of the game {number(known['real'])} (standard error of the difference:"
        f" {number(known['standard_error'], 2)})."
    )
    of = {"imagined": "imagined_return", "real": "real_return", "standard_error": "return_error"}
    return Judgement(wrong, says, {of[name]: known[name] for name in of})


def check_dreams(quality: Mapping[str, Any]) -> Finding:
    """Whether imagined frames come to show more or less than the game's.

    Args:
        quality: the JSON data of the held-out measurements; empty without any.
    """
    found = findings_of("dreams", "Drift of dreams")
    steps = _drift_steps(quality)
    if not steps:
        return found(None, "No report has compared dreams with the game yet; rem-atari report does.")
    worst = max(steps, key=lambda step: step["distance"])
    says = (
        f"After {_steps(worst)} at least {worst['distance']:.0%} of the frames show too much or too little of"
        f" a colour (chance alone: {worst['chance']:.0%}); after {_steps(steps[0])} it is"
        f" {steps[0]['distance']:.0%}. Of {worst['colour']} an imagined frame shows"
        f" {number(worst['imagined_pixels'])} pixels, a real one {number(worst['real_pixels'])}"
        f" (none: {worst['imagined_without']:.0%} of the imagined frames, {worst['real_without']:.0%} of the"
        " real ones)."
    )
    advice = (
        "Dreams lose or double what the game shows, so the policy learns in another game. Watch the imagined"
        " films. Lower the loss of the tokens: train the world model more"
        " (world_model.optim.updates_per_epoch), let it see what moves (world_model.local_frames,"
        " controller.context_frames), try world_model.code_network and muon; draw tokens together"
        " (world_model.draw), or dream fewer steps (controller.horizon)."
    )
    figures = {name: value for name, value in worst.items() if name != "colour"}
    return found(worst["distance"] > max(MOST_DRIFT, worst["chance"]), says, advice, figures)


def _drift_steps(quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps at which enough frames were compared, flat, in their order."""
    drift = quality.get("drift")
    listed = drift.get("steps") if isinstance(drift, dict) else None
    steps = [step for step in (listed if isinstance(listed, list) else ()) if isinstance(step, dict)]
    flat = []
    for step in steps:
        figures: dict[str, Any] = {
            name: figure_at(step, name) for name in ("step", "count", "distance", "chance")
        }
        figures |= {
            f"{side}_{name}": figure_at(step, name, side)
            for name in ("pixels", "without")
            for side in ("imagined", "real")
        }
        if None not in figures.values() and figures["count"] >= FEWEST_FRAMES:
            flat.append(figures | {"colour": str(step.get("colour"))})
    return flat


def _steps(step: Mapping[str, float]) -> str:
    return "1 imagined step" if step["step"] == 1 else f"{step['step']:.0f} imagined steps"


def is_of_now(quality: Mapping[str, Any], lines: Sequence[MetricLine]) -> bool:
    """Whether the run has gone no further since the report measured; reports of old name no epoch."""
    now = {name: last_value(lines, name) for name in ("epoch", "env_steps")}
    return all(name not in quality or figure_at(quality, name) == value for name, value in now.items())


def figure_at(data: Mapping[str, Any], *path: str) -> float | None:
    """The number at a path of JSON data; None where there is none."""
    value: Any = data
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if is_number(value) else None
