"""``rem-atari evaluate RUN``: whole games, and the agent's scores."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rem_atari.arguments import EvaluateArguments
from rem_atari.commands.counting import counting, tell
from rem_atari.config import Config
from rem_atari.envs import env_name
from rem_atari.errors import UsageError
from rem_atari.evaluation import EvaluationResult, describe_mean, evaluate_random, playing_conditions
from rem_atari.evaluation import evaluate as play_games
from rem_atari.films.games import BestAndWorst, GameFilm
from rem_atari.films.video import check_video_path, enlarge, save_video
from rem_atari.report.history import Returns
from rem_atari.report.rivals import POLICY_NAMES, Rivals, has_learned, learned_sentence, read_rivals
from rem_atari.runs.durable import make_writable, replace_file
from rem_atari.runs.reading import EPISODES_FILE, SUMMARY_FILE
from rem_atari.runs.trained import TrainedAgent, load_trained
from rem_atari.scores.published import human_normalised, reference_scores
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import check_config

FILM_PIXELS = 256
"""Side of a film at least."""

ATARI_FPS, OTHER_FPS = 15.0, 5.0
"""The agent sees every fourth of an Atari game's 60 frames a second; small games have no real speed."""


OWN_FILES = (EPISODES_FILE, SUMMARY_FILE, "best.mp4", "worst.mp4")
"""All files that an evaluation writes; other files in its folder are not deleted."""

_LEFTOVER = re.compile(r"\.writing-\d+-(best|worst)\.mp4|\.(episodes\.csv|summary\.json)\.writing")
"""Temporary names of `save_video` and `replace_file`."""


def evaluate(arguments: EvaluateArguments) -> None:
    """Play the games, write the results, and print a summary.

    Raises:
        UsageError: a value is out of its range, or there is no such run, checkpoint or device.
        CheckpointError: no checkpoint can be used.
    """
    if arguments.episodes < 1:
        raise UsageError(f"--episodes is {arguments.episodes}, wanted at least 1")
    if arguments.random_episodes < 0:
        raise UsageError(f"--random-episodes is {arguments.random_episodes}, wanted at least 0")
    if arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}, wanted at least 0")
    trained = load_trained(arguments.run, step=arguments.step, device=arguments.device, say=tell)
    config = playing_conditions(
        trained.config, temperature=arguments.temperature, num_envs=arguments.num_envs
    )
    check_config(config)
    folder = _make_folder(arguments.out or trained.run.evaluation / f"step-{trained.step:08d}")
    films = BestAndWorst() if arguments.videos else None
    if films is not None:
        check_video_path(folder / "best.mp4")
    with counting("playing", arguments.episodes, "games") as advance:
        result = play_games(
            trained.agent,
            config,
            episodes=arguments.episodes,
            seed=derive_seed(arguments.seed, "evaluate"),
            watcher=films,
            after_step=lambda ended: advance(ended) if ended else None,
        )
    random = _play_at_random(trained, config, arguments.random_episodes, arguments.seed)
    rivals = read_rivals(trained.run.blind)
    summary = summarise(result, trained, config, seed=arguments.seed, random=random, rivals=rivals)
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)  # of an earlier evaluation, which these are not of
    written = [folder / EPISODES_FILE, folder / SUMMARY_FILE]
    replace_file(folder / EPISODES_FILE, episodes_csv(result, config).encode())
    if films is not None:
        written += _save_films(folder, films, config)
    replace_file(folder / SUMMARY_FILE, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    print(describe(summary))
    if rivals is not None:
        print(_describe_rivals(result, rivals))
    print(f"written: {', '.join(str(path) for path in sorted(written))}")


def _play_at_random(
    trained: TrainedAgent, config: Config, episodes: int, seed: int
) -> EvaluationResult | None:
    """Random play under the same conditions, or None if it is not requested."""
    if episodes == 0:
        return None
    with counting("playing at random", episodes, "games") as advance:
        return evaluate_random(
            trained.agent,
            config,
            episodes=episodes,
            seed=derive_seed(seed, "random"),
            after_step=lambda ended: advance(ended) if ended else None,
        )


def _make_folder(folder: Path) -> Path:
    """Make the folder for the results and test that it is writable, before any game is played.

    Half-written files of an interrupted evaluation are deleted.
    """
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link; --out names the folder that it leads to")
    for name in OWN_FILES:
        if (folder / name).is_dir():
            raise UsageError(f"cannot write {folder / name}: it is a folder; --out names another")
    try:
        make_writable(folder)
        for leftover in folder.iterdir():
            if _LEFTOVER.fullmatch(leftover.name):
                leftover.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror or error}; --out names another"
        ) from error
    return folder


