"""`rem-atari diagnose`: each sign is seen in metrics that show it, and in no others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import DEBUG

from rem_atari.cli import main
from rem_atari.config import Config
from rem_atari.report.diagnosis import diagnose
from rem_atari.report.findings import Finding, first_sign
from rem_atari.report.history import MetricLine
from rem_atari.runs.folder import create_run_folder

RESULTS = Path(__file__).resolve().parents[4] / "docs" / "results" / "data"

NAMES = (
    "moving_pixels",
    "rewards",
    "dreams",
    "entropy",
    "world_model_loss",
    "codebook",
    "value_scale",
    "reward_sizes",
)

CONFIG = replace(
    DEBUG,
    tokenizer=replace(DEBUG.tokenizer, codebook_size=32, freeze_foreground_error=0.02),
    controller=replace(DEBUG.controller, optim=replace(DEBUG.controller.optim, clip_norm=3.0)),
)

EPOCHS = 12


def healthy() -> dict[str, dict[str, list[float]]]:
    """Curves of a run that learns, by phase and metric, a value an epoch."""
    falling = [0.5 / (1 + epoch) for epoch in range(EPOCHS)]
    rising = [-0.6 + 0.1 * epoch for epoch in range(EPOCHS)]
    return {
        "tokenizer": {
            "foreground_error": [0.1] + [0.01] * (EPOCHS - 1),
            "codes_used": [27.0] * EPOCHS,
            "updates": [15.0] * EPOCHS,
            "frozen": [0.0] * EPOCHS,
        },
        "world_model": {"tokens": falling, "reward": falling, "reward_base": [0.4] * EPOCHS},
        "controller": {
            "entropy": [1.0 / (1 + epoch) for epoch in range(EPOCHS)],
            "imagined_return": rising,
            "value": [0.4] * EPOCHS,
            "grad_norm": [0.8] * EPOCHS,
        },
    }


def lines_of(curves: dict[str, dict[str, list[float]]]) -> list[MetricLine]:
    start = {"epoch": 0, "env_steps": 100, "seconds": 1.0, "phase": "collect_random", "entropy": 1.0986}
    start |= {"smallest_reward": 1.0, "largest_reward": 1.0}
    return [start] + [
        {"epoch": epoch, "env_steps": 100, "seconds": 1.0, "phase": phase}
        | {name: values[epoch] for name, values in metrics.items() if epoch < len(values)}
        for epoch in range(EPOCHS)
        for phase, metrics in curves.items()
    ]


def measured() -> dict[str, Any]:
    """What a report measures of a run that learns."""

    def step(number: int, distance: float) -> dict[str, Any]:
        sides = {"pixels": {"imagined": 15.0, "real": 16.0}, "without": {"imagined": 0.06, "real": 0.0}}
        return {
            "step": number,
            "count": 100,
            "distance": distance,
            "chance": 0.03,
            "colour": "#50a0ff",
        } | sides

    return {
        "rewards": {
            "steps": 1000,
            "events": 40,
            "recall": 0.9,
            "precision": 0.8,
            "calibration": 1.1,
            "one_outcome": False,
            "cross_entropy": {"world_model": 0.02, "base_rate": 0.2},
        },
        "drift": {"starts": 256, "steps": [step(1, 0.02), step(2, 0.06), step(4, 0.05)]},
        "returns": {"steps": 4, "imagined": 0.5, "real": 0.52, "standard_error": 0.02, "size": 0.6},
    }


def test_a_run_that_learns_shows_no_sign() -> None:
    findings = diagnose(lines_of(healthy()), CONFIG, measured())
    assert [finding.check for finding in findings] == list(NAMES)
    assert [finding.sign for finding in findings] == [False] * len(NAMES)
    assert all(finding.says and not finding.advice for finding in findings)
    assert first_sign(findings) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_runs_that_learned_show_none_at_any_time(seed: int) -> None:
    """Catch, as it was committed; those metrics do not hold the rewards' base rate."""
    path = RESULTS / "catch" / f"seed-{seed}" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for count in range(len(lines) + 1):
        assert not any(finding.sign for finding in diagnose(lines[:count], CONFIG))


def blind(curves: dict[str, dict[str, list[float]]]) -> None:
    curves["tokenizer"]["foreground_error"] = [0.3] * EPOCHS


def stuck(curves: dict[str, dict[str, list[float]]]) -> None:
    curves["world_model"]["reward"] = [0.41] * EPOCHS


def collapsed(curves: dict[str, dict[str, list[float]]]) -> None:
    curves["controller"]["entropy"] = [0.9, 0.05] + [0.01] * (EPOCHS - 2)


