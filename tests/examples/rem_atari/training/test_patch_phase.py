"""The turn of a tokenizer of patches: it takes in each frame once, trains nothing, and survives a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import SHORT, Point, fingerprint, measured, newest, run_part

from rem_atari.models.parameter_groups import parameter_groups
from rem_atari.models.patches import PatchTokenizer
from rem_atari.replay.buffer import Replay
from rem_atari.report.contents import load_run, measure_quality
from rem_atari.report.diagnosis import diagnose
from rem_atari.training.component import Component
from rem_atari.training.patch_phase import PatchPhase

# With all else that helps where rewards are rare, which has a state of its own or draws random numbers.
PATCHES = replace(
    SHORT,
    tokenizer=replace(SHORT.tokenizer, kind="patches", codebook_size=64),
    world_model=replace(
        SHORT.world_model,
        event_share=0.5,
        priority_share=0.5,
        draw="coupled",
        reward_bins=5,
        disagreement_heads=2,
    ),
    controller=replace(
        SHORT.controller,
        context_frames=3,
        reward_start_share=0.5,
        uses=2,
        minibatches=2,
        scale_advantages=True,
        value_bins=5,
        disagreement_weight=0.1,
        epsilon=0.2,
        random_repeat=6,
    ),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches") / "run"
    assert not run_part(folder, PATCHES).stopped
    return folder


def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    points = (("collect_random", 20), ("collect", 10), ("world_model", 1), ("controller", 1))
    for number, (phase, done) in enumerate(points):
        point = Point(0, phase, done)
        assert run_part(folder, PATCHES, until=point, resume=number > 0).stopped
    assert not run_part(folder, PATCHES, resume=True).stopped
    assert fingerprint(folder) == fingerprint(whole)


def test_tokens_in_the_cache_are_those_of_today(whole: Path) -> None:
    loaded = load_run(whole)
    cached = newest(whole).training
    frames = Replay.load(whole / "replay").stored_frames(0)[cached["tokens/rows"]]
    assert len(frames) > 20
    assert (loaded.agent.tokenizer.encode(frames) == cached["tokens/tokens"]).all()
    assert (loaded.agent.tokenizer.decode(cached["tokens/tokens"].long()) == frames).all()


def test_what_curiosity_pays_stands_in_the_metrics(whole: Path) -> None:
    lines = [line for line in measured(whole) if line["phase"] == "controller"]
    assert len(lines) == 2
    assert all(line["imagined_bonus"] > 0 for line in lines)


def test_metrics_diagnosis_and_report_speak_of_patches(whole: Path) -> None:
    lines = [line for line in measured(whole) if line["phase"] == "tokenizer"]
    assert [(line["updates"], line["frozen"], line["covered"]) for line in lines] == [(0, 1, 1.0)] * 2
    assert lines[-1]["codes"] == sum(line["codes_added"] for line in lines)
    findings = {finding.check: finding for finding in diagnose(measured(whole), PATCHES)}
    assert findings["moving_pixels"].sign is False
    assert findings["codebook"].sign is False
    full = [line | {"covered": 0.9} for line in measured(whole)]
    assert diagnose(full, PATCHES)[0].sign
    quality = measure_quality(load_run(whole))
    assert quality.frames is not None
    assert quality.frames.ours.mse == 0


def patch_phase(replay: Replay, warnings: list[str], **changes: int | bool) -> PatchPhase:
    tokenizer = PatchTokenizer(replace(PATCHES.tokenizer, **changes), 24)  # 9 patches a frame
    component = Component("tokenizer", tokenizer, PATCHES.tokenizer.optim, parameter_groups(tokenizer, 0.0))
    return PatchPhase(tokenizer, component, replay, torch.Generator().manual_seed(0), warnings.append)


def test_each_frame_is_taken_in_once_and_a_full_codebook_warns_once() -> None:
    replay = Replay((24, 24, 3), 30, seed=0)
    warnings: list[str] = []
    phase = patch_phase(replay, warnings, codebook_size=20)
    generator = np.random.default_rng(0)
    added = []
    for _ in range(4):
        replay.append(0, generator.integers(0, 256, (24, 24, 3), dtype=np.uint8), 0, 0.0, False, False)
        assert phase.prepare(0) is False
        added.append(phase.more_metrics({})["codes_added"])
    assert added == [9, 9, 2, 0]
    assert phase.more_metrics({})["covered"] == 0
    assert len(warnings) == 1
    assert "all 20 codes of tokenizer.codebook_size are taken" in warnings[0]
    assert not phase.prepare(0)
    assert "covered" not in phase.more_metrics({})


def test_means_are_made_once_of_the_first_frames() -> None:
    replay = Replay((24, 24, 3), 30, seed=0)
    warnings: list[str] = []
    phase = patch_phase(replay, warnings, codebook_size=12, patch_means=True)
    generator = np.random.default_rng(0)
    added, errors = [], []
    for frames in (5, 2):
        for _ in range(frames):
            replay.append(0, generator.integers(0, 256, (24, 24, 3), dtype=np.uint8), 0, 0.0, False, False)
        phase.prepare(0)
        added.append(phase.more_metrics({})["codes_added"])
        errors.append(phase.more_metrics({})["foreground_error"])
        assert 1 < phase.more_metrics({})["codes_used"] <= 12
    assert added == [12, 0]
    assert warnings == []
    # Noise in [-1, 1] is 1/3 from its mean; the codes fit the frames that they are means of better.
    assert 0.2 < errors[0] < 1 / 3 < errors[1] < 2 / 3
    lines = [{"phase": "tokenizer", "epoch": 0, "foreground_error": e, "frozen": 1.0} for e in errors]
    settings = replace(PATCHES.tokenizer, patch_means=True, freeze_foreground_error=0.02)
    config = replace(PATCHES, tokenizer=settings)
    moving = diagnose(lines, config)[0]
    assert moving.sign
    assert "Raise tokenizer.codebook_size, or" in moving.advice
