"""How long the parts of a run take on this machine, and what that makes of a whole run."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch

from rem_atari.config import Config, OptimConfig
from rem_atari.errors import RunError, UsageError
from rem_atari.imagination import ImaginedEnv
from rem_atari.models.lpips import expected_shapes
from rem_atari.replay import Replay
from rem_atari.rollout import rollout
from rem_atari.training.assembly import assemble
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.run_state import RunState
from rem_atari.training.schedule import plan_run, steps_in_epoch, updates_in_epoch
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import prepare_training
from rem_atari.weights import find_weights

COMPONENTS = ("tokenizer", "world_model", "controller")

FILL_STEPS, MOST_FILL_STEPS = 600, 20_000
"""Steps played at random to have something to train on, and the bound where episodes are too short for it."""

PLAY_STEPS = 50
"""Steps of play that are timed."""

ENCODED = 256
"""Frames that are encoded to time it."""

COVERING = 8
"""Draws for each stored frame after which all but one in e^8 have their tokens."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One part of the work.

    Attributes:
        name: what is done.
        batch: how many of what is done at once.
        of: what these are.
        seconds: of each repetition that was timed.
        memory: bytes at most on the device in these repetitions; None where that is not known.
    """

    name: str
    batch: int
    of: str
    seconds: tuple[float, ...]
    memory: int | None

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """How many of a batch's items a second."""
        return self.batch / self.median


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured.

    Attributes:
        config: the configuration asked for, with its whole batches.
        batch_scale: share of a batch that was computed.
        timings: by the parts' names, in order.
        process_memory: bytes at most that the process had in memory, everything included.
    """

    config: Config
    batch_scale: float
    timings: dict[str, Timing]
    process_memory: int

    @property
    def imagined_in_training(self) -> float:
        """Imagined frames a second of the controller's updates: with burn-in, gradient and step."""
        timing, horizon = self.timings["controller"], self.config.controller.horizon
        return timing.rate * (horizon - 1)

    def project(self) -> dict[str, float]:
        """Seconds of a whole run by part: the schedule's steps and updates times what one takes.

        Updates on a scaled batch count 1 / scale times their seconds. A phase takes no longer than its bound
        on wall time. Evaluations are left out: how long a game lasts is not known.
        """
        unit = {
            "collect_random": 1 / self.timings["play at random"].rate,
            "collect": 1 / self.timings["collect"].rate,
        }
        for name in COMPONENTS:
            wanted = _optims(self.config)[name].batch_size
            unit[name] = self.timings[name].median * wanted / self.timings[name].batch
        seconds = {"collect": 0.0, "encode": expected_encodings(self.config) / self.timings["encode"].rate}
        seconds |= dict.fromkeys(COMPONENTS, 0.0)
        for work in plan_run(self.config):
            if work.phase not in unit or _is_resting(self.config, work.phase, work.epoch):
                continue
            bound = math.inf if work.max_seconds is None else work.max_seconds
            part = "collect" if work.phase == "collect_random" else work.phase
            seconds[part] += min(work.units * unit[work.phase], bound)
        return seconds


def measure(
    config: Config,
    *,
    updates: int,
    warmup: int,
    max_seconds: float,
    batch_scale: float,
    after_part: Callable[[int], None],
) -> Benchmark:
    """Time the parts of a run.

    Args:
        config: the run's configuration.
        updates: repetitions that are timed.
        warmup: repetitions before them.
        max_seconds: a part is timed no longer than this, but at least once.
        batch_scale: share of each batch that is computed, above 0 and at most 1.
        after_part: called with 1 after each of the `NUM_PARTS` parts.

    Raises:
        UsageError: the configuration is not one that can be trained.
        RunError: the device has not enough memory, or the game gives nothing to train on.
    """
    scaled = scale_batches(config, batch_scale)
    repeat = partial(_time, updates=updates, warmup=warmup, max_seconds=max_seconds, device=config.device)
    timings: dict[str, Timing] = {}
    with _explaining_memory(), ExitStack() as stack:
        parts = stack.enter_context(prepare_training(stack.enter_context(_with_weights(scaled))))
        side = config.env.frame_size
        room = MOST_FILL_STEPS + (PLAY_STEPS + 1) * config.env.num_envs
        replay = Replay((side, side, 3), room, folder=None, seed=derive_seed(config.seed, "replay"))
        state = assemble(scaled, parts, replay, lambda text: None)
        state.env.reset()
        for timing in _time_parts(scaled, state, repeat):
            timings[timing.name] = timing
            after_part(1)
    return Benchmark(
        config=config, batch_scale=batch_scale, timings=timings, process_memory=_process_memory()
    )


NUM_PARTS = 4 + len(COMPONENTS)
"""Parts that `measure` times."""


def scale_batches(config: Config, scale: float) -> Config:
    """The configuration with batches of `scale` times their size, at least 1."""

    def smaller(optim: OptimConfig) -> OptimConfig:
        return replace(optim, batch_size=max(1, round(optim.batch_size * scale)))

    return replace(
        config,
        tokenizer=replace(config.tokenizer, optim=smaller(config.tokenizer.optim)),
        world_model=replace(config.world_model, optim=smaller(config.world_model.optim)),
        controller=replace(config.controller, optim=smaller(config.controller.optim)),
    )


def expected_encodings(config: Config) -> float:
    """Frames that a run encodes for the world model and the controller, on average.

    Each frame drawn is encoded once until the tokenizer learns again. Of N stored frames k draws hit
    N (1 - e^(-k/N)) different ones.
    """
    stored, known, total = float(config.schedule.random_steps), 0.0, 0.0
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
    optim = _optims(config)[name]
    return updates_in_epoch(optim, epoch, first=epoch == optim.start_epoch)


