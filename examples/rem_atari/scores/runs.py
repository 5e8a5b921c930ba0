"""Scores of runs, read from their folders: by `rem-atari evaluate`, or from the end of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rem_atari.config import Config
from rem_atari.envs import env_name
from rem_atari.errors import RunError
from rem_atari.report.history import read_lines
from rem_atari.runs.folder import RunFolder, open_run_folder
from rem_atari.runs.reading import is_number, newest_summary
from rem_atari.scores.published import human_normalised


class NoScoreError(RunError):
    """A run has no score that could be compared with others; the message says why."""


@dataclass(frozen=True, kw_only=True)
class RunScore:
    """The score of one run.

    Attributes:
        path: its folder.
        config: its configuration.
        score: mean raw return.
        normalised: the same, human-normalised.
        episodes: number of games of that mean.
        source: the file or evaluation that it comes from.
        notes: its limits compared with the score of a finished run, sentences without the run's name.
    """

    path: Path
    config: Config
    score: float
    normalised: float
    episodes: int
    source: str
    notes: list[str]

    @property
    def game(self) -> str:
        """The Atari game."""
        return self.config.env.game


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An evaluation: its mean return, games, epochs trained, source and notes."""

    mean: float
    episodes: int
    epoch: int
    source: str
    notes: list[str]


def read_run_score(path: Path) -> RunScore:
    """The score of the run in `path`: of the weights that trained longest, by `rem-atari evaluate` if it ran.

    Raises:
        UsageError: there is no run.
        NoScoreError: it has no evaluation, or plays a game without a human's score.
    """
    run = open_run_folder(path)
    config = run.load_config()
    if config.env.id is not None or human_normalised(config.env.game, 0.0) is None:
        name = config.env.id or env_name(config.env)
        raise NoScoreError(f"{path} plays {name}, for which there is no human's score")
    found = [each for each in (_read_evaluation(run), _read_training(run, config)) if each is not None]
    if not found:
        raise NoScoreError(f"{path} has not been evaluated; rem-atari evaluate {path} does it")
    # max takes the first of equals, which is the evaluation of its own.
    best = max(found, key=lambda each: each.epoch)
    notes = list(best.notes)
    if best.epoch < config.schedule.epochs:
        notes.append(f"has trained for {best.epoch} of {config.schedule.epochs} epochs")
    normalised = human_normalised(config.env.game, best.mean)
    assert normalised is not None  # asked above
    return RunScore(
        path=path,
        config=config,
        score=best.mean,
        normalised=normalised,
        episodes=best.episodes,
        source=best.source,
        notes=notes,
    )


def _read_evaluation(run: RunFolder) -> _Found | None:
    """The result of `rem-atari evaluate` for the newest checkpoint that it evaluated, or None."""
    summary = newest_summary(run)
    if summary is None:
        return None
    return _Found(
        mean=float(summary["mean_return"]),
        episodes=int(summary["episodes"]),
        epoch=int(summary["epoch"]),
        source="evaluate",
        notes=[],
    )


def _read_training(run: RunFolder, config: Config) -> _Found | None:
    """The evaluation at the end of the training, or None before that."""
    for line in reversed(read_lines(run.metrics, [])):
        if line.get("phase") == "evaluate" and line.get("final") == 1 and is_number(line.get("mean_return")):
            notes = []
            if config.evaluation.max_steps is not None or config.evaluation.max_seconds is not None:
                notes.append(
                    "cut its games short at the end of training; `rem-atari evaluate` plays whole ones"
                )
            return _Found(
                mean=float(line["mean_return"]),
                episodes=int(line["episodes"]) if is_number(line.get("episodes")) else 0,
                epoch=int(line["epoch"]) + 1 if is_number(line.get("epoch")) else 0,
                source="training",
                notes=notes,
            )
    return None
