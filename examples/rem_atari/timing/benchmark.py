"""How long the parts of a run take on this machine."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from rem_atari.config import Config, OptimConfig
from rem_atari.errors import RunError, UsageError
from rem_atari.models.base_world_model import BaseWorldModel
from rem_atari.models.lpips import expected_shapes
from rem_atari.play.rollout import rollout
from rem_atari.replay.buffer import Replay
from rem_atari.timing.projection import COMPONENTS, Benchmark, Timing
from rem_atari.training.actor_critic import learn_from
from rem_atari.training.assembly import assemble
from rem_atari.training.controller_phase import ControllerPhase
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.run_state import RunState
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import prepare_training
from rem_atari.training.updates import Lap
from rem_atari.weights import find_weights

FILL_STEPS, MOST_FILL_STEPS = 600, 20_000
"""Random steps for training data, and their bound if episodes are too short."""

PLAY_STEPS = 50
"""Steps of play that are timed."""

ENCODED = 256
"""Frames encoded to time the encoding."""

CPU_UPDATE = 300e9
"""Floating point operations that an update of the world model may take on a CPU where the user does not say
what share of a batch to compute: a second or two of two cores."""

MATRIX = 1024
"""Side of the square matrices whose product gives a CPU's matrix rate."""

COVERING = 8
"""Draws for each stored frame after which all but one in e^8 have their tokens."""


def measure(
    config: Config,
    *,
    updates: int,
    warmup: int,
    max_seconds: float,
    batch_scale: float | None,
    after_part: Callable[[int], None],
) -> Benchmark:
    """Time the parts of a run.

    Args:
        config: the run's configuration.
        updates: repetitions that are timed.
        warmup: repetitions before them.
        max_seconds: a part is timed no longer than this, but at least once.
        batch_scale: share of each batch that is computed, above 0 and at most 1; None: `fitting_scale`.
        after_part: called with 1 after each of the `NUM_PARTS` parts.

    Raises:
        UsageError: the configuration is not one that can be trained.
        RunError: the device has not enough memory, or the game gives nothing to train on.
    """
    batch_scale = fitting_scale(config) if batch_scale is None else batch_scale
    scaled = scale_batches(config, batch_scale)
    repeat = partial(_time, updates=updates, warmup=warmup, max_seconds=max_seconds, config=config)
    timings: dict[str, Timing] = {}
    with _explaining_memory(), ExitStack() as stack:
        parts = stack.enter_context(prepare_training(stack.enter_context(_with_weights(scaled))))
        side = config.env.frame_size
        room = MOST_FILL_STEPS + (PLAY_STEPS + 1) * config.env.num_envs
        replay = Replay((side, side, 3), room, folder=None, seed=derive_seed(config.seed, "replay"))
        state = assemble(scaled, parts, replay, lambda text: None)
        state.env.reset()
        _go_on_forever(state.agent.world_model)
        rates = [_matrix_rate(config)]
        for timing in _time_parts(scaled, state, repeat):
            timings[timing.name] = timing
            rates.append(_matrix_rate(config))
            after_part(1)
    return Benchmark(
        config=config,
        batch_scale=batch_scale,
        timings=timings,
        process_memory=_process_memory(),
        matrix_rate=statistics.median(rates) if config.device == "cpu" else None,
    )


NUM_PARTS = 4 + len(COMPONENTS)
"""Parts that `measure` times."""


