"""`rem-atari benchmark`: what is timed is what training does, and the projection is its arithmetic."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import DEBUG, files_in

from rem_atari.cli import main
from rem_atari.commands.benchmark import TITLES, describe, to_json
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.errors import RunError, UsageError
from rem_atari.models.lpips import Lpips
from rem_atari.timing import benchmark
from rem_atari.timing.benchmark import measure, scale_batches
from rem_atari.timing.projection import COMPONENTS, Benchmark, Timing, expected_encodings
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.updates import Lap
from rem_atari.weights.files import read_weights

PARTS_OF = {name: ["data", "forward", "backward", "optimiser"] for name in COMPONENTS} | {
    "imagine": ["encode", "burn-in", "steps", "loss"]
}

QUICK = ("--threads", "0", "--updates", "2", "--warmup", "0")


def made_up(config: Config, *, batch_scale: float = 1.0, **seconds: float) -> Benchmark:
    """A benchmark in which every part takes a second, unless something else is said."""
    scaled = scale_batches(config, batch_scale)
    sizes = {name: getattr(scaled, name).optim.batch_size for name in COMPONENTS}
    batches = {"play at random": 2, "collect": 2, "encode": 256, "imagine": 8} | sizes
    timings = {
        name: Timing(
            name=name, batch=batches[name], of="things", seconds=(seconds.get(name, 1.0),), memory=None
        )
        for name in TITLES
    }
    return Benchmark(config=config, batch_scale=batch_scale, timings=timings, process_memory=1)


def scheduled() -> Config:
    """Three epochs; the tokenizer rests in the last one, the controller begins in the second."""
    return replace(
        DEBUG,
        schedule=replace(DEBUG.schedule, epochs=3, collect_epochs=2, steps_per_epoch=100, random_steps=60),
        tokenizer=replace(
            DEBUG.tokenizer,
            freeze_epoch=2,
            optim=replace(DEBUG.tokenizer.optim, updates_per_epoch=5, first_updates=7, batch_size=8),
        ),
        world_model=replace(
            DEBUG.world_model, optim=replace(DEBUG.world_model.optim, updates_per_epoch=10, batch_size=4)
        ),
        controller=replace(
            DEBUG.controller,
            optim=replace(DEBUG.controller.optim, updates_per_epoch=20, start_epoch=1, batch_size=4),
        ),
    )


def test_a_tokenizer_of_patches_has_no_update_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--preset", "debug", "--tokenizer.kind", "patches", *QUICK]) == 0
    shown = capsys.readouterr().out
    assert TITLES["encode"] in shown
    assert TITLES["tokenizer"] not in shown


def test_the_command_measures_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, data = tmp_path / "speed.csv", tmp_path / "speed.json"
    words = ["benchmark", "--preset", "debug", *QUICK, "--csv", str(table), "--json", str(data)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert files_in(tmp_path) == {"speed.csv", "speed.json"}
    found = json.loads(data.read_text())
    with table.open() as file:
        rows = list(csv.DictReader(file))
    wholes = [row for row in rows if not row["part"]]
    assert [row["name"] for row in wholes] == [part["name"] for part in found["parts"]] == list(TITLES)
    for part in found["parts"]:
        assert 0 < part["fastest_seconds"] <= part["median_seconds"] <= part["slowest_seconds"]
        assert TITLES[part["name"]] in shown
    timed = {part["name"]: part for part in found["parts"]}
    assert {timed[name]["repetitions"] for name in COMPONENTS} == {2}
    assert (timed["controller"]["batch"], timed["imagine"]["batch"]) == (4, 4 * 2)
    assert found["imagined_frames_per_second"]["in_training"] == pytest.approx(
        2 * timed["controller"]["per_second"]
    )
    for name, parts in PARTS_OF.items():
        assert [part["name"] for part in timed[name]["parts"]] == parts
        assert [row["part"] for row in rows if row["name"] == name] == ["", *parts]
        assert sum(part["share"] for part in timed[name]["parts"]) == pytest.approx(1)
        assert (
            sum(part["median_seconds"] for part in timed[name]["parts"])
            < timed[name]["slowest_seconds"] * 1.01
        )
    steps = next(part for part in timed["imagine"]["parts"] if part["name"] == "steps")
    assert found["imagined_frames_per_second"]["steps_alone"] == pytest.approx(8 / steps["median_seconds"])
    assert 0 < steps["share_of_matrix_rate"] < 1
    parts = dict(found["projected_seconds"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert Config.from_dict(found["config"]) == replace(PRESETS["debug"], threads=0)
    assert found["process_memory_bytes"] > 50_000_000
    assert found["projection_is_scaled"] is False


def test_updates_are_those_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, timed ones and one whose work is counted, in training mode, each of them applied."""
    seen: dict[str, list[bool]] = {}

    def watch(phase: TrainingPhase, *args: object) -> Timing:
        updates = phase.update

        def update(lap: Lap) -> object:
            seen.setdefault(phase.component.name, []).append(phase.component.module.training)
            return updates(lap)

        phase.update = update
        timing = time_phase(phase, *args)
        assert phase.component.updates == 6
        assert not phase.component.module.training
        return timing

    time_phase = benchmark._time_phase
    monkeypatch.setattr(benchmark, "_time_phase", watch)
    parts: list[int] = []
    result = measure(DEBUG, updates=3, warmup=2, max_seconds=60.0, batch_scale=1.0, after_part=parts.append)
    assert seen == {name: [True] * 6 for name in COMPONENTS}
    assert parts == [1] * benchmark.NUM_PARTS
    assert {len(result.timings[name].seconds) for name in COMPONENTS} == {3}


