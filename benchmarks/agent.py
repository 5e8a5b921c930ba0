"""REM's imagination in the whole agent (rem_atari), at the paper's sizes and a batch of 8.

"call" is one update's imagination in the controller's training: 21 new frames are encoded, the
controller is burnt in on 20 of them, and 9 steps are imagined from the last. "steps" are these 9 alone. The
floor counts encoding and the decoder's products, 129 tokens a step; heads, controller and draws are left out.
Outputs are drawn at random, so the comparison with float64 uses the logits of one step before any draw.

`whole_run` times the parts of a training run, and adds them up, by `rem_atari.timing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import origin
from benchmarks.measurements import Measurement
from benchmarks.timing import Effort
from benchmarks.work import DTYPES, FORWARD, Contender, Group, Problem, Work, product_flops

FRAMES, STEPS = 21, 9

PART_SECONDS = 4.0
"""Time limit in seconds for each part of a training run."""

ACTIONS = 4
"""Number of actions, as in Breakout."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """B episodes side by side, by the agent of a preset."""

    B: int
    preset: str = "paper"

    @property
    def text(self) -> str:
        """For tables."""
        return f"B{self.B} {FRAMES} frames, {STEPS} steps, preset {self.preset}"


SHAPES = {"tiny": Sizes(B=2, preset="debug"), "rem_8": Sizes(B=8)}


def groups() -> Iterator[Group]:
    """The call and its steps in each dtype; none without rem_atari."""
    if find_spec("rem_atari") is None:
        return
    for shape, sizes in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            for mode in ("call", "steps"):
                make = partial(imagine, mode=mode)
                yield Group(
                    op="agent",
                    shape=shape,
                    mode=mode,
                    dtype=dtype,
                    passes=(FORWARD,),
                    problem=partial(problem, sizes, DTYPES[dtype]),
                    contenders={"torch": Contender(make=make, reference=make, model=True)},
                )


def problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """An agent with random weights, and frames and actions to begin from."""
    from rem_atari.agent import Agent
    from rem_atari.config.presets import PRESETS

    config = PRESETS[sizes.preset]
    agent = Agent.from_config(config, ACTIONS).to(device).eval()
    side = config.env.frame_size
    shape = (sizes.B, FRAMES, side, side, 3)
    tensors = {
        "frames": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "actions": torch.randint(ACTIONS, shape[:2], device=device),
    }
    return Problem(sizes=sizes, dtype=dtype, tensors=tensors, shared={"agent": agent})


def imagine(problem: Problem, *, mode: str) -> Work:
    """The agent's own functions, as in the training of its controller."""
    from rem_atari.play.rollout import rollout

    agent, frames, actions = (*problem.shared.values(), *problem.tensors.values())
    generator = torch.Generator(problem.device).manual_seed(0)

    def start() -> Any:
        return _start(agent, agent.tokenizer.encode(frames), actions, generator)

    begin = start if mode == "call" else cache(start)  # "steps" continues where the last call ended

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        with problem.autocast():
            env, carry, seen = begin()
            trajectory, _, _ = rollout(env, agent.controller, carry, seen, STEPS, generator=generator)
        return (trajectory.rewards,)

    @torch.no_grad()
    def answer() -> tuple[Tensor, ...]:
        world = agent.world_model
        tokens = torch.arange(world.num_tokens, device=problem.device).expand(len(frames), -1)
        with problem.autocast():
            step = world.step(
                tokens % agent.tokenizer.codebook_size,
                actions[:, 0],
                agent.tokenizer.codes,
                world.init_state(len(frames)),
            )
            token_logits = world.token_logits(step, agent.tokenizer.codes)
        return token_logits, step.reward_logits[:, None], step.end_logits[:, None]

    world = agent.world_model
    flops = STEPS * (world.block_size + world.num_tokens) * product_flops(world.decoder)
    if mode == "call":
        flops += FRAMES * _encoding_flops(agent, frames)
    return Work(inputs=[frames], run=run, answer=answer, flops=len(frames) * flops, graded=0, moves=False)


def _start(agent: Any, tokens: Tensor, actions: Tensor, generator: torch.Generator) -> Any:
    """An imagined environment, the controller's memory, and what it sees first."""
    from rem_atari.models.sequence_tokens import SequenceTokens
    from rem_atari.play.imagination import ImaginedEnv
    from rem_atari.training.actor_critic import start_imagination

    never = torch.zeros_like(actions, dtype=torch.bool)
    segments = SequenceTokens(tokens, actions, torch.zeros_like(actions).float(), never, never, ~never)
    env = ImaginedEnv(agent.world_model, agent.tokenizer, generator, agent.show)
    return env, *start_imagination(env, agent, segments)


def _encoding_flops(agent: Any, frames: Tensor) -> int:
    """Products of encoding one frame, as torch counts them."""
    if agent.tokenizer.codes.dtype == torch.float64:
        return 0  # the reference, which is not timed
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        agent.tokenizer.encode(frames[:1, :1])
    return int(counter.get_total_flops())


def whole_run(device: torch.device, effort: Effort) -> Iterator[list[Measurement]]:
    """Each part of a training run, and the run that they make.

    On a GPU the preset "paper" in bfloat16, on Catch with frames of the same size where ale-py is missing; on
    a CPU the preset "debug", as a rehearsal.
    """
    try:
        from rem_atari.config.presets import CATCH_ID, PRESETS
        from rem_atari.timing import benchmark
    except ImportError as error:
        note = f"not measured: {error}"
        yield [Measurement(**origin(device), op="rem_atari", mode="rem_atari", note=note)]
        return
    on_gpu = device.type == "cuda"
    config = PRESETS["paper" if on_gpu else "debug"]
    if on_gpu:
        config = replace(config, device="cuda", precision="bfloat16")
        if find_spec("ale_py") is None:
            config = replace(config, env=replace(config.env, id=CATCH_ID))
    game = "Catch" if config.env.id == CATCH_ID else config.env.game
    found = benchmark.measure(
        config,
        updates=20 if on_gpu else 1,
        warmup=5 if on_gpu else 0,
        max_seconds=PART_SECONDS,
        batch_scale=1.0,
        after_part=lambda count: None,
    )
    row = {"op": "rem_atari", "shape": config.preset, "sizes": game, "dtype": config.precision}
    measured = partial(Measurement, **origin(device), **row)
    for timing in found.timings.values():
        name, batch = timing.name.replace("_", " "), f"{timing.batch} {timing.of}"
        rate = f"{timing.rate:.4g} {timing.of}/s"
        yield [measured(mode=name, direction=batch, samples=tuple(timing.seconds), note=rate)]
        for part, seconds in timing.parts.items() if len(timing.parts) > 1 else ():
            note = f"{timing.share(part):.1%} of the time"
            yield [measured(mode=f"{name}: {part}", direction=batch, samples=(seconds,), note=note)]
    projected = found.project()
    epochs = f"{config.schedule.epochs} epochs"
    for name, seconds in (*projected.items(), ("in all", sum(projected.values()))):
        mode = f"projected run, {name.replace('_', ' ')}"
        yield [measured(mode=mode, direction=epochs, samples=(seconds,))]