def fitting_scale(config: Config) -> float:
    """The share of each batch that suits the device: all of it; on a CPU 1/2^n, see `CPU_UPDATE`."""
    if torch.device(config.device).type != "cpu":
        return 1.0
    model, tokenizer = config.world_model, config.tokenizer
    places = (config.env.frame_size // 2 ** (len(tokenizer.channels) - 1)) ** 2
    weights = model.num_layers * (5 * model.embed_dim + 2 * model.ffn_dim) * model.embed_dim
    # Forward and backward, a product and a sum for each weight, for K + 1 tokens read and K predicted.
    work = 6 * weights * model.optim.batch_size * model.sequence_blocks * (2 * places + 1)
    return 2.0 ** -max(0, math.ceil(math.log2(work / CPU_UPDATE)))


@torch.no_grad()
def _go_on_forever(world_model: BaseWorldModel) -> None:
    """Let a world model that has not learned imagine no ends.

    It would end every other episode, whose later steps cost nothing; a trained one ends few.
    """
    world_model.end_head[-1].bias.copy_(torch.tensor([100.0, 0.0]))


def scale_batches(config: Config, scale: float) -> Config:
    """The configuration with batches of `scale` times their size, at least 1."""

    def smaller(optim: OptimConfig) -> OptimConfig:
        return replace(optim, batch_size=max(1, round(optim.batch_size * scale)))

    optim = smaller(config.controller.optim)
    minibatches = min(config.controller.minibatches, optim.batch_size)
    return replace(
        config,
        tokenizer=replace(config.tokenizer, optim=smaller(config.tokenizer.optim)),
        world_model=replace(config.world_model, optim=smaller(config.world_model.optim)),
        controller=replace(config.controller, optim=optim, minibatches=minibatches),
    )


_Repeat = Callable[..., Timing]


def _time_parts(config: Config, state: RunState, repeat: _Repeat) -> Iterator[Timing]:
    """Time the parts in order; each starts from the state that the one before left."""
    yield _time_random_play(config, state)
    yield _time_collection(config, state)
    tokenizer = state.phases["tokenizer"]
    if tokenizer.is_over:
        tokenizer.prepare(0)
    else:
        yield _time_phase(tokenizer, config, repeat)
    frames = state.replay.sample_frames(ENCODED).to(config.device)

    def encode(lap: Lap) -> None:
        state.agent.tokenizer.encode(frames)
        lap("encode")

    yield repeat("encode", encode, batch=ENCODED, of="frames")
    blocks = config.world_model.sequence_blocks
    # Frames drawn again need no encoding; encoding is timed as a part of its own.
    rows = -(-COVERING * state.replay.num_steps // blocks)
    state.tokens.tokenize(state.replay.sample_sequences(rows, blocks, min_real=1))
    for name in ("world_model", "controller"):
        yield _time_phase(state.phases[name], config, repeat)
    yield _time_imagination(config, state, state.phases["controller"], repeat)


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


def _time_imagination(config: Config, state: RunState, phase: ControllerPhase, repeat: _Repeat) -> Timing:
    """Everything that a controller update computes before its gradient, on new frames."""
    batch, steps = config.controller.optim.batch_size, config.controller.horizon - 1

    def imagine(lap: Lap) -> None:
        state.tokens.clear()
        segments = phase.draw()
        lap("encode")
        with phase.component.autocast():
            imagination = phase.imagine(segments, lap)
            learn_from(imagination, state.agent.controller, config.controller)
        lap("loss")

    return repeat("imagine", imagine, batch=batch * steps, of="frames")


def _time(
    name: str,
    work: Callable[[Lap], object],
    *,
    batch: int,
    of: str,
    updates: int,
    warmup: int,
    max_seconds: float,
    config: Config,
) -> Timing:
    laps = _Laps(config.device)
    for _ in range(warmup):
        work(laps)
    is_cuda = torch.device(config.device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(config.device)
    laps = _Laps(config.device)
    seconds: list[float] = []
    while len(seconds) < updates and (not seconds or sum(seconds) < max_seconds):
        laps.start()
        started = time.perf_counter()
        work(laps)
        _wait(config.device)
        seconds.append(time.perf_counter() - started)
    return Timing(
        name=name,
        batch=batch,
        of=of,
        seconds=tuple(seconds),
        memory=torch.cuda.max_memory_allocated(config.device) if is_cuda else None,
        parts={part: statistics.median(times) for part, times in laps.seconds.items()},
        flops=_count_flops(work) if config.device == "cpu" and not config.compile else {},
    )


class _Laps:
    """Times the parts of repeated work: the seconds of each part by its name."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._device = device
        self._last = 0.0

    def start(self) -> None:
        """Begin the first part."""
        _wait(self._device)
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        """End a part and begin the next one."""
        _wait(self._device)
        now = time.perf_counter()
        self.seconds[part].append(now - self._last)
        self._last = now


def _count_flops(work: Callable[[Lap], object]) -> dict[str, int]:
    """The floating point operations of each part's matrix products and convolutions."""
    flops: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter:

        def lap(part: str) -> None:
            flops[part] = counter.get_total_flops() - sum(flops.values())

        work(lap)
    return flops


def _matrix_rate(config: Config) -> float:
    """Floating point operations a second of a matrix product on a CPU, in the run's precision; else 0."""
    if config.device != "cpu":
        return 0.0
    a, b = torch.randn(2, MATRIX, MATRIX, dtype=getattr(torch, config.precision))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * MATRIX**3 / statistics.median(seconds)


def _wait(device: str) -> None:
    """Wait until the device has finished its work."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


@contextmanager
def _with_weights(config: Config) -> Iterator[Config]:
    """The configuration, with random weights for LPIPS if its own are needed and missing."""
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
    """The process's peak memory in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