def test_flops_are_those_of_the_products() -> None:
    """A product of (3, 4) and (4, 5), forward and backward, and nothing in the part after it."""
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5, requires_grad=True)

    def work(lap: Lap) -> None:
        product = a @ b
        lap("forward")
        product.sum().backward()
        lap("backward")
        a.sum()
        lap("rest")

    one = 2 * 3 * 4 * 5
    assert benchmark._count_flops(work) == {"forward": one, "backward": 2 * one, "rest": 0}


def test_a_cpu_is_given_a_part_of_large_batches_and_a_gpu_all_of_them() -> None:
    scales = {name: benchmark.fitting_scale(preset) for name, preset in PRESETS.items()}
    assert scales == dict.fromkeys(PRESETS, 1.0) | {"paper": 1 / 8}
    assert benchmark.fitting_scale(replace(PRESETS["paper"], device="cuda")) == 1.0


def test_a_part_is_timed_no_longer_than_allowed_but_once() -> None:
    result = measure(
        DEBUG, updates=50, warmup=0, max_seconds=1e-9, batch_scale=0.5, after_part=lambda done: None
    )
    assert {len(result.timings[name].seconds) for name in COMPONENTS} == {1}
    assert result.timings["tokenizer"].batch == 4
    assert "A part was timed 1x only" in describe(result)


def test_the_projection_is_the_schedules_arithmetic() -> None:
    config = scheduled()
    seconds = {
        "play at random": 0.2,  # for two steps
        "collect": 0.4,
        "tokenizer": 3.0,
        "world_model": 5.0,
        "controller": 7.0,
        "encode": 256 / 10,
    }
    projected = made_up(config, **seconds).project()
    assert projected["collect"] == pytest.approx(60 * 0.1 + 200 * 0.2)
    assert projected["tokenizer"] == pytest.approx((7 + 5) * 3.0)
    assert projected["world_model"] == pytest.approx(3 * 10 * 5.0)
    assert projected["controller"] == pytest.approx(2 * 20 * 7.0)
    assert projected["encode"] == pytest.approx(expected_encodings(config) / 10)
    assert set(projected) == {"collect", "encode", *COMPONENTS}


def test_bounds_on_wall_time_bound_the_projection() -> None:
    config = scheduled()
    bounded = replace(config.world_model.optim, max_seconds=12.0)
    config = replace(config, world_model=replace(config.world_model, optim=bounded))
    assert made_up(config, world_model=5.0).project()["world_model"] == pytest.approx(3 * 12.0)


def test_smaller_batches_are_multiplied_to_whole_ones_and_marked() -> None:
    config = scheduled()
    whole, part = made_up(config), made_up(config, batch_scale=0.25)
    for name, factor in (("tokenizer", 4), ("world_model", 4), ("controller", 4), ("collect", 1)):
        assert part.project()[name] == pytest.approx(factor * whole.project()[name])
    assert (
        "multiplies an update's time to whole ones: tokenizer 2 things x 4, world model 1 things x 4"
        in describe(part)
    )
    assert "multiplies" not in describe(whole)
    assert to_json(part)["projection_is_scaled"] is True
    # Rounded to a frame at least, and multiplied by what was really computed.
    tiny = made_up(config, batch_scale=0.01)
    assert tiny.timings["world_model"].batch == 1
    assert tiny.project()["world_model"] == pytest.approx(4 * whole.project()["world_model"])


def test_expected_encodings_are_those_of_real_draws() -> None:
    """Simulated: rows drawn uniformly, each encoded once until the tokenizer learns again."""
    config = scheduled()
    draws = {"world_model": 10 * 4 * 4, "controller": 20 * 4 * 4}
    generator, totals = np.random.default_rng(0), []
    for _ in range(200):
        known, total = set(), 0
        for epoch, stored in enumerate((160, 260, 260)):
            if epoch < 2:
                known = set()
            drawn = draws["world_model"] + (draws["controller"] if epoch >= 1 else 0)
            new = set(generator.integers(stored, size=drawn).tolist()) - known
            total += len(new)
            known |= new
        totals.append(total)
    assert expected_encodings(config) == pytest.approx(np.mean(totals), rel=0.01)


def test_lpips_runs_with_random_weights_where_its_own_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with benchmark._with_weights(PRESETS["paper"]) as config:
        path = Path(config.tokenizer.lpips_weights)
        network = Lpips(read_weights([path]))
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        assert torch.isfinite(network(images, -images)).all()
    assert not path.exists()
    assert files_in(tmp_path) == set()
    missing = replace(PRESETS["paper"].tokenizer, lpips_weights=str(tmp_path / "mine.safetensors"))
    with (
        pytest.raises(UsageError, match="there is no such file"),
        benchmark._with_weights(replace(PRESETS["paper"], tokenizer=missing)),
    ):
        pass


def test_a_lack_of_memory_is_said_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(benchmark, "_time_phase", fail)
    with pytest.raises(RunError, match=r"--batch-scale 0\.5 computes half"):
        measure(DEBUG, updates=1, warmup=0, max_seconds=1.0, batch_scale=1.0, after_part=lambda done: None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--updates", "0"], "--updates is 0, wanted at least 1"),
        (["--batch-scale", "0"], "--batch-scale is 0.0, wanted above 0 and at most 1"),
        (["--batch-scale", "2"], "--batch-scale is 2.0, wanted above 0 and at most 1"),
        (["--max-seconds", "nan"], "--max-seconds is nan, wanted more than 0"),
        (["--device", "mps"], "the device 'mps' cannot be used"),
        (["--json", "nowhere/speed.json"], "there is no folder nowhere"),
        (["--preset", "tini"], "did you mean tiny?"),
    ],
)
def test_wrong_use_is_explained(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert main(["benchmark", "--preset", "debug", *words]) == 2
    assert sentence in capsys.readouterr().err