def _is_resting(config: Config, name: str, epoch: int) -> bool:
    """Whether it is the tokenizer, frozen when its freeze is due, as it is hoped to be."""
    freeze = config.tokenizer.freeze_epoch
    return name == "tokenizer" and freeze is not None and epoch >= freeze


def _optims(config: Config) -> dict[str, OptimConfig]:
    return {name: getattr(config, name).optim for name in COMPONENTS}


_Repeat = Callable[..., Timing]


def _time_parts(config: Config, state: RunState, repeat: _Repeat) -> Iterator[Timing]:
    """Time part after part, each on what those before it left."""
    yield _time_random_play(config, state)
    yield _time_collection(config, state)
    tokenizer = state.phases["tokenizer"]
    yield _time_phase(tokenizer, config, repeat)
    frames = state.replay.sample_frames(ENCODED).to(config.device)
    encode = partial(state.agent.tokenizer.encode, frames)
    yield repeat("encode", encode, batch=ENCODED, of="frames")
    blocks = config.world_model.sequence_blocks
    # Frames that are drawn again need no encoding; what encoding takes is a part of its own.
    rows = -(-COVERING * state.replay.num_steps // blocks)
    state.tokens.tokenize(state.replay.sample_sequences(rows, blocks, min_real=1))
    for name in ("world_model", "controller"):
        yield _time_phase(state.phases[name], config, repeat)
    yield _time_imagination(config, state, repeat)


def _time_random_play(config: Config, state: RunState) -> Timing:
    """Fill the replay by random play, and time the steps."""
    needed = max(config.world_model.context_blocks + 1, config.controller.min_real_frames)
    env, seconds = state.env, []
    generator = state.random["random steps"]
    while state.replay.num_steps < FILL_STEPS or not state.replay.ready(needed):
        if state.replay.num_steps >= MOST_FILL_STEPS:
            raise RunError(
                f"in {state.replay.num_steps} random steps no episode had {needed}: nothing to train on"
            )
        actions = torch.randint(env.num_actions, (env.num_envs,), generator=generator).numpy()
        started = time.perf_counter()
        env.play(actions)
        seconds.append(time.perf_counter() - started)
    return Timing(name="play at random", batch=env.num_envs, of="steps", seconds=tuple(seconds), memory=None)


def _time_collection(config: Config, state: RunState) -> Timing:
    """Steps that the agent plays: encode, decide, step."""
    env, controller = state.env, state.agent.controller
    seconds, observation, carry = [], env.observe(), controller.initial_carry(env.num_envs)
    with torch.no_grad():
        for _ in range(PLAY_STEPS):
            started = time.perf_counter()
            _, carry, observation = rollout(
                env, controller, carry, observation, 1, generator=state.random["actions"]
            )
            _wait(config.device)
            seconds.append(time.perf_counter() - started)
    return Timing(name="collect", batch=env.num_envs, of="steps", seconds=tuple(seconds), memory=None)


def _time_phase(phase: TrainingPhase, config: Config, repeat: _Repeat) -> Timing:
    """Updates as the trainer makes them."""
    component = phase.component
    # Epoch 0: before any freeze. A component's first epoch does not matter here.
    if not phase.prepare(0):
        raise RunError(f"the {component.name.replace('_', ' ')} has nothing to train on")
    component.module.train()
    timing = repeat(
        component.name,
        phase.update,
        batch=component.config.batch_size,
        of={"tokenizer": "frames", "world_model": "sequences", "controller": "segments"}[component.name],
    )
    component.module.eval()
    return timing


def _time_imagination(config: Config, state: RunState, repeat: _Repeat) -> Timing:
    """Imagined episodes alone, as long as the controller's, without burn-in and gradient."""
    batch, steps = config.controller.optim.batch_size, config.controller.horizon - 1
    agent, generator = state.agent, state.random["imagination"]
    tokens = agent.tokenizer.encode(state.replay.sample_frames(batch).to(config.device))

    @torch.no_grad()
    def imagine() -> None:
        env = ImaginedEnv(agent.world_model, agent.tokenizer, generator, agent.show)
        carry = agent.controller.initial_carry(batch)
        rollout(env, agent.controller, carry, env.reset(tokens), steps, generator=generator)

    return repeat("imagine", imagine, batch=batch * steps, of="frames")


def _time(
    name: str,
    work: Callable[[], object],
    *,
    batch: int,
    of: str,
    updates: int,
    warmup: int,
    max_seconds: float,
    device: str,
) -> Timing:
    for _ in range(warmup):
        work()
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    while len(seconds) < updates and (not seconds or sum(seconds) < max_seconds):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated(device) if is_cuda else None
    return Timing(name=name, batch=batch, of=of, seconds=tuple(seconds), memory=memory)


def _wait(device: str) -> None:
    """Until the device has done what it was told."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


@contextmanager
def _with_weights(config: Config) -> Iterator[Config]:
    """The configuration, with random weights for LPIPS where its own are needed and not here."""
    try:
        find_weights(config.tokenizer)
    except UsageError:
        if config.tokenizer.lpips_weights is not None:
            raise
    else:
        yield config
        return
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.05 * torch.randn(shape, generator=generator) for name, shape in expected_shapes().items()
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        safetensors.torch.save_file(weights, path)
        yield replace(config, tokenizer=replace(config.tokenizer, lpips_weights=str(path)))


@contextmanager
def _explaining_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the device has not enough memory for these batches; --batch-scale 0.5 computes half of each"
        ) from error


def _process_memory() -> int:
    """Bytes of memory that the process had at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
