"""The times of a run's parts, and the projected time of a whole run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from rem_atari.config import Config, OptimConfig
from rem_atari.training.schedule import plan_run, steps_before, steps_in_epoch, updates_in_epoch

COMPONENTS = ("tokenizer", "world_model", "controller")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One part of the work.

    Attributes:
        name: the part's name.
        batch: items processed at once.
        of: what the items are.
        seconds: of each timed repetition.
        memory: peak bytes on the device in these repetitions; None if unknown.
        parts: median seconds of what it consists of, in order; none where it was timed as a whole.
        flops: floating point operations of the matrix products and convolutions in each of `parts`, counted
            in a repetition of its own; none where they cannot be (on a GPU, compiled).
    """

    name: str
    batch: int
    of: str
    seconds: tuple[float, ...]
    memory: int | None
    parts: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """How many of a batch's items a second."""
        return self.batch / self.median

    def share(self, part: str) -> float:
        """The share of one of `parts` in their sum."""
        return self.parts[part] / sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The measurements.

    Attributes:
        config: the configuration asked for, with its whole batches.
        batch_scale: share of a batch that was computed.
        timings: by the parts' names, in order.
        process_memory: the process's peak memory in bytes.
        matrix_rate: on a CPU, floating point operations a second of a product of two square matrices in the
            run's precision, the median of what was measured between the timings; else None.
    """

    config: Config
    batch_scale: float
    timings: dict[str, Timing]
    process_memory: int
    matrix_rate: float | None = None

    @property
    def trained(self) -> list[str]:
        """The components that make updates: a tokenizer of patches makes none."""
        return [name for name in COMPONENTS if name in self.timings]

    @property
    def imagined_alone(self) -> float:
        """Imagined frames a second of the world model's and the controller's steps alone."""
        timing = self.timings["imagine"]
        return timing.batch / timing.parts.get("steps", timing.median)

    def efficiency(self, name: str, part: str) -> float | None:
        """The share of the matrix rate at which a part of a timing computes, where both are known."""
        timing = self.timings[name]
        if self.matrix_rate is None or not timing.flops.get(part):
            return None
        return timing.flops[part] / timing.parts[part] / self.matrix_rate

    @property
    def imagined_in_training(self) -> float:
        """Imagined frames a second of the controller's updates: with burn-in, gradient and step."""
        timing, horizon = self.timings["controller"], self.config.controller.horizon
        return timing.rate * (horizon - 1)

    def project(self) -> dict[str, float]:
        """Seconds of a whole run by part: the schedule's steps and updates times what one takes.

        Updates on a scaled batch count 1 / scale times their seconds. A phase takes no longer than its bound
        on wall time. Evaluations are left out, because the length of a game is not known.
        """
        unit = {
            "collect_random": 1 / self.timings["play at random"].rate,
            "collect": 1 / self.timings["collect"].rate,
        }
        for name in self.trained:
            wanted = optims_of(self.config)[name].batch_size
            unit[name] = self.timings[name].median * wanted / self.timings[name].batch
        seconds = {"collect": 0.0, "encode": expected_encodings(self.config) / self.timings["encode"].rate}
        seconds |= dict.fromkeys(self.trained, 0.0)
        for work in plan_run(self.config):
            if work.phase not in unit or _is_resting(self.config, work.phase, work.epoch):
                continue
            bound = math.inf if work.max_seconds is None else work.max_seconds
            part = "collect" if work.phase == "collect_random" else work.phase
            seconds[part] += min(work.units * unit[work.phase], bound)
        return seconds


def expected_encodings(config: Config) -> float:
    """Frames that a run encodes for the world model and the controller, on average.

    Each frame drawn is encoded once until the tokenizer learns again. Of N stored frames k draws hit
    N (1 - e^(-k/N)) different ones.
    """
    stored, known, total = float(steps_before(config)), 0.0, 0.0
    draws = {
        "world_model": config.world_model.optim.batch_size * config.world_model.sequence_blocks,
        "controller": config.controller.optim.batch_size * (config.controller.burn_in + 1),
    }
    for epoch in range(config.schedule.epochs):
        stored += steps_in_epoch(config, epoch)
        if _updates(config, "tokenizer", epoch) > 0:
            known = 0.0
        drawn = sum(_updates(config, name, epoch) * each for name, each in draws.items())
        new = (stored - known) * -math.expm1(-drawn / stored) if stored > 0 else 0.0
        known += new
        total += new
    return total


def _updates(config: Config, name: str, epoch: int) -> int:
    if _is_resting(config, name, epoch):
        return 0
    optim = optims_of(config)[name]
    return updates_in_epoch(optim, epoch, first=epoch == optim.start_epoch)


def _is_resting(config: Config, name: str, epoch: int) -> bool:
    """Whether it is the tokenizer, at rest: one of patches always is, another once its freeze is due."""
    freeze = config.tokenizer.freeze_epoch
    frozen = freeze is not None and epoch >= freeze
    return name == "tokenizer" and (frozen or config.tokenizer.kind == "patches")


def optims_of(config: Config) -> dict[str, OptimConfig]:
    """Each component's optimiser settings, by its name."""
    return {name: getattr(config, name).optim for name in COMPONENTS}
