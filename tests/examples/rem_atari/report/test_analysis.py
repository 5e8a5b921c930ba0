"""What the report measures, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rem_atari.report.analysis import (
    TokenPredictions,
    TokenScores,
    codebook_use,
    fit_baselines,
    frame_errors,
    has_one_outcome,
    psnr,
    score_events,
    score_tokens,
)
from rem_atari.report.charts import charts_of, make_axis
from rem_atari.report.history import Returns, returns_of, throughput, values_of, verdict, was_trained
from rem_atari.report.quality import Comparison, compare_frames, compare_tokens
from rem_atari.report.text import count, duration, number, size

BLACK, WHITE = 0, 255


def frames_of(*levels: int) -> np.ndarray:
    """One frame of 2x2 pixels for each level."""
    return np.stack([np.full((2, 2, 3), level, dtype=np.uint8) for level in levels])


def test_psnr_is_ten_decibels_for_each_tenfold_error() -> None:
    assert psnr(4.0) == 0.0
    assert psnr(0.4) == pytest.approx(10.0)
    assert psnr(0.04) == pytest.approx(20.0)
    assert psnr(0.0) == math.inf


def test_frame_errors_by_hand() -> None:
    frames = frames_of(BLACK, WHITE)
    redrawn = frames.copy()
    redrawn[1, 0, 0] = BLACK  # one of four pixels of the second frame is off by 2, the whole range
    foreground = np.zeros((2, 2, 2), dtype=bool)
    foreground[1, 0] = True  # that pixel and one that is right
    moving = np.zeros((2, 2, 2), dtype=bool)
    moving[1] = True
    errors = frame_errors(frames, redrawn, foreground=foreground, moving=moving)
    assert errors.mse == pytest.approx(4.0 / 8)
    assert errors.psnr == pytest.approx(10 * math.log10(4.0 / 0.5))
    assert errors.foreground_mse == pytest.approx(4.0 / 2)
    assert errors.moving_mse == pytest.approx(4.0 / 4)
    np.testing.assert_allclose(errors.per_frame, [0.0, 1.0])


def test_frame_errors_take_one_frame_for_all_and_need_no_foreground() -> None:
    nothing = np.zeros((2, 2, 2), dtype=bool)
    frames = frames_of(BLACK, WHITE)
    errors = frame_errors(frames, frames_of(BLACK)[0], foreground=nothing, moving=nothing)
    assert errors.mse == pytest.approx(2.0)
    assert errors.foreground_mse is None
    assert errors.moving_mse is None
    # The PSNR is the same error once more.
    assert [row.measure for row in compare_frames(errors, errors)] == ["Reconstruction error (MSE)"]


def test_codebook_use_counts_codes_and_gives_perplexity() -> None:
    even = codebook_use(np.array([[0, 1], [2, 3]]), 8)
    assert (even.used, even.size) == (4, 8)
    assert even.perplexity == pytest.approx(4.0)
    skewed = codebook_use(np.array([0, 0, 0, 1]), 2)
    assert skewed.perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_unigrams_count_with_their_pseudo_counts() -> None:
    tokens = np.array([[0, 1], [0, 2]])  # two frames of two places, three codes
    baselines = fit_baselines(tokens, tokens, 3)
    np.testing.assert_allclose(baselines.unigram, [3 / 7, 2 / 7, 2 / 7])
    np.testing.assert_allclose(baselines.place_unigram[0], [(2 + 3 / 7) / 3, 2 / 7 / 3, 2 / 7 / 3])
    np.testing.assert_allclose(baselines.place_unigram.sum(axis=1), 1.0)


def test_unigram_cross_entropy_by_hand() -> None:
    tokens = np.array([[0, 1], [0, 2]])
    baselines = fit_baselines(tokens, tokens, 3)
    target, previous = np.array([[0, 2]]), np.array([[0, 1]])
    scores = score_tokens(baselines.predict_unigram(target), target, previous)
    assert scores.cross_entropy == pytest.approx(-(math.log(3 / 7) + math.log(2 / 7)) / 2)
    assert scores.accuracy == 0.5  # its one choice, code 0, hits the first place
    assert scores.changed_accuracy == 0.0
    assert scores.changed_share == 0.5


def test_copy_weight_maximises_the_likelihood() -> None:
    generator = np.random.default_rng(0)
    previous = generator.integers(0, 5, size=(200, 8))
    tokens = np.where(
        generator.random(previous.shape) < 0.8, previous, generator.integers(0, 5, previous.shape)
    )
    baselines = fit_baselines(tokens, previous, 5)
    same, chance = (tokens == previous).astype(float), baselines.unigram[tokens]

    def likelihood(weight: float) -> float:
        return float(np.log(weight * same + (1 - weight) * chance).sum())

    best = max(np.linspace(0.01, 0.99, 981), key=likelihood)
    assert baselines.copy_weight == pytest.approx(best, abs=0.003)


def test_copy_stays_possible_to_contradict() -> None:
    still = np.arange(200).reshape(50, 4) % 2  # both codes occur, and no token ever changes
    baselines = fit_baselines(still, still, 2)
    assert 0.95 < baselines.copy_weight < 1.0
    surprise = baselines.predict_copy(np.array([[1]]), np.array([[0]]))
    assert np.isfinite(surprise.log_prob).all()


def test_copy_predicts_the_frame_before() -> None:
    target, previous = np.array([[0, 1, 1]]), np.array([[0, 1, 0]])
    baselines = fit_baselines(target, previous, 2)
    predictions = baselines.predict_copy(target, previous)
    weight, unigram = baselines.copy_weight, baselines.unigram
    expected = [
        weight + (1 - weight) * unigram[0],
        weight + (1 - weight) * unigram[1],
        (1 - weight) * unigram[1],
    ]
    np.testing.assert_allclose(np.exp(predictions.log_prob[0]), expected)
    scores = score_tokens(predictions, target, previous)
    assert (scores.accuracy, scores.changed_accuracy) == (pytest.approx(2 / 3), 0.0)


def test_accuracy_of_changed_tokens_by_hand() -> None:
    target, previous = np.array([[1, 2, 3, 4]]), np.array([[1, 0, 0, 0]])
    predictions = TokenPredictions(np.log(np.full((1, 4), 0.25)), np.array([[9, 2, 3, 9]]))
    scores = score_tokens(predictions, target, previous)
    assert scores.cross_entropy == pytest.approx(math.log(4))
    assert scores.accuracy == 0.5
    assert scores.changed_accuracy == pytest.approx(2 / 3)
    assert (scores.changed_share, scores.count) == (0.75, 4)


def test_events_by_hand() -> None:
    """Classes -1, 0, +1 as 0, 1, 2: of three rewards one is hit, one taken for its opposite, one missed."""
    target = np.array([[1], [1], [1], [2], [2], [0]])
    choice = np.array([[1], [1], [2], [2], [0], [1]])
    chances = np.array([[0.9], [0.9], [0.3], [0.8], [0.1], [0.3]])
    usual = np.array([[0.9], [0.9], [0.3], [0.1], [0.6], [0.7]])
    scores = score_events(TokenPredictions(np.log(chances), choice), target, 1, usual)
    assert (scores.steps, scores.events, scores.predicted) == (6, 3, 3)
    assert scores.recall == pytest.approx(1 / 3)
    assert scores.base_rate == 0.5
    assert scores.precision == pytest.approx(1 / 3)
    assert scores.chance == pytest.approx((0.8 + 0.1 + 0.3) / 3)
    assert scores.calibration == pytest.approx((0.1 + 0.1 + 0.7 + 0.9 + 0.4 + 0.3) / 3)


@pytest.mark.parametrize(
    ("signs", "ended", "one_outcome"),
    [
        ([], [], True),
        ([0, 0, 0], [0, 0, 1], True),
        ([1, 1, 1], [0, 0, 1], True),
        ([0, 0, 1, 0, 1], [0, 0, 1, 0, 1], True),  # a perfect player of Catch
        ([0, 0, 1, 0, -1], [0, 0, 1, 0, 1], False),
        ([0, 1, 1, 0, 1], [0, 0, 1, 0, 1], False),
        ([0, 0, 1, 0, 0], [0, 0, 1, 0, 1], False),
    ],
)
def test_rewards_that_tell_no_more_than_ends_have_one_outcome(
    signs: list[int], ended: list[int], one_outcome: bool
) -> None:
    assert has_one_outcome(np.array(signs, dtype=np.int64), np.array(ended, dtype=bool)) is one_outcome


@pytest.mark.parametrize("steps", [0, 4])
def test_what_never_happened_has_no_recall(steps: int) -> None:
    usual = np.ones((steps, 1), dtype=np.int64)
    scores = score_events(TokenPredictions(np.zeros((steps, 1)), usual), usual, 1, np.ones((steps, 1)))
    assert (scores.steps, scores.events, scores.predicted) == (steps, 0, 0)
    assert (scores.recall, scores.precision, scores.chance, scores.calibration) == (None,) * 4
    assert scores.base_rate == (0.0 if steps else None)


def test_scoring_nothing_is_an_error() -> None:
    nothing = np.zeros((0, 4), dtype=np.int64)
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        score_tokens(TokenPredictions(nothing.astype(float), nothing), nothing, nothing)


@pytest.mark.parametrize(
    ("ours", "theirs", "higher_is_better", "passed"),
    [
        (1.0, 2.0, False, True),
        (2.0, 1.0, False, False),
        (2.0, 1.0, True, True),
        (1.0, 1.0, True, False),  # a draw is no win
        (1.0, 1.0, False, False),
        (math.nan, 1.0, False, False),
        (math.nan, 1.0, True, False),
    ],
)
def test_comparison_passes_only_where_the_agent_is_strictly_better(
    ours: float, theirs: float, higher_is_better: bool, passed: bool
) -> None:
    row = Comparison(
        measure="m", ours=ours, rival="r", theirs=theirs, higher_is_better=higher_is_better, explanation="e"
    )
    assert row.passed is passed


def test_token_comparisons_name_their_rivals() -> None:
    def scores(cross_entropy: float, changed: float | None) -> TokenScores:
        return TokenScores(
            cross_entropy=cross_entropy, accuracy=0.5, changed_accuracy=changed, changed_share=0.1, count=10
        )

    rows = compare_tokens(
        scores(1.0, 0.3),
        unigram=scores(2.0, 0.0),
        place_unigram=scores(1.5, 0.2),
        copy=scores(0.5, 0.0),
        copy_weight=0.9,
    )
    outcome = {(row.measure, row.rival): row.passed for row in rows}
    assert outcome == {
        ("Token cross-entropy, nats", "unigram"): True,
        ("Token cross-entropy, nats", "unigram per place"): True,
        ("Token cross-entropy, nats", "copy the last frame"): False,
        ("Token accuracy", "copy the last frame"): False,
        ("Accuracy where tokens changed", "unigram per place"): True,
    }


def test_values_leave_out_other_phases_and_missing_numbers() -> None:
    lines = [
        {"phase": "tokenizer", "epoch": 0, "loss": 2.0},
        {"phase": "tokenizer", "epoch": 1, "loss": None},
        {"phase": "world_model", "epoch": 1, "loss": 7.0},
        {"phase": "tokenizer", "epoch": 2, "loss": 1},
        {"phase": "tokenizer", "loss": 1.0},
    ]
    series = values_of(lines, "tokenizer", "loss")
    assert (series.x, series.y) == ([0.0, 2.0], [2.0, 1.0])


def test_trained_needs_an_update() -> None:
    resting = [{"phase": "controller", "epoch": 0, "updates": 0}]
    assert not was_trained(resting, "controller")
    assert was_trained([*resting, {"phase": "controller", "epoch": 1, "updates": 3}], "controller")


def test_returns_come_from_the_last_line_with_their_standard_error() -> None:
    lines = [
        {"phase": "evaluate", "mean_return": 9.0, "episodes": 1, "returns": [9.0]},
        {"phase": "evaluate", "mean_return": 2.0, "episodes": 4, "unfinished": 1, "returns": [1, 1, 3, 3]},
    ]
    returns = returns_of(lines, "evaluate")
    assert returns is not None
    assert (returns.mean, returns.episodes, returns.unfinished) == (2.0, 4, 1)
    assert returns.standard_error == pytest.approx(math.sqrt(4 / 3) / 2)
    assert returns_of(lines, "random") is None


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [(1.0, 0.1, "above"), (-1.0, 0.1, "below"), (0.2, 0.1, "unclear"), (1.0, None, "unclear")],
)
def test_verdict_needs_two_standard_errors(mean: float, error: float | None, expected: str) -> None:
    agent = Returns(mean=mean, standard_error=error, episodes=8)
    assert verdict(agent, Returns(mean=0.0, standard_error=0.1, episodes=8)) == expected


def test_throughput_divides_all_work_by_all_time() -> None:
    lines = [
        {"phase": "collect_random", "seconds": 1.0, "steps": 60, "phase_seconds": 0.5},
        {"phase": "collect", "seconds": 2.0, "steps": 100, "phase_seconds": 1.0},
        {"phase": "tokenizer", "epoch": 0, "seconds": 5.0, "updates": 10, "phase_seconds": 2.0},
        {"phase": "tokenizer", "epoch": 1, "seconds": 10.0, "updates": 20, "phase_seconds": 4.0},
    ]
    for line in lines:
        line.setdefault("epoch", 0)
    rows = {row.phase: row for row in throughput(lines)}
    assert list(rows) == ["collect_random", "collect", "tokenizer", "other"]
    assert (rows["tokenizer"].amount, rows["tokenizer"].rate) == (30.0, 5.0)
    assert (rows["collect"].rate, rows["collect"].unit) == (100.0, "steps")
    assert (rows["collect_random"].rate, rows["collect_random"].unit) == (120.0, "steps")
    assert rows["other"].seconds == pytest.approx(2.5)
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)
    assert throughput([]) == []


def test_charts_leave_out_what_has_no_point_and_count_epochs_from_one() -> None:
    assert charts_of([]) == []
    (chart,) = charts_of([{"phase": "tokenizer", "epoch": 0, "loss": 3.0}])
    assert (chart.title, chart.drawn[0].x, chart.drawn[0].y) == ("Tokenizer loss", [1.0], [3.0])


def test_the_curve_of_collecting_shows_the_policys_games_alone() -> None:
    returns = {"epoch": 0, "mean_game_return": 1.0}
    lines = [
        returns | {"phase": "collect_random", "env_steps": 50},
        returns | {"phase": "collect", "env_steps": 80},
    ]
    (chart,) = charts_of(lines)
    assert [(series.name, series.x) for series in chart.drawn] == [("while collecting", [80.0])]


def test_the_imagined_return_is_not_called_a_discounted_one() -> None:
    (chart,) = charts_of([{"phase": "controller", "epoch": 0, "imagined_return": 3.0}])
    assert "λ" not in chart.title
    assert chart.drawn[0].name == "undiscounted sum"


@pytest.mark.parametrize("values", [[0.0], [3.0], [-2.0, -2.0], [0.1, 0.7], [1e-9, 2e-9], [5, 12_345]])
def test_axis_spans_its_values_with_round_ticks(values: list[float]) -> None:
    axis = make_axis(values, start=100.0, stop=0.0)
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    assert 2 <= len(axis.ticks) <= 7
    assert axis.place(axis.low) == 100.0
    assert axis.place(axis.high) == 0.0


def test_axis_turns_logarithmic_over_wide_ratios_only() -> None:
    wide = make_axis([0.01, 10.0], start=0.0, stop=3.0, may_log=True)
    assert wide.log
    assert wide.place(0.1) == pytest.approx(1.0)
    assert not make_axis([0.0, 10.0], start=0.0, stop=1.0, may_log=True).log
    assert not make_axis([1.0, 10.0], start=0.0, stop=1.0, may_log=True).log


def test_numbers_as_people_write_them() -> None:
    assert [number(value) for value in (None, 0, -1.5, 0.00761, 12_345.0)] == [
        "–",
        "0",
        "−1.50",
        "0.00761",
        "12,345",
    ]
    assert number(math.nan) == "not a number"
    assert number(math.inf) == "∞"
    assert [duration(seconds) for seconds in (1.26, 48, 228, 7_500)] == [
        "1.3 s",
        "48 s",
        "3 min 48 s",
        "2 h 5 min",
    ]
    assert [size(amount) for amount in (812, 4_100, 3_200_000)] == ["812 B", "4.1 kB", "3.2 MB"]
    assert (count(1, "epoch"), count(3_000, "step")) == ("1 epoch", "3,000 steps")
