"""The page of results says what the raw results say, and a finished run's raw results are taken in whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from run_folders import DEBUG, RIVALS, add_evaluation, files_in

from rem_atari.report.history import Returns
from rem_atari.runs.folder import RunFolder, create_run_folder

CHECKOUT = Path(__file__).resolve().parents[3]
RESULTS = CHECKOUT / "docs" / "results" / "data"

AGAIN = "run `python docs/tools/figures.py`"

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    """docs/tools/figures.py, which is a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(CHECKOUT / "docs" / "tools"), *sys.path])
        import figures

        yield figures


@pytest.fixture(scope="module")
def raw(figures: ModuleType) -> ModuleType:
    return sys.modules["raw_results"]


def test_the_page_is_up_to_date(figures: ModuleType, raw: ModuleType) -> None:
    assert figures.PAGE.read_text() == figures.render_page(raw.load_experiments()), AGAIN


def test_the_curves_are_up_to_date(figures: ModuleType, raw: ModuleType) -> None:
    """Their bytes depend on the version of matplotlib; what they were drawn from is written in them."""
    experiments = raw.load_experiments()
    drawn = {path.stem: path.read_text() for path in figures.CURVES.glob("*.svg")}
    assert set(drawn) == {experiment.name for experiment in experiments}, AGAIN
    for experiment in experiments:
        assert figures.digest(experiment) in drawn[experiment.name], AGAIN


def test_raw_results_are_small_and_say_how_they_were_made(raw: ModuleType) -> None:
    for experiment in raw.load_experiments():
        assert experiment.results, experiment.name
        for result in experiment.results:
            folder = RESULTS / experiment.name / result.name
            assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000, folder
            assert result.command, folder
            assert result.commit, folder
            assert result.agent is not None, folder
            assert result.random is not None, folder


def line(phase: str, epoch: int, **values: object) -> dict[str, object]:
    at = {"epoch": epoch, "env_steps": 100 * epoch, "seconds": 60.0 * epoch, "cpu_seconds": 50.0 * epoch}
    return at | {"phase": phase} | values


def finished_run(path: Path, *, epochs: int = 4) -> RunFolder:
    """A run folder whose agent went from as good as random play to four times as good."""
    run = create_run_folder(path, DEBUG)
    lines = [line("random", 0, mean_return=0.5, episodes=16, returns=[0.0, 1.0] * 8)]
    for epoch in range(epochs):
        mean = 0.5 + 1.5 * epoch / (epochs - 1)
        lines.append(line("collect", epoch, mean_game_return=mean))
        lines.append(line("world_model", epoch, loss=1.23456789012345, updates=7.0))
        returns = {"mean_return": mean, "episodes": 2, "returns": [mean - 1, mean + 1]}
        lines.append(line("evaluate", epoch, **returns))
    lines.append(line("collect", epochs, interrupted=1))
    run.metrics.write_text("".join(json.dumps(each) + "\n" for each in lines))
    machine = {"processor": "a processor", "cores": 2, "threads": 1, "device": "cpu"}
    session = {"command": "train", "commit": COMMIT, "versions": {"torch": "2.9"}, **machine}
    run.sessions.write_text(json.dumps(session) + "\n")
    (run.path / "quality.json").write_text(json.dumps(QUALITY))
    return run


QUALITY = {
    "schema": 1,
    "tokens": {
        "cross_entropy": {"world_model": 0.25, "unigram": 2, "unigram_per_place": 1, "copy_last_frame": 0.5},
        "changed_accuracy": {"world_model": 0.75},
    },
    "rewards": {"recall": 0.9, "precision": None, "events": 1, "steps": 4},
    "ends": {"recall": None, "precision": 1.0, "events": 0, "steps": 0},
    "horizon": {
        "starts": 3,
        "steps": [
            {"psnr": {"imagined": 30.04, "copy_last_frame": 20.0, "tokenizer": None}},
            {"psnr": {"imagined": 15.0, "copy_last_frame": 18.0, "tokenizer": 40.0}},
        ],
    },
    "frames": {
        "moving_mse": {"tokenizer": 0.0123456},
        "codebook": {"used": 9, "size": 16, "perplexity": 4.5},
    },
}


