"""REM at the paper's sizes, by `rem_atari.timing.benchmark`: step times, imagination, and the projected run.

On the preset "paper" in bfloat16; where ale-py is missing, on Catch with frames of the same size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.rows import Row

PART = "rem_atari"


def measure(clock: Clock, *, max_seconds: float) -> Iterator[Row]:
    """Each part of a run, and the run they make; a row that says so where rem_atari cannot be imported."""
    try:
        from rem_atari.config.presets import CATCH_ID, PRESETS
        from rem_atari.timing import benchmark
    except ImportError as error:
        yield Row(part=PART, what="rem_atari", note=f"not measured: {error}")
        return
    config, game = PRESETS["debug"], "Catch"
    if clock.on_gpu:
        config, game = PRESETS["paper"], PRESETS["paper"].env.game
        config = replace(config, device="cuda", precision="bfloat16")
        if find_spec("ale_py") is None:
            game, env = "Catch", replace(config.env, id=CATCH_ID)
            config = replace(config, env=env)
    parts: list[int] = []
    result = benchmark.measure(
        config,
        updates=20 if clock.on_gpu else 1,
        warmup=5 if clock.on_gpu else 0,
        max_seconds=max_seconds,
        batch_scale=1.0,
        after_part=parts.append,
    )
    shape = f"{config.preset}, {game}"
    for timing in result.timings.values():
        yield Row(
            part=PART,
            what=timing.name.replace("_", " "),
            shape=shape,
            dtype=config.precision,
            way=f"{timing.batch} {timing.of}",
            seconds=timing.median,
            note=f"{timing.rate:.4g} {timing.of}/s",
        )
        for part, seconds in timing.parts.items() if len(timing.parts) > 1 else ():
            yield Row(
                part=PART,
                what=f"{timing.name.replace('_', ' ')}: {part}",
                shape=shape,
                dtype=config.precision,
                way=f"{timing.batch} {timing.of}",
                seconds=seconds,
                note=f"{timing.share(part):.1%} of the time",
            )
    projected = result.project()
    for name, seconds in (*projected.items(), ("in all", sum(projected.values()))):
        yield Row(
            part=PART,
            what=f"projected run, {name.replace('_', ' ')}",
            shape=shape,
            dtype=config.precision,
            way=f"{config.schedule.epochs} epochs",
            seconds=seconds,
        )
