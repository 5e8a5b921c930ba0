"""`rem-atari scores`: published figures come out of the published scores, and runs are compared fairly."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from run_folders import DEBUG, add_evaluation, files_in, make_scored_run

from rem_atari.cli import main
from rem_atari.runs.folder import create_run_folder
from rem_atari.scores import plots as score_plots
from rem_atari.scores.aggregates import METRICS, THRESHOLDS, aggregate
from rem_atari.scores.published import (
    atari100k_games,
    human_normalised,
    published_agents,
    published_scores,
    reference_scores,
)
from rem_atari.scores.runs import NoScoreError, read_run_score


def normalised(agent: str) -> dict[str, list[float]]:
    scores = published_scores()[agent]
    return {game: [human_normalised(game, score) for score in scores[game]] for game in scores}


def run_scores(*words: str | Path) -> int:
    return main(["scores", "--resamples", "20", *map(str, words)])


def says(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert run_scores(*words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("agent", "mean", "median", "iqm", "gap", "above_human"),
    [("REM", 1.222, 0.280, 0.673, 0.482, 12), ("IRIS", 1.046, 0.289, 0.501, 0.512, 9)],
)
def test_the_published_figures_come_out(
    agent: str, mean: float, median: float, iqm: float, gap: float, above_human: int
) -> None:
    """Of arXiv 2402.05643, table 2 and appendix, recomputed from every seed's score."""
    result = aggregate(agent, normalised(agent), resamples=50, seed=0)
    assert [round(result.metrics[name].value, 3) for name in METRICS] == [mean, median, iqm, gap]
    assert (result.games, result.num_scores, result.above_human) == (26, 130, above_human)


def test_the_table_is_complete() -> None:
    assert len(atari100k_games()) == 26
    assert {"SimPLe", "TWM", "IRIS", "DreamerV3", "REM", "Simulus"} <= set(published_agents())
    assert reference_scores("Breakout") == (1.7, 30.5)
    assert human_normalised("Breakout", 30.5) == 1
    for agent in published_agents():
        assert published_scores()[agent].keys() == set(atari100k_games())


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    """Drawn here by numpy alone: every game's scores anew, 95% of the draws."""
    scores = normalised("IRIS")
    result = aggregate("IRIS", scores, resamples=1_000, seed=0)
    matrix, generator = np.array(list(scores.values())).T, np.random.default_rng(0)
    draws = matrix[generator.integers(5, size=(2_000, 5, 26)), np.arange(26)]
    plain = {
        "mean": draws.mean(axis=(1, 2)),
        "median": np.median(draws.mean(axis=1), axis=1),
        "IQM": np.sort(draws.reshape(2_000, -1), axis=1)[:, 32:-32].mean(axis=1),
        "optimality gap": 1 - np.minimum(draws, 1).mean(axis=(1, 2)),
    }
    for name in METRICS:
        width = np.ptp(np.percentile(plain[name], [2.5, 97.5]))
        wanted = np.percentile(plain[name], [2.5, 97.5])
        assert result.metrics[name].interval == pytest.approx(wanted, abs=0.15 * width)


def test_the_same_seed_draws_the_same_and_numpys_own_numbers_go_on() -> None:
    scores = {"Pong": [0.1, 0.5, 0.9], "Boxing": [1.0, 2.0, 4.0]}
    np.random.seed(1)
    wanted = np.random.random()
    np.random.seed(1)
    results = [aggregate("a", scores, resamples=50, seed=seed).metrics for seed in (3, 3, 4)]
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert np.random.random() == wanted


def test_every_game_weighs_the_same_however_many_seeds_it_has() -> None:
    uneven = aggregate("a", {"Pong": [0.0, 1.0], "Boxing": [2.0, 4.0, 6.0]}, resamples=200, seed=0)
    assert uneven.metrics["mean"].value == pytest.approx((0.5 + 4.0) / 2)
    # As if each of Pong's scores were there three times and each of Boxing's twice.
    alike = aggregate(
        "a", {"Pong": [0.0] * 3 + [1.0] * 3, "Boxing": [2.0, 2.0, 4.0, 4.0, 6.0, 6.0]}, resamples=9, seed=0
    )
    for name in METRICS:
        assert uneven.metrics[name].value == pytest.approx(alike.metrics[name].value)
    low, high = uneven.metrics["mean"].interval
    # Two scores drawn of {0, 1} and three of {2, 4, 6}: the means' ends are 1 and 3.5.
    assert 1.0 <= low < uneven.metrics["mean"].value < high <= 3.5
    assert (uneven.fewest_seeds, uneven.most_seeds, uneven.num_scores) == (2, 3, 5)