def collapsed_while_the_return_trembles(curves: dict[str, dict[str, list[float]]]) -> None:
    collapsed(curves)
    curves["controller"]["imagined_return"] = [(-1) ** epoch * 0.1 for epoch in range(EPOCHS)]


def running_after(curves: dict[str, dict[str, list[float]]]) -> None:
    curves["world_model"]["tokens"] = [0.5, 0.4, 0.3] + [0.1 * epoch for epoch in range(3, EPOCHS)]


def few_codes(curves: dict[str, dict[str, list[float]]]) -> None:
    curves["tokenizer"]["codes_used"] = [2.0] * EPOCHS


def drowned(curves: dict[str, dict[str, list[float]]]) -> None:
    curves["controller"] |= {"value": [9.0] * EPOCHS, "grad_norm": [7.0] * EPOCHS}


def unequal(curves: dict[str, dict[str, list[float]]]) -> None:
    curves["collect"] = {"smallest_reward": [0.1] * EPOCHS, "largest_reward": [2.0] * (EPOCHS - 1) + [5.0]}


@pytest.mark.parametrize(
    ("spoil", "check", "figures"),
    [
        (blind, "moving_pixels", {"error": 0.3, "limit": 0.02, "epoch": EPOCHS, "frozen": 0.0}),
        (stuck, "rewards", {"loss": 0.41, "base_rate": 0.4, "first": 0.41}),
        (collapsed, "entropy", {"entropy": 0.01, "highest": 1.0986, "epoch": 2, "gain": 0.1, "noise": 0.1}),
        (collapsed_while_the_return_trembles, "entropy", {"gain": -0.2, "noise": 0.2}),
        (running_after, "world_model_loss", {"loss": 1.0, "lowest": 1 / 3, "tokenizer_trains": 1.0}),
        (few_codes, "codebook", {"used": 2.0, "size": 32.0}),
        (drowned, "value_scale", {"error": 3.0, "grad_norm": 7.0, "clip_norm": 3.0}),
        (unequal, "reward_sizes", {"smallest": 0.1, "largest": 5.0}),
    ],
)
def test_each_sign_is_seen_alone_with_its_figures_and_advice(
    spoil: Callable[[dict[str, dict[str, list[float]]]], None], check: str, figures: dict[str, float]
) -> None:
    curves = healthy()
    spoil(curves)
    findings = diagnose(lines_of(curves), CONFIG)
    assert [finding.check for finding in findings if finding.sign] == [check]
    finding = first_sign(findings)
    assert finding is not None
    assert finding.advice
    assert {name: finding.figures[name] for name in figures} == pytest.approx(figures)


def test_rewards_of_different_sizes_are_no_sign_where_sizes_are_learned() -> None:
    curves = healthy()
    unequal(curves)
    config = replace(CONFIG, world_model=replace(CONFIG.world_model, reward_bins=41))
    found = only("reward_sizes", curves, config)
    assert found.sign is False
    assert found.says.endswith("and the world model learns their sizes.")


def only(check: str, curves: dict[str, dict[str, list[float]]], config: Config = CONFIG) -> Finding:
    return next(finding for finding in diagnose(lines_of(curves), config) if finding.check == check)


def test_entropy_may_fall_once_the_return_has_moved() -> None:
    curves = healthy()
    curves["controller"]["entropy"] = [0.9] * 6 + [0.01] * 6
    assert only("entropy", curves).sign is False
    assert "risen by 0.600" in only("entropy", curves).says


def test_a_tokenizer_that_rests_was_found_good_enough() -> None:
    """The gate goes by a running mean, which may lie below the mean of an epoch."""
    curves = healthy()
    curves["tokenizer"] |= {"foreground_error": [0.1, 0.021, 0.021], "frozen": [0.0] * 3 + [1.0] * 9}
    assert only("moving_pixels", curves).sign is False
    curves["tokenizer"]["frozen"] = [0.0] * EPOCHS
    assert only("moving_pixels", curves).sign is True


@pytest.mark.parametrize(("error", "sign"), [(0.03, False), (0.05, True)])
def test_a_tokenizer_that_is_not_to_rest_yet_has_some_time(error: float, sign: bool) -> None:
    curves = healthy()
    curves["tokenizer"]["foreground_error"] = [error] * EPOCHS
    assert only("moving_pixels", curves).sign is True  # it was to rest from the second epoch on
    for epoch in (None, EPOCHS):
        config = replace(CONFIG, tokenizer=replace(CONFIG.tokenizer, freeze_epoch=epoch))
        assert only("moving_pixels", curves, config).sign is sign


