"""``rem-atari benchmark``: how fast each part is, and how long a whole run would take."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from importlib.metadata import version
from typing import Any

import torch

from rem_atari.arguments import BenchmarkArguments
from rem_atari.commands.counting import counting
from rem_atari.commands.tables import format_table
from rem_atari.envs import env_name
from rem_atari.errors import UsageError
from rem_atari.report.text import duration, size
from rem_atari.runs.durable import replace_file
from rem_atari.timing.benchmark import MATRIX, NUM_PARTS, measure
from rem_atari.timing.projection import Benchmark, Timing
from rem_atari.training.schedule import evaluation_episodes

TITLES = {
    "play at random": "play at random",
    "collect": "collect (the agent plays)",
    "tokenizer": "tokenizer update",
    "encode": "encode frames",
    "world_model": "world model update",
    "controller": "controller update",
    "imagine": "imagine (new frames)",
}
"""Names of the parts, in the order in which they are shown."""


def benchmark(arguments: BenchmarkArguments) -> None:
    """Measure, print the results, and write the requested files.

    Raises:
        UsageError: a value is out of its range, or the device is not there.
        RunError: the device has not enough memory.
    """
    _check(arguments)
    with counting("measuring", NUM_PARTS, "parts") as advance:
        result = measure(
            arguments.config,
            updates=arguments.updates,
            warmup=arguments.warmup,
            max_seconds=arguments.max_seconds,
            batch_scale=arguments.batch_scale,
            after_part=advance,
        )
    print(describe(result))
    if arguments.json is not None:
        replace_file(arguments.json, (json.dumps(to_json(result), indent=2, allow_nan=False) + "\n").encode())
    if arguments.csv is not None:
        replace_file(arguments.csv, to_csv(result).encode())


def _check(arguments: BenchmarkArguments) -> None:
    if arguments.updates < 1 or arguments.warmup < 0:
        raise UsageError(
            f"--updates is {arguments.updates}, wanted at least 1; --warmup is {arguments.warmup}, at least 0"
        )
    if arguments.batch_scale is not None and not 0 < arguments.batch_scale <= 1:
        raise UsageError(f"--batch-scale is {arguments.batch_scale}, wanted above 0 and at most 1")
    if not (math.isfinite(arguments.max_seconds) and arguments.max_seconds > 0):
        raise UsageError(f"--max-seconds is {arguments.max_seconds}, wanted more than 0")
    for path in (arguments.json, arguments.csv):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")


def describe(result: Benchmark) -> str:
    """The tables, and their limits."""
    config = result.config
    lines = [
        f"preset {config.preset}, {env_name(config.env)}, {describe_device(config.device)},"
        f" {config.precision}{', compiled' if config.compile else ''}",
        "",
        _timings_table(result),
        "",
        _parts_table(result),
        "",
        f"imagined frames a second: {_rate(result.imagined_alone)} steps alone,"
        f" {_rate(result.timings['imagine'].rate)} with the encoding of new frames, burn-in and loss,"
        f" {_rate(result.imagined_in_training)} in training (frames known)",
        f"memory at most: {_memory(result)}",
        "",
        _projection_table(result),
        "",
        *_notes(result),
    ]
    return "\n".join(lines)


def describe_device(device: str) -> str:
    """The device's name, with the properties that set a CPU's speed."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return "mps (not tested)"
    threads = torch.get_num_threads()
    return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def _ordered(result: Benchmark) -> list[tuple[str, Timing]]:
    """The timings in the order of `TITLES`."""
    return [(name, result.timings[name]) for name in TITLES if name in result.timings]


def _timings_table(result: Benchmark) -> str:
    rows = []
    for name, timing in _ordered(result):
        rows.append(
            [
                TITLES[name],
                f"{timing.batch:,} {timing.of if timing.batch > 1 else timing.of.removesuffix('s')}",
                str(len(timing.seconds)),
                *(_seconds(each) for each in (timing.median, min(timing.seconds), max(timing.seconds))),
                f"{_rate(timing.rate)} {timing.of}/s",
            ]
        )
    header = ["part", "at once", "timed", "median", "fastest", "slowest", "rate"]
    return format_table(header, rows)


def _parts_table(result: Benchmark) -> str:
    """The parts of each update; on a CPU beside the rate of a matrix product."""
    rows = []
    for name, timing in _ordered(result):
        for part, seconds in timing.parts.items() if len(timing.parts) > 1 else ():
            efficiency = result.efficiency(name, part)
            row = [f"{TITLES[name]}: {part}", _seconds(seconds), f"{timing.share(part):.1%}"]
            rows.append([*row, "" if efficiency is None else f"{efficiency:.0%}"])
    rate = "" if result.matrix_rate is None else f"of {result.matrix_rate / 1e9:,.0f} GFLOP/s"
    return format_table(["where the time goes", "median", "share", rate], rows)


def _projection_table(result: Benchmark) -> str:
    seconds = result.project()
    total = sum(seconds.values())
    rows = [[TITLES[name], _long(each), f"{each / total:.1%}"] for name, each in seconds.items()]
    rows.append(["in all", _long(total), "100.0%"])
    return format_table(["projected run", "time", "share"], rows)