def test_one_seed_a_game_has_no_interval() -> None:
    result = aggregate("a", {"Pong": [0.5], "Boxing": [2.0]}, resamples=10, seed=0)
    assert all(result.metrics[name].interval is None for name in METRICS)
    assert result.profile_interval is None


def test_a_profile_is_the_share_of_scores_above() -> None:
    result = aggregate("a", {"Pong": [0.5, 1.0], "Boxing": [2.0, 3.0]}, resamples=10, seed=0)
    at = dict(zip(THRESHOLDS.round(3), result.profile, strict=True))
    assert [at[tau] for tau in (0.0, 0.5, 0.95, 1.0, 2.5, 3.0)] == [1.0, 0.75, 0.75, 0.5, 0.25, 0.0]
    low, high = result.profile_interval
    assert (low <= result.profile).all()
    assert (result.profile <= high).all()


@pytest.mark.parametrize(
    ("scores", "resamples", "sentence"),
    [({}, 10, "scores a game"), ({"Pong": []}, 10, "at least one"), ({"Pong": [1.0]}, 0, "resamples is 0")],
)
def test_nothing_to_aggregate_is_refused(
    scores: dict[str, list[float]], resamples: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        aggregate("a", scores, resamples=resamples, seed=0)


def test_without_runs_the_published_agents_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = says(capsys)
    assert "1.222 [" in shown
    assert "12 of 26" in shown


def test_the_best_and_the_worst_agent_are_not_cut_off_by_the_plot_s_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bars may have no width at all."""
    results = [
        aggregate(name, {"Pong": [score] * 3}, resamples=5, seed=0)
        for name, score in (("best", 0.75), ("worst", 0.25))
    ]
    figures = []
    monkeypatch.setattr(score_plots, "replace_file", lambda path, data: None)
    monkeypatch.setattr(score_plots, "Figure", lambda **size: figures.append(Figure(**size)) or figures[-1])
    score_plots.plot_scores(tmp_path / "scores.png", results, highlight="best")
    for axes in figures[0].axes[: len(METRICS)]:
        low, high = axes.get_xlim()
        assert low < 0.25
        assert high > 0.75


def test_runs_are_compared_on_their_own_games(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make_scored_run(tmp_path / f"{game}-{seed}", game, score, seed=seed).path
        for game, score in (("Breakout", 30.5), ("Pong", -20.7))
        for seed in range(3)
    ]
    before = files_in(tmp_path)
    table, picture = tmp_path / "scores.csv", tmp_path / "scores.png"
    shown = says(capsys, *runs, "--name", "mine", "--csv", table, "--plot", picture)
    assert files_in(tmp_path) - before == {"scores.csv", "scores.png"}
    with table.open() as file:
        rows = {(row["agent"], row["metric"]): row for row in csv.DictReader(file)}
    assert {agent for agent, _ in rows} == {*published_agents(), "mine"}
    # A human's score on Breakout, random play's on Pong: 1 and 0.
    mine = rows["mine", "mean"]
    assert [float(mine[name]) for name in ("value", "low", "high")] == [0.5, 0.5, 0.5]
    assert (mine["games"], mine["scores"]) == ("2", "6")
    rem = normalised("REM")
    wanted = np.mean([np.mean(rem["Breakout"]), np.mean(rem["Pong"])])
    assert float(rows["REM", "mean"]["value"]) == pytest.approx(wanted, rel=1e-5)
    assert "compared on 2 of the 26 games" in shown
    assert "too narrow" not in shown
    assert shown.splitlines()[2].split()[:5] == ["Breakout", "3", "100", "30.5", "1.000"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600


def test_too_few_seeds_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_scored_run(tmp_path / str(seed), "Pong", float(seed), seed=seed).path for seed in range(2)]
    assert "one run a game, so nothing is known of how much depends on the seed" in says(capsys, runs[0])
    assert "a game has only 2 seeds; from fewer than 3 an interval is too narrow" in says(capsys, *runs)


def test_what_speaks_against_one_agent_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same = (make_scored_run(tmp_path / name, "Pong", 0.0).path for name in ("one", "same"))
    assert "More than one run has Pong with seed 0" in says(capsys, one, same)
    longer = make_scored_run(tmp_path / "longer", "Boxing", 0.0, epochs=3).path
    assert "differ in more settings than game and seed" in says(capsys, one, longer)
    other_game = make_scored_run(tmp_path / "other", "Boxing", 0.0, seed=4).path
    assert "differ in more settings" not in says(capsys, one, other_game)


def test_runs_without_a_score_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = make_scored_run(tmp_path / "good", "Pong", 0.0).path
    catch = create_run_folder(tmp_path / "catch", DEBUG).path
    new = make_scored_run(tmp_path / "new", "Pong", 0.0)
    new.metrics.unlink()
    assert run_scores(good, catch, new.path) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(f"{catch} plays rem_atari/Catch-v0" in line for line in lines)
    assert any(f"rem-atari evaluate {new.path} does it" in line for line in lines)
    assert run_scores(catch, new.path) == 2
    assert "of 2 runs none has a score" in capsys.readouterr().err


def test_the_weights_that_trained_longest_count(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", "Pong", 1.0)
    assert (read_run_score(run.path).score, read_run_score(run.path).source) == (1.0, "training")
    # Weights of an earlier epoch do not stand for the run; its last ones do, and more games of them.
    add_evaluation(run, 7, epoch=1, mean_return=5.0)
    assert read_run_score(run.path).score == 1.0
    add_evaluation(run, 9, epoch=2, mean_return=6.0)
    found = read_run_score(run.path)
    assert (found.score, found.episodes, found.source, found.notes) == (6.0, 50, "evaluate", [])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 9}', '{"step": 9, "epoch": 2, "episodes": NaN}'])
def test_a_damaged_evaluation_is_passed_over(tmp_path: Path, text: str) -> None:
    run = make_scored_run(tmp_path / "run", "Pong", 1.0)
    add_evaluation(run, 8, mean_return=3.0)
    add_evaluation(run, 9).write_text(text)
    (run.evaluation / "step-10").mkdir()
    assert read_run_score(run.path).score == 3.0


def test_a_link_in_place_of_an_evaluation_is_not_followed(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", "Pong", 1.0)
    path = add_evaluation(run, 9, mean_return=3.0)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert read_run_score(run.path).score == 1.0


def test_a_run_that_is_not_done_or_was_cut_short_says_so(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", "Pong", 1.0, epochs=5)
    run.metrics.unlink()
    add_evaluation(run, 9, epoch=2)
    assert read_run_score(run.path).notes == ["has trained for 2 of 5 epochs"]
    cut = make_scored_run(tmp_path / "cut", "Pong", 1.0, max_steps=500)
    assert "cut its games short" in read_run_score(cut.path).notes[0]


def test_a_game_without_a_human_has_no_score(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", "Tetris", 1.0)
    with pytest.raises(NoScoreError, match="plays Tetris, for which there is no human's score"):
        read_run_score(run.path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--name", "REM"], "is the name of a published agent"),
        (["--resamples", "0"], "--resamples is 0"),
        (["--plot", "scores.jpg"], "has the ending '.jpg', wanted .png"),
        (["--csv", "nowhere/scores.csv"], "there is no folder nowhere"),
        (["{run}", "{run}"], "is named twice"),
        (["{run}/checkpoints"], "is not a run folder"),
    ],
)
def test_wrong_use_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    run = make_scored_run(tmp_path / "run", "Pong", 1.0).path
    assert main(["scores", *(word.format(run=run) for word in words)]) == 2
    assert sentence in capsys.readouterr().err


def test_settings_that_do_not_change_an_agent_may_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_scored_run(tmp_path / "one", "Pong", 0.0)
    config = one.load_config()
    other = replace(config, device="cuda", threads=4, seed=5, env=replace(config.env, game="Boxing"))
    two = create_run_folder(tmp_path / "two", other)
    two.metrics.write_text(one.metrics.read_text())
    assert "differ in more settings" not in says(capsys, one.path, two.path)