def test_experience_without_a_reward_is_a_sign_of_its_own() -> None:
    curves = healthy()
    curves["world_model"] |= {"reward": [0.0] * EPOCHS, "reward_base": [0.0] * EPOCHS}
    finding = only("rewards", curves)
    assert finding.sign is True
    assert "holds no reward" in finding.says
    assert "random_steps" in finding.advice


def test_a_rising_loss_is_not_laid_to_a_tokenizer_that_rests() -> None:
    curves = healthy()
    running_after(curves)
    assert "freeze_epoch" in only("world_model_loss", curves).advice
    curves["tokenizer"]["updates"] = [15.0] * 3 + [0.0] * 9
    assert "not the cause" in only("world_model_loss", curves).advice


@pytest.mark.parametrize(("rise", "sign"), [(0.05, False), (0.15, True)])
def test_a_loss_near_zero_may_multiply(rise: float, sign: bool) -> None:
    curves = healthy()
    curves["world_model"]["tokens"] = [0.5] * 3 + [0.02] * (EPOCHS - 6) + [0.02 + rise] * 3
    assert only("world_model_loss", curves).sign is sign


def test_large_values_alone_are_no_sign() -> None:
    """Dense rewards make large returns; only where clipping takes the policy's part it matters."""
    curves = healthy()
    curves["controller"]["value"] = [9.0] * EPOCHS
    assert only("value_scale", curves).sign is False


def test_too_few_figures_say_nothing() -> None:
    for lines in ([], lines_of(healthy())[:2]):
        findings = diagnose(lines, CONFIG)
        assert [finding.check for finding in findings] == list(NAMES)
        at_once = ("codebook", "reward_sizes")
        assert all(finding.sign is None or finding.check in at_once for finding in findings)
        assert all(finding.says for finding in findings)


def held_out(check: str, quality: dict[str, Any]) -> Finding:
    found = diagnose(lines_of(healthy()), CONFIG, quality)
    return next(finding for finding in found if finding.check == check)


@pytest.mark.parametrize(
    ("rewards", "sign"),
    [
        ({"calibration": 0.79}, False),  # 8 of 40 too few: within what chance does
        ({"calibration": 0.6}, True),
        ({"calibration": 2.0}, True),
        ({"calibration": 1.25, "events": 4000}, False),
        ({"calibration": 1.26, "events": 4000}, True),
        ({"cross_entropy": {"world_model": 0.17, "base_rate": 0.2}, "recall": 0.0, "precision": None}, True),
        ({"cross_entropy": {"world_model": 0.17, "base_rate": 0.2}, "one_outcome": True}, False),
    ],
)
def test_rewards_are_judged_by_held_out_steps(rewards: dict[str, Any], sign: bool) -> None:
    quality = measured()
    quality["rewards"] |= rewards
    finding = held_out("rewards", quality)
    assert finding.sign is sign
    assert "in training" not in finding.says
    assert finding.figures["calibration"] == quality["rewards"]["calibration"]


def test_an_agent_that_exploits_its_model_is_seen_whatever_the_losses_say() -> None:
    """It earns nothing in its dreams and loses in the game."""
    quality = measured()
    quality["returns"] |= {"imagined": 0.0, "real": -0.3, "size": 0.35, "standard_error": 0.09}
    finding = held_out("rewards", quality)
    assert finding.sign is True
    assert (finding.figures["imagined_return"], finding.figures["real_return"]) == (0.0, -0.3)
    quality["returns"]["standard_error"] = 0.11
    assert held_out("rewards", quality).sign is False
    quality["returns"] |= {"standard_error": 0.01, "real": -0.08}
    assert held_out("rewards", quality).sign is False, "clear, but small beside what the game pays"


@pytest.mark.parametrize("rewards", [None, {"events": 9}, {"calibration": None}])
def test_without_held_out_rewards_the_loss_in_training_is_named(rewards: dict[str, Any] | None) -> None:
    quality = measured()
    quality["rewards"] = rewards if rewards is None else quality["rewards"] | rewards
    quality["returns"] = None
    finding = held_out("rewards", quality)
    assert finding.sign is False
    assert finding.says.startswith("Judged by the loss in training, for want of held-out rewards")


def test_dreams_that_drift_are_seen_with_the_step_and_the_colour() -> None:
    quality = measured()
    steps = quality["drift"]["steps"]
    steps[1] |= {"distance": 0.4, "without": {"imagined": 0.39, "real": 0.0}}
    finding = held_out("dreams", quality)
    assert finding.sign is True
    assert "After 2 imagined steps at least 40% of the frames" in finding.says
    assert "Of #50a0ff" in finding.says
    assert "39% of the imagined frames" in finding.says
    for harmless in ({"distance": 0.25}, {"chance": 0.4}, {"count": 29}):
        assert held_out("dreams", measured_with(steps[1] | harmless)).sign is not True


