"""`rem-atari evaluate`: exactly so many whole games, what is written of them, and which weights play."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from run_folders import DEBUG, RIVALS, add_evaluation, files_in, make_run

from rem_atari.cli import main
from rem_atari.commands import evaluate as evaluate_command
from rem_atari.config.presets import PRESETS
from rem_atari.envs.vector import GameReturn, VectorStep
from rem_atari.evaluation import EvaluationResult, playing_conditions
from rem_atari.films.games import BestAndWorst
from rem_atari.play.rollout import choose_actions
from rem_atari.runs import durable
from rem_atari.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rem_atari.runs.folder import hold_run_folder
from rem_atari.runs.trained import TrainedAgent, load_trained
from rem_atari.scores.published import human_normalised, reference_scores


def evaluate(run: Path, *words: str) -> dict[str, Any]:
    """Run the command without films; the summary of its newest evaluation."""
    assert main(["evaluate", str(run), "--no-videos", *words]) == 0
    folder = max((run / "evaluation").iterdir())
    return json.loads((folder / "summary.json").read_text())


def fails(capsys: pytest.CaptureFixture[str], run: Path, *words: str, code: int = 2) -> str:
    assert main(["evaluate", str(run), "--no-videos", *words]) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_exactly_so_many_games_and_all_that_is_said_of_them_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    summary = evaluate(tmp_path / "run", "--episodes", "11", "--num-envs", "4", "--temperature", "0.7")
    shown = capsys.readouterr().out
    with (tmp_path / "run/evaluation/step-00000042/episodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    returns = [float(row["return"]) for row in rows]
    assert len(rows) == summary["episodes"] == 11
    assert sorted(int(row["environment"]) for row in rows) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 2
    assert {row["steps"] for row in rows} == {"5"}
    assert summary["mean_return"] == pytest.approx(statistics.fmean(returns))
    assert summary["median_return"] == statistics.median(returns)
    assert summary["standard_error"] == pytest.approx(statistics.stdev(returns) / 11**0.5)
    assert (summary["temperature"], summary["num_envs"], summary["step"]) == (0.7, 4, 42)
    assert (summary["epoch"], summary["env_steps"], summary["human_normalised"]) == (2, 420, None)
    assert f"mean return {statistics.fmean(returns):.2f}" in shown
    assert "Catch, checkpoint 42, epoch 2 of 2: 11 games at temperature 0.7" in shown


def test_random_play_is_measured_beside_it_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    assert evaluate(tmp_path / "run", "--episodes", "3")["random_play"] is None
    assert "random play" not in capsys.readouterr().out
    summary = evaluate(tmp_path / "run", "--episodes", "3", "--random-episodes", "40")
    random = summary["random_play"]
    assert random["episodes"] == 40
    assert -1 < random["mean_return"] < 0  # one column of six is under the paddle, nearly
    assert 0 < random["standard_error"] < 0.3
    assert summary["ratio_to_random"] is None  # of a return below 0 there are no multiples
    shown = capsys.readouterr().out
    assert f"random play {random['mean_return']:.2f} ± {random['standard_error']:.2f} over 40 games" in shown


def test_a_return_is_told_in_multiples_of_random_play_where_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    for name, returns in (("play_games", (4.0, 12.0)), ("evaluate_random", (1.0, 3.0))):
        games = EvaluationResult(tuple(GameReturn(0, points, 5) for points in returns), 0, 1.0)
        monkeypatch.setattr(evaluate_command, name, lambda *_, games=games, **__: games)
    summary = evaluate(tmp_path / "run", "--episodes", "2", "--random-episodes", "2")
    assert summary["random_play"] == {"episodes": 2, "mean_return": 2.0, "standard_error": 1.0}
    assert summary["ratio_to_random"] == 4.0
    assert "random play 2.00 ± 1.00 over 2 games: the agent's is 4.0 times that" in capsys.readouterr().out


def test_rivals_that_were_measured_are_shown_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert evaluate(run.path, "--episodes", "3")["blind"] is None
    run.blind.write_text(json.dumps(RIVALS))
    capsys.readouterr()
    best = evaluate(run.path, "--episodes", "3")["blind"]
    assert (best["policy"], best["mean_return"], best["episodes"], best["learned"]) == (
        "list",
        6.5,
        100,
        False,
    )
    shown = capsys.readouterr().out
    assert "best constant action 0.60 ± 0.05 over 100 games" in shown
    assert "The agent's is not above it by three standard errors" in shown


def test_the_same_seed_plays_the_same_games(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    words = ["--episodes", "20", "--temperature", "1"]
    played = []
    for seed in ("3", "3", "4"):
        evaluate(tmp_path / "run", *words, "--seed", seed)
        played.append((tmp_path / "run/evaluation/step-00000042/episodes.csv").read_text())
    assert played[0] == played[1]
    assert played[0] != played[2]


def test_games_are_whole_whatever_the_training_was_bounded_to(tmp_path: Path) -> None:
    bounded = replace(DEBUG, evaluation=replace(DEBUG.evaluation, max_steps=2, max_seconds=0.0))
    make_run(tmp_path / "run", bounded)
    assert evaluate(tmp_path / "run", "--episodes", "3")["mean_length"] == 5


def test_the_conditions_of_a_test_need_no_perceptual_loss() -> None:
    assert playing_conditions(PRESETS["paper"]).tokenizer.perceptual_weight == 0
    assert playing_conditions(PRESETS["paper"]).evaluation.temperature == 0.5


def test_films_show_every_frame_of_the_best_and_the_worst_game(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    before = files_in(tmp_path)
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "12", "--temperature", "5"]) == 0
    folder = tmp_path / "run/evaluation/step-00000042"
    names = ("best.mp4", "episodes.csv", "summary.json", "worst.mp4")
    assert files_in(tmp_path) - before == {str((folder / name).relative_to(tmp_path)) for name in names}
    for name in ("best.mp4", "worst.mp4"):
        stream = imageio_ffmpeg.read_frames(str(folder / name))
        assert next(stream)["size"] == (264, 264)
        assert len(list(stream)) == 5 + 1


def test_one_game_has_one_film(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--out", str(tmp_path / "here")]) == 0
    assert files_in(tmp_path / "here") == {"best.mp4", "episodes.csv", "summary.json"}
    assert not (tmp_path / "run/evaluation").exists()


def test_a_run_may_be_training_meanwhile(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with hold_run_folder(tmp_path / "run"):
        assert evaluate(tmp_path / "run", "--episodes", "1")["episodes"] == 1


def test_a_checkpoint_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", steps=(7, 42))
    assert evaluate(tmp_path / "run", "--episodes", "1", "--step", "7")["epoch"] == 1
    assert evaluate(tmp_path / "run", "--episodes", "1")["step"] == 42
    assert "holds no checkpoint 8; there are: 7, 42" in fails(capsys, tmp_path / "run", "--step", "8")
    assert "has kept no best checkpoint" in fails(capsys, tmp_path / "run", "--step", "best")


def test_a_damaged_checkpoint_is_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=(7, 42))
    model = run.checkpoints / "step-00000042" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert evaluate(tmp_path / "run", "--episodes", "1")["step"] == 7
    assert "warning: checkpoint passed over" in capsys.readouterr().err
    assert "step-00000042 is damaged" in fails(capsys, tmp_path / "run", "--step", "42", code=1)


def test_a_checkpoint_that_training_deletes_while_it_is_read_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rem_atari.runs import trained

    run = make_run(tmp_path / "run")
    load, calls = trained.load_checkpoint, 0

    def load_late(folder: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            make_run(tmp_path / "later", steps=(99,))
            (tmp_path / "later/checkpoints/step-00000099").rename(run.checkpoints / "step-00000099")
            (run.checkpoints / "step-00000042").rename(tmp_path / "deleted")
            raise trained.CheckpointError("none of the checkpoints is whole")
        return load(folder)

    monkeypatch.setattr(trained, "load_checkpoint", load_late)
    assert load_trained(run.path, step="newest", device=None, say=print).step == 99


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--episodes", "0"], "--episodes is 0, wanted at least 1"),
        (["--seed", "-1"], "--seed is -1, wanted at least 0"),
        (["--temperature", "-1"], "evaluation.temperature is -1.0, wanted at least 0"),
        (["--num-envs", "0"], "evaluation.num_envs is 0, wanted at least 1"),
        (["--device", "toaster"], "the device 'toaster' cannot be used"),
        (["--device", "mps"], "the device 'mps' cannot be used: torch finds no such GPU on this machine"),
    ],
)
def test_wrong_use_is_explained_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    make_run(tmp_path / "run")
    before = files_in(tmp_path)
    assert sentence in fails(capsys, tmp_path / "run", *words)
    assert files_in(tmp_path) == before


def test_what_is_no_run_or_has_no_weights_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run folder" in fails(capsys, tmp_path)
    make_run(tmp_path / "new", steps=())
    assert "has no checkpoint yet" in fails(capsys, tmp_path / "new", code=1)
    other = replace(DEBUG, world_model=replace(DEBUG.world_model, ffn_dim=48))
    make_run(tmp_path / "other", other)
    (tmp_path / "other/config.json").write_text(json.dumps(DEBUG.to_dict()))
    line = fails(capsys, tmp_path / "other", code=1)
    assert line == "rem-atari: checkpoint 42 does not fit the run's configuration"


def test_results_do_not_follow_a_link_out_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/evaluation").mkdir()
    (tmp_path / "run/evaluation/step-00000042").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in fails(capsys, tmp_path / "run", "--episodes", "1")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_report_shows_the_newest_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=())
    assert main(["report", str(run.path)]) == 0
    page = run.path / "report.html"
    assert "rem-atari evaluate played" not in page.read_text()
    add_evaluation(run, 7, mean_return=1.0)
    add_evaluation(run, 42, mean_return=2.5, standard_error=0.5, human_normalised=0.125)
    assert main(["report", str(run.path)]) == 0
    shown = page.read_text()
    assert "In 50 whole games that rem-atari evaluate played with checkpoint 42 at temperature 0.5" in shown
    assert "the mean return was 2.50 ± 0.50, human-normalised 0.125." in shown


def test_atari_scores_are_normalised_by_random_play_and_a_human(tmp_path: Path) -> None:
    config = replace(DEBUG, env=replace(DEBUG.env, id=None, game="Breakout"))
    run = make_run(tmp_path / "run")
    trained = load_trained(run.path, step="newest", device=None, say=print)
    atari = TrainedAgent(run=run, source=run.path, config=config, agent=trained.agent, step=42, state={})
    result = EvaluationResult((GameReturn(0, 1.7, 9), GameReturn(1, 30.5, 11)), 0, 1.0)
    summary = evaluate_command.summarise(result, atari, config, seed=0)
    assert summary["human_normalised"] == pytest.approx(0.5)
    assert (summary["random_score"], summary["human_score"]) == reference_scores("Breakout") == (1.7, 30.5)
    assert "human-normalised score 0.500" in evaluate_command.describe(summary)
    assert evaluate_command.episodes_csv(result, config).splitlines()[1:] == ["0,0,1.7,9,0", "1,1,30.5,11,1"]
    assert human_normalised("Tetris", 5.0) is None


def step_with(*games: GameReturn, lost: tuple[bool, bool] = (False, False)) -> VectorStep:
    nothing = np.zeros(2, dtype=bool)
    return VectorStep(
        frames=np.zeros((2, 2, 2, 3), np.uint8),
        rewards=np.zeros(2, np.float32),
        terminated=nothing,
        truncated=nothing,
        lost=np.array(lost),
        game_returns=list(games),
    )


def see(films: BestAndWorst, number: int, step: VectorStep) -> None:
    """Two environments, whose frames are filled with the number of the step, and with that plus 100."""
    films.see(np.stack([np.full((2, 2, 3), number + offset, np.uint8) for offset in (0, 100)]), step)


def shown(film: Any) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in film]


def test_the_best_and_the_worst_game_that_count_are_kept() -> None:
    films = BestAndWorst()
    first, unwanted, last = GameReturn(0, 5.0, 2), GameReturn(1, 99.0, 2), GameReturn(0, 1.0, 2)
    see(films, 0, step_with())
    see(films, 1, step_with(first, unwanted))
    films.count(first)
    see(films, 2, step_with())
    see(films, 3, step_with(last))
    films.count(last)
    assert (films.best.game, shown(films.best)) == (first, [0, 1])
    assert (films.worst.game, shown(films.worst)) == (last, [2, 3])


def test_a_film_ends_with_the_games_last_frame() -> None:
    films = BestAndWorst()
    game = GameReturn(0, 1.0, 1)
    last = np.full((2, 2, 3), 77, np.uint8)
    see(films, 0, replace(step_with(game), last_frames={0: last}))
    films.count(game)
    assert shown(films.best) == [0, 77]


def test_what_is_said_to_be_written_was_written_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run").evaluation / "step-00000042"
    folder.mkdir(parents=True)
    leftovers = {".writing-4711-best.mp4", ".summary.json.writing"}
    for name in ("best.mp4", "worst.mp4", "notes.txt", ".writing-mine", *leftovers):
        (folder / name).write_text("before")
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--no-videos"]) == 0
    written = [folder / "episodes.csv", folder / "summary.json"]
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {written[0]}, {written[1]}"
    names = {path.name for path in folder.iterdir()}
    assert names == {"episodes.csv", "summary.json", "notes.txt", ".writing-mine"}, "strangers' files stay"


def test_a_folder_that_cannot_be_written_is_found_out_before_anything_is_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system", str(dir))

    make_run(tmp_path / "run")
    monkeypatch.setattr(durable, "TemporaryFile", refuse)
    monkeypatch.setattr(evaluate_command, "play_games", None)
    assert "Read-only file system; --out names another" in fails(capsys, tmp_path / "run")
    (tmp_path / "out" / "best.mp4").mkdir(parents=True)
    message = fails(capsys, tmp_path / "run", "--out", str(tmp_path / "out"))
    assert message.endswith("best.mp4: it is a folder; --out names another")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    model = dict(load_checkpoint(run.checkpoints).model)
    model["tokenizer.codebook.weight"] = torch.full_like(model["tokenizer.codebook.weight"], torch.inf)
    save_checkpoint(run.checkpoints, Checkpoint(43, model, {}, {"epoch": 2}), keep=1)
    for command in ("evaluate", "record"):
        assert main([command, str(run.path)]) == 1
        told = "rem-atari: the weights of checkpoint 43 are not finite: tokenizer.codebook.weight"
        assert capsys.readouterr().err.splitlines()[-1] == told


def test_the_greedy_agent_plays_the_same_whatever_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    logits = torch.tensor([[0.1, 0.3, 0.2], [2.0, -1.0, 1.9]])
    generator = torch.Generator().manual_seed(0)
    assert choose_actions(logits, generator, temperature=0.0).tolist() == [1, 0]
    assert main(["evaluate", str(run.path), "--episodes", "2", "--temperature", "0"]) == 0


def test_of_equal_games_the_first_is_the_best_and_the_last_the_worst() -> None:
    films = BestAndWorst()
    for number in range(3):
        see(films, number, step_with(GameReturn(0, 1.0, 1)))
        films.count(GameReturn(0, 1.0, 1))
    assert (shown(films.best), shown(films.worst)) == ([0], [2])


def test_a_game_whose_environment_died_is_in_no_film() -> None:
    films = BestAndWorst()
    see(films, 0, step_with())
    see(films, 1, step_with(lost=(True, False)))
    game = GameReturn(0, 1.0, 1)
    see(films, 2, step_with(game))
    films.count(game)
    assert shown(films.best) == [2]
