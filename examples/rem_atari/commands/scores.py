"""``rem-atari scores RUN...``: an agent's runs on several games and seeds, beside the published agents."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rem_atari.arguments import ScoresArguments
from rem_atari.commands.counting import counting, tell
from rem_atari.commands.tables import format_table
from rem_atari.errors import UsageError
from rem_atari.runs.durable import replace_file
from rem_atari.scores.aggregates import FEW_SEEDS, METRICS, Aggregates, Estimate, aggregate
from rem_atari.scores.published import (
    atari100k_games,
    human_normalised,
    published_agents,
    published_scores,
    reference_scores,
)
from rem_atari.scores.runs import NoScoreError, RunScore, read_run_score


def scores(arguments: ScoresArguments) -> None:
    """Print the runs' scores and the aggregates, and write the requested files.

    Raises:
        UsageError: a folder is no run or is named twice, none of the runs has a score, or a value is out of
            its range.
    """
    _check(arguments)
    runs = _read_runs(arguments.runs)
    games = sorted({run.game for run in runs}) or atari100k_games()
    agents = _normalised(runs, arguments.name, games)
    results = []
    with counting("drawing the bootstrap", len(agents), "agents") as advance:
        for name, each in agents.items():
            results.append(aggregate(name, each, resamples=arguments.resamples, seed=arguments.seed))
            advance(1)
    if runs:
        print(f"{_games_table(runs, arguments.name)}\n")
    print(_aggregates_table(results))
    for note in _notes(runs, results, arguments.name):
        print(f"\n{note}")
    if arguments.csv is not None:
        replace_file(arguments.csv, aggregates_csv(results).encode())
    if arguments.plot is not None:
        # Imported here: matplotlib takes a while.
        from rem_atari.scores.plots import plot_scores

        plot_scores(arguments.plot, results, highlight=arguments.name if runs else None)


def _check(arguments: ScoresArguments) -> None:
    if arguments.resamples < 1 or arguments.seed < 0:
        raise UsageError(
            f"--resamples is {arguments.resamples}, wanted at least 1; --seed is {arguments.seed}, at least 0"
        )
    if arguments.name in published_agents():
        raise UsageError(f"--name {arguments.name!r} is the name of a published agent; choose another")
    if arguments.plot is not None and arguments.plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {arguments.plot} has the ending {arguments.plot.suffix!r}, wanted .png")
    for path in (arguments.csv, arguments.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")


def _read_runs(paths: Sequence[Path]) -> list[RunScore]:
    """The scores of the runs that have one; print a sentence about each other run."""
    seen: dict[Path, Path] = {}
    found = []
    for path in paths:
        if path.resolve() in seen:
            raise UsageError(f"{path} is named twice; each run counts once")
        seen[path.resolve()] = path
        try:
            found.append(read_run_score(path))
        except NoScoreError as error:
            tell(f"warning: left out: {error}")
    if paths and not found:
        raise UsageError(f"of {_counted(len(paths), 'run')} none has a score that could be compared")
    return found


def _normalised(
    runs: Sequence[RunScore], name: str, games: Sequence[str]
) -> dict[str, Mapping[str, list[float]]]:
    """Human-normalised scores on `games` by agent: the published ones, and after them the runs."""
    agents: dict[str, Mapping[str, list[float]]] = {}
    for agent in published_agents():
        raw = published_scores()[agent]
        agents[agent] = {game: [_normalise(game, score) for score in raw[game]] for game in games}
    if runs:
        agents[name] = {game: [run.normalised for run in runs if run.game == game] for game in games}
    return agents


def _normalise(game: str, score: float) -> float:
    normalised = human_normalised(game, score)
    assert normalised is not None  # every game here is one of the 26
    return normalised


def _games_table(runs: Sequence[RunScore], name: str) -> str:
    """A line per game: the runs' scores beside REM's and a human's."""
    rem = published_scores()["REM"]
    rows = []
    for game in sorted({run.game for run in runs}):
        mine = [run for run in runs if run.game == game]
        reference = reference_scores(game)
        assert reference is not None
        score = sum(run.score for run in mine) / len(mine)
        rows.append(
            [
                game,
                str(len(mine)),
                _range([run.episodes for run in mine]),
                f"{score:.1f}",
                f"{_normalise(game, score):.3f}",
                f"{sum(rem[game]) / len(rem[game]):.1f}",
                f"{reference[0]:.1f}",
                f"{reference[1]:.1f}",
            ]
        )
    header = ["game", "seeds", "episodes", name, "normalised", "REM", "random", "human"]
    return format_table(header, rows)


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def _aggregates_table(results: Sequence[Aggregates]) -> str:
    rows = [
        [
            result.agent,
            str(result.games),
            _range([result.fewest_seeds, result.most_seeds]),
            *(_cell(result.metrics[name]) for name in METRICS),
            f"{result.above_human} of {result.games}",
        ]
        for result in results
    ]
    return format_table(["agent", "games", "seeds", *METRICS, "above human"], rows)


def _cell(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f"{estimate.value:.3f}"
    low, high = estimate.interval
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"


def _notes(runs: Sequence[RunScore], results: Sequence[Aggregates], name: str) -> list[str]:
    """The notes below the table."""
    lines = [
        "Human-normalised: 0 is random play, 1 a human. In brackets: 95% intervals of a stratified bootstrap"
        " over seeds. A smaller optimality gap is better."
    ]
    mine = [result for result in results if result.agent == name]
    for result in mine:
        if result.games < len(atari100k_games()):
            lines.append(
                f"All agents are compared on {result.games} of the {len(atari100k_games())} games of Atari"
                " 100K; their published aggregates are over all of them."
            )
        if result.most_seeds == 1:
            lines.append(f"{name}: one run a game, so nothing is known of how much depends on the seed.")
        elif result.fewest_seeds < FEW_SEEDS:
            lines.append(
                f"{name}: a game has only {_counted(result.fewest_seeds, 'seed')}; from fewer than"
                f" {FEW_SEEDS} an interval is too narrow to be believed."
            )
    lines += [f"{run.path}: {note}." for run in runs for note in run.notes]
    lines += _doubts(runs)
    return lines


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _doubts(runs: Sequence[RunScore]) -> list[str]:
    """Reasons not to take the runs for one agent."""
    found = []
    if len({_settings(run) for run in runs}) > 1:
        found.append("These runs differ in more settings than game and seed: they are not one agent.")
    pairs = [(run.game, run.config.seed) for run in runs]
    twice = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if twice:
        named = ", ".join(f"{game} with seed {seed}" for game, seed in twice)
        found.append(f"More than one run has {named}: they may be the same run twice.")
    return found


def _settings(run: RunScore) -> str:
    """All settings but those in which the runs of one agent differ, and those that do not change an agent."""
    settings: dict[str, Any] = asdict(run.config)
    for name in ("seed", "preset", "device", "threads", "evaluation"):
        del settings[name]
    del settings["env"]["game"]
    del settings["tokenizer"]["lpips_weights"]
    return repr(settings)


def aggregates_csv(results: Sequence[Aggregates]) -> str:
    """A line for each agent and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["agent", "metric", "value", "low", "high", "games", "scores"])
    for result in results:
        for name, estimate in result.metrics.items():
            low, high = ("", "") if estimate.interval is None else map(_number, estimate.interval)
            numbers = [_number(estimate.value), low, high]
            writer.writerow([result.agent, name, *numbers, result.games, result.num_scores])
    return text.getvalue()


def _number(value: float) -> str:
    return f"{value:.6g}"