@pytest.mark.parametrize(
    ("random", "error", "shown"), [(0.5, 0.2, "4.0"), (0.5, 0.3, "–"), (0.0, 0.0, "–"), (-1.0, 0.1, "–")]
)
def test_of_a_return_that_may_as_well_be_zero_there_are_no_multiples(
    figures: ModuleType, random: float, error: float, shown: str
) -> None:
    agent = Returns(mean=2.0, standard_error=0.1, episodes=9)
    assert figures._ratio(agent, Returns(mean=random, standard_error=error, episodes=9)) == shown


def test_a_run_is_taken_in_and_shown(figures: ModuleType, raw: ModuleType, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    raw.add_result(run.path, "toy", "seed-0", tmp_path / "results")
    raw.add_result(run.path, "toy", "control-seed-0", tmp_path / "results")
    (tmp_path / "results/toy/README.md").write_text("# A toy\n\nIt is one.\n")
    (experiment,) = raw.load_experiments(tmp_path / "results")
    assert [result.name for result in experiment.results] == ["seed-0", "control-seed-0"]
    assert [result.variant for result in experiment.results] == ["", "control"]
    page = figures.render_page([experiment])
    assert "## A toy\n\nIt is one.\n" in page
    assert "`rem-atari train --preset debug --seed 0 --threads 0`: the agent, seed-0" in page
    assert ": control, control-seed-0" in page
    assert "On a processor, 2 cores, 1 thread, cpu, torch 2.9." in page
    assert (
        "| seed-0 | 2.00 ± 1.00 (2) | 0.5 | 0.50 ± 0.13 (16) | 4.0 | 300 | 3 min 0 s | 2 min 30 s | 0123456 |"
        in page
    )
    assert "| seed-0 | 1 min 0 s | 50 s | 100 | 0.5 | 1.00 ± 1.00 (2) | 2.0 |" in page
    assert (
        "| seed-0 | 0.25 | 2 | 1 | 0.5 | 75% | 90% | – | 25.0% | – | 100% | – |"
        " 30.0 (20.0) to 15.0 (18.0); 1 of 2 | 0.0123 | 9 of 16 | 4.5 |"
    ) in page
    figures.draw(experiment, tmp_path / "toy.svg")
    assert figures.digest(experiment) in (tmp_path / "toy.svg").read_text()


def test_what_evaluate_found_out_goes_before_the_run_s_own_evaluation(
    raw: ModuleType, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run")
    random = {"mean_return": 0.4, "standard_error": 0.1, "episodes": 400}
    summary = add_evaluation(run, 42, mean_return=3.0, standard_error=0.2, random_play=random)
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"run": "/home/somebody/run"}))
    folder = raw.add_result(run.path, "toy", "seed-0", tmp_path / "results")
    result = raw.load_result(folder)
    assert (result.agent.mean, result.agent.standard_error, result.agent.episodes) == (3.0, 0.2, 50)
    assert (result.random.mean, result.random.episodes) == (0.4, 400)
    assert "somebody" not in "".join(path.read_text() for path in folder.iterdir())
    assert len(list(raw.evaluations(result))) == 4