def measured_with(step: dict[str, Any]) -> dict[str, Any]:
    return measured() | {"drift": {"starts": 256, "steps": [step]}}


@pytest.mark.parametrize(
    "quality",
    [
        {},
        {"rewards": 3, "drift": [], "returns": "x"},
        {"rewards": {"events": "40"}, "drift": {"steps": {}}, "returns": {"steps": None}},
        {"drift": {"steps": [None, 7, {"step": 1, "count": 100}, {"step": True}]}},
    ],
)
def test_a_quality_file_of_anything_is_no_quality(quality: dict[str, Any]) -> None:
    lines = lines_of(healthy())
    assert diagnose(lines, CONFIG, quality) == diagnose(lines, CONFIG)


def patch_kind(**settings: Any) -> Config:
    return replace(CONFIG, tokenizer=replace(CONFIG.tokenizer, kind="patches", **settings))


def test_what_few_codes_mean_depends_on_the_tokenizer() -> None:
    curves = healthy()
    few_codes(curves)
    exact, rough = patch_kind(), patch_kind(patch_threshold=0.01)
    assert only("codebook", curves, exact).sign is False
    assert "more than tokenizer.patch_threshold" in only("codebook", curves, rough).says
    means = only("codebook", curves, patch_kind(patch_means=True))
    assert means.sign is True
    assert "random_steps" in means.advice
    for levels, sign in (((3, 3, 3), True), ((2, 2, 2, 2), False)):
        tokenizer = replace(CONFIG.tokenizer, kind="fsq", fsq_levels=levels)
        found = only("codebook", curves, replace(CONFIG, tokenizer=tokenizer))
        assert (found.sign, found.figures["size"]) == (sign, math.prod(levels))
        assert "restart" not in found.advice


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run under way: no weights yet, and a line that is being written."""
    curves = healthy()
    stuck(curves)
    few_codes(curves)
    folder = create_run_folder(tmp_path / "run", CONFIG)
    texts = [json.dumps(line) + "\n" for line in lines_of(curves)]
    folder.metrics.write_text("".join(texts) + '{"epoch": 12, "pha')
    return folder.path


def test_the_command_says_where_to_begin(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(run)]) == 0
    shown = capsys.readouterr()
    assert "1. Error on moving pixels: fine" in shown.out
    assert "2. Rewards foretold: SIGN\n   Judged by the loss in training" in shown.out
    assert "3. Drift of dreams: unknown" in shown.out
    assert "6. Codebook use: SIGN" in shown.out
    assert shown.out.count("   Try: ") == 2
    assert shown.out.splitlines()[-1].startswith("Begin with the first sign: rewards foretold.")
    assert "1 of 38 lines of metrics.jsonl cannot be read" in shown.err
    assert not list(run.glob("*.html"))


def test_the_command_gives_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(run), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["epoch"], data["env_steps"]) == (2, 11, 100)
    assert data["first_sign"] == "rewards"
    assert [check["check"] for check in data["checks"]] == list(NAMES)
    expected = [False, True, None, False, False, True, False, False]
    assert [check["sign"] for check in data["checks"]] == expected
    assert data["checks"][1]["figures"]["base_rate"] == pytest.approx(0.4)
    assert data["returns"] == {"agent": None, "random": None}


def test_the_command_heeds_what_the_report_measured_unless_the_run_has_gone_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = {"epoch": EPOCHS - 1, "env_steps": 100}
    for earlier in ({}, {"epoch": EPOCHS - 2}, {"env_steps": 90}):
        (run / "quality.json").write_text(json.dumps(measured() | of | earlier))
        assert main(["diagnose", str(run)]) == 0
        shown = capsys.readouterr()
        assert ("3. Drift of dreams: fine" in shown.out) == (not earlier)
        assert ("2. Rewards foretold: fine" in shown.out) == (not earlier)
        assert ("has gone on since quality.json was measured" in shown.err) == bool(earlier)


@pytest.mark.parametrize(
    ("spoil", "code", "sentence"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), 1, "has no line yet: there is nothing to diagnose"),
        (lambda run: (run / "metrics.jsonl").write_text("not JSON\n"), 1, "has no line yet"),
        (lambda run: (run / "config.json").unlink(), 2, "is not a run folder"),
        (lambda run: (run / "config.json").write_text("{}"), 2, "is not the configuration of a run"),
    ],
)
def test_what_cannot_be_diagnosed_is_said(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    code: int,
    sentence: str,
) -> None:
    spoil(run)
    assert main(["diagnose", str(run)]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rem-atari: ")
    assert sentence in last