def summarise(
    result: EvaluationResult,
    trained: TrainedAgent,
    config: Config,
    *,
    seed: int,
    random: EvaluationResult | None = None,
    rivals: Rivals | None = None,
) -> dict[str, Any]:
    """An evaluation as JSON data, with `random` play and `rivals` if they were measured."""
    returns, mean = result.returns, result.mean
    game = None if config.env.id is not None else config.env.game
    reference = None if game is None else reference_scores(game)
    return {
        "game": env_name(config.env),
        "env": {"game": game, "id": config.env.id},
        "run": str(trained.run.path),
        "preset": config.preset,
        "training_seed": config.seed,
        "step": trained.step,
        "epoch": trained.epoch,
        "epochs": config.schedule.epochs,
        "env_steps": trained.env_steps,
        "episodes": len(returns),
        "mean_return": mean,
        "standard_error": result.standard_error,
        "median_return": statistics.median(returns),
        "min_return": min(returns),
        "max_return": max(returns),
        "mean_length": statistics.fmean(result.lengths),
        "human_normalised": None if game is None else human_normalised(game, mean),
        "random_score": None if reference is None else reference[0],
        "human_score": None if reference is None else reference[1],
        "random_play": None if random is None else _random_play(random),
        "ratio_to_random": None if random is None or random.mean <= 0 else mean / random.mean,
        "blind": None if rivals is None else _rivals(result, rivals),
        "temperature": config.evaluation.temperature,
        "seed": seed,
        "num_envs": min(config.evaluation.num_envs, len(returns)),
        "max_raw_frames": config.env.eval_max_raw_frames,
        "device": config.device,
        "seconds": result.seconds,
        "versions": {"retpop": version("retpop"), "torch": str(torch.__version__)},
    }


def _random_play(result: EvaluationResult) -> dict[str, Any]:
    return {
        "episodes": len(result.games),
        "mean_return": result.mean,
        "standard_error": result.standard_error,
    }


def _rivals(result: EvaluationResult, rivals: Rivals) -> dict[str, Any]:
    best = rivals.returns[rivals.best_blind]
    return {
        "policy": rivals.best_blind,
        "episodes": best.episodes,
        "mean_return": best.mean,
        "standard_error": best.standard_error,
        "search_steps": rivals.search_steps,
        "learned": has_learned(_as_returns(result), rivals),
    }


def _as_returns(result: EvaluationResult) -> Returns:
    return Returns(mean=result.mean, standard_error=result.standard_error, episodes=len(result.games))


def episodes_csv(result: EvaluationResult, config: Config) -> str:
    """A line for each game, in the order in which they ended."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["episode", "environment", "return", "steps", "human_normalised"])
    for number, game in enumerate(result.games):
        normalised = human_normalised(config.env.game, game.raw_return) if config.env.id is None else None
        cell = "" if normalised is None else f"{normalised:.6g}"
        writer.writerow([number, game.env_index, f"{game.raw_return:g}", game.length, cell])
    return text.getvalue()


def film_fps(config: Config) -> float:
    """Steps of the agent per second of film."""
    return ATARI_FPS if config.env.id is None else OTHER_FPS


def _save_films(folder: Path, films: BestAndWorst, config: Config) -> list[Path]:
    """Films of the best and the worst game, or a single film of a single game."""
    written = []
    found: list[tuple[str, GameFilm | None]] = [("best", films.best)]
    if films.worst is not films.best:
        found.append(("worst", films.worst))
    for name, film in found:
        if film is not None:
            tell(f"filming the {name} game: return {film.game.raw_return:g}, {film.game.length} steps")
            frames = (enlarge(frame, FILM_PIXELS) for frame in film)
            written.append(folder / f"{name}.mp4")
            save_video(written[-1], frames, film_fps(config))
    return written


def describe(summary: Mapping[str, Any]) -> str:
    """The few lines that a reader looks for."""
    epochs = "" if summary["epoch"] is None else f", epoch {summary['epoch']} of {summary['epochs']}"
    lines = [
        f"{summary['game']}, checkpoint {summary['step']}{epochs}:"
        f" {summary['episodes']} games at temperature {summary['temperature']:g}",
        f"mean return {describe_mean(summary['mean_return'], summary['standard_error'])} (standard error),"
        f" median {summary['median_return']:g}, from {summary['min_return']:g} to {summary['max_return']:g}",
    ]
    if summary["random_play"] is not None:
        lines.append(_describe_random(summary["random_play"], summary["ratio_to_random"]))
    if summary["human_normalised"] is not None:
        lines.append(
            f"human-normalised score {summary['human_normalised']:.3f}"
            f" (0 is random play, {summary['random_score']:g}; 1 a human, {summary['human_score']:g})"
        )
    return "\n".join(lines)


def _describe_rivals(result: EvaluationResult, rivals: Rivals) -> str:
    lines = [
        f"{POLICY_NAMES[name]} {describe_mean(found.mean, found.standard_error)} over {found.episodes} games"
        for name, found in rivals.returns.items()
    ]
    return "\n".join([*lines, learned_sentence(_as_returns(result), rivals)])


def _describe_random(random: Mapping[str, Any], ratio: float | None) -> str:
    times = "" if ratio is None else f": the agent's is {ratio:.1f} times that"
    mean = describe_mean(random["mean_return"], random["standard_error"])
    return f"random play {mean} over {random['episodes']} games{times}"