def test_of_a_run_that_was_stopped_the_last_evaluation_is_one_on_the_way(
    figures: ModuleType, raw: ModuleType, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run")
    add_evaluation(run, 42, mean_return=3.0, temperature=1.0)
    result = raw.load_result(raw.add_result(run.path, "toy", "seed-0", tmp_path / "results"))
    assert [found.mean for _, found in figures._before_the_last(result)] == [0.5, 1.0, 1.5, 2.0]
    assert (result.played_at, result.temperature) == (1.0, 0.5)
    result.lines[-1]["final"] = 1
    assert len(figures._before_the_last(result)) == 3


def test_writing_everything_anew_leaves_the_raw_results_alone(
    figures: ModuleType, raw: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = tmp_path / "results"
    raw.add_result(finished_run(tmp_path / "run").path, "toy", "seed-0", curves / "data")
    (curves / "gone.svg").write_text("of an experiment that is no more")
    kept = files_in(curves / "data")
    monkeypatch.setattr(figures, "CURVES", curves)
    monkeypatch.setattr(figures, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(figures, "load_experiments", lambda: raw.load_experiments(curves / "data"))
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    assert files_in(curves / "data") == kept
    assert {path.name for path in curves.glob("*.svg")} == {"toy.svg"}


def agents_with_rivals(raw: ModuleType, folder: Path, *means: float, error: float) -> Any:
    """An experiment with a seed for each mean, whose best blind policy has 6.5 ± 0.3."""
    for seed, mean in enumerate(means):
        run = finished_run(folder / f"run-{seed}")
        add_evaluation(run, 42, mean_return=mean, standard_error=error)
        run.blind.write_text(json.dumps(RIVALS | {"command": "rem-atari blind", "commit": COMMIT}))
        raw.add_result(run.path, "toy", f"seed-{seed}", folder / "results")
    (folder / "results/toy/README.md").write_text("# A toy\n")
    (experiment,) = raw.load_experiments(folder / "results")
    return experiment


def test_learned_is_said_over_seeds_where_there_are_several(
    figures: ModuleType, raw: ModuleType, tmp_path: Path
) -> None:
    page = figures.render_page([agents_with_rivals(raw, tmp_path / "many", 8.0, 9.0, 10.0, error=0.1)])
    seen = "0.40 ± 0.05 | 0.60 ± 0.05 | 6.50 ± 0.30 | – | – | 22.00 ± 3.00"
    assert f"| A toy | 9.00 ± 0.58, 3 seeds | {seen} | yes |" in page
    assert "- A toy: `rem-atari blind`, commit 0123456, 100 games a policy" in page
    page = figures.render_page([agents_with_rivals(raw, tmp_path / "two", 5.0, 9.0, error=0.1)])
    assert f"| A toy | 7.00 ± 2.00, 2 seeds | {seen} | **no** |" in page
    page = figures.render_page([agents_with_rivals(raw, tmp_path / "one", 7.0, error=0.1)])
    assert f"| A toy | 7.00 ± 0.10, 50 games of one seed | {seen} | **no** |" in page


def test_an_evaluation_of_an_agent_that_learned_on_is_left_out(raw: ModuleType, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    add_evaluation(run, 42, mean_return=3.0, env_steps=299)
    result = raw.load_result(raw.add_result(run.path, "toy", "seed-0", tmp_path / "results"))
    assert result.evaluation is None
    assert result.agent.mean == 2.0


def test_a_run_taken_in_again_leaves_nothing_of_the_earlier_one(raw: ModuleType, tmp_path: Path) -> None:
    add_evaluation(finished_run(tmp_path / "first"), 42)
    raw.add_result(tmp_path / "first", "toy", "seed-0", tmp_path / "results")
    second = finished_run(tmp_path / "second")
    (second.path / "quality.json").unlink()
    folder = raw.add_result(second.path, "toy", "seed-0", tmp_path / "results")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "sessions.jsonl",
    }


def test_long_metrics_are_thinned_but_for_returns(
    raw: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "run", epochs=20)
    whole = raw.load_result(raw.add_result(run.path, "toy", "seed-0", tmp_path / "results"))
    assert whole.about["metrics"] == "all"
    assert [each["loss"] for each in whole.lines if each["phase"] == "world_model"] == [1.23457] * 20
    size = (tmp_path / "results/toy/seed-0/metrics.jsonl").stat().st_size
    monkeypatch.setattr(raw, "MOST_METRIC_BYTES", int(0.9 * size))
    thinned = raw.load_result(raw.add_result(run.path, "toy", "seed-0", tmp_path / "results"))
    assert thinned.about["metrics"] == "1 in 2 epochs of the training phases"
    assert [each["epoch"] for each in thinned.lines if each["phase"] == "world_model"] == [
        *range(0, 20, 2),
        19,
    ]
    assert len(list(raw.evaluations(thinned))) == 20


@pytest.mark.parametrize("name", ["0", "seed-", "seed-1/..", "../seed-1", "control"])
def test_a_name_that_is_no_run_s_is_refused(raw: ModuleType, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="wanted seed-N"):
        raw.add_result(finished_run(tmp_path / "run").path, "toy", name, tmp_path / "results")
    assert not (tmp_path / "results").exists()