def _notes(result: Benchmark) -> list[str]:
    """The limits of the projection."""
    config = result.config
    episodes = sum(evaluation_episodes(config, epoch) for epoch in range(config.schedule.epochs))
    episodes += config.evaluation.random_episodes
    thousand = 1000 / result.timings["collect"].rate
    lines = [
        f"Projected: {config.schedule.epochs} epochs of the schedule times the medians above. Not in it:"
        f" evaluations ({episodes:,} games, which take about {duration(thousand)} for each 1,000 steps),"
        " checkpoints, the report.",
    ]
    if result.batch_scale < 1:
        lines.append(
            f"Measured on batches of {result.batch_scale:g} of their size; the projection multiplies an"
            f" update's time to whole ones: {_whole_batches(result)}. Where a whole batch uses the machine"
            " better than its part (a GPU does), the run takes less than this; --batch-scale 1 measures it."
        )
    if result.matrix_rate is not None:
        lines.append(
            f"A product of {MATRIX} x {MATRIX} matrices in {config.precision} reached"
            f" {result.matrix_rate / 1e9:,.0f} GFLOP/s here, measured between the parts. The"
            " last column above is the share of it at which a part's matrix products and convolutions were"
            " computed, all its other work included."
        )
    shortest = min(len(result.timings[name].seconds) for name in result.trained)
    if shortest < 3:
        lines.append(
            f"A part was timed {shortest}x only: --max-seconds allows more, --batch-scale makes it cheaper."
        )
    return lines


def _whole_batches(result: Benchmark) -> str:
    """The factor on each component's time."""
    factors = []
    for name in result.trained:
        timing, wanted = result.timings[name], getattr(result.config, name).optim.batch_size
        factors.append(f"{name.replace('_', ' ')} {timing.batch} {timing.of} x {wanted / timing.batch:g}")
    return ", ".join(factors)


def _memory(result: Benchmark) -> str:
    device = [timing.memory for timing in result.timings.values() if timing.memory is not None]
    text = f"{size(result.process_memory)} of the process"
    return f"{size(max(device))} on the device, {text}" if device else text


def to_json(result: Benchmark) -> dict[str, Any]:
    """All measurements as JSON data."""
    config, projected = result.config, result.project()
    return {
        "preset": config.preset,
        "game": env_name(config.env),
        "device": config.device,
        "device_name": describe_device(config.device),
        "threads": torch.get_num_threads(),
        "precision": config.precision,
        "compile": config.compile,
        "batch_scale": result.batch_scale,
        "versions": {
            "retpop": version("retpop"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "matrix_flops_per_second": result.matrix_rate,
        "parts": [_part(timing) | {"parts": _parts(result, name)} for name, timing in _ordered(result)],
        "imagined_frames_per_second": {
            "steps_alone": result.imagined_alone,
            "whole_call": result.timings["imagine"].rate,
            "in_training": result.imagined_in_training,
        },
        "process_memory_bytes": result.process_memory,
        "projected_seconds": projected | {"total": sum(projected.values())},
        "projection_is_scaled": result.batch_scale < 1,
        "config": config.to_dict(),
    }


def _part(timing: Timing) -> dict[str, Any]:
    return {
        "name": timing.name,
        "batch": timing.batch,
        "of": timing.of,
        "repetitions": len(timing.seconds),
        "median_seconds": timing.median,
        "fastest_seconds": min(timing.seconds),
        "slowest_seconds": max(timing.seconds),
        "per_second": timing.rate,
        "device_memory_bytes": timing.memory,
    }


def _parts(result: Benchmark, name: str) -> list[dict[str, Any]]:
    timing = result.timings[name]
    return [
        {
            "name": part,
            "median_seconds": seconds,
            "share": timing.share(part),
            "flops": timing.flops.get(part),
            "share_of_matrix_rate": result.efficiency(name, part),
        }
        for part, seconds in timing.parts.items()
    ]


def to_csv(result: Benchmark) -> str:
    """A line for each part of a run, followed by one for each of its own parts, which `part` names."""
    rows: list[dict[str, Any]] = []
    for name, timing in _ordered(result):
        whole = _part(timing)
        rows.append(whole | {"part": ""})
        for part in _parts(result, name):
            rows.append(
                {"name": name, "part": part.pop("name"), "batch": whole["batch"], "of": whole["of"]} | part
            )
    common = {
        "preset": result.config.preset,
        "device": result.config.device,
        "device_name": describe_device(result.config.device),
        "precision": result.config.precision,
        "compile": result.config.compile,
        "batch_scale": result.batch_scale,
    }
    columns = list(dict.fromkeys([*common, "name", "part", *(column for row in rows for column in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(common | row for row in rows)
    return text.getvalue()


def _long(seconds: float) -> str:
    """A duration, in days if it is long."""
    days = seconds / 86_400
    return f"{days:,.1f} days" if days >= 2 else duration(seconds)


def _seconds(value: float) -> str:
    """A short time in a suitable unit."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} µs"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
