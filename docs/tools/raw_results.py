"""The raw results of training runs, which are kept beside the page: adding and reading a run.

    docs/results/data/order.txt            the experiments, in the order of the page
    docs/results/data/EXPERIMENT/README.md what was tried: a title and a few sentences
    docs/results/data/EXPERIMENT/blind.json  what `rem-atari blind` found out about the game, if it was asked
    docs/results/data/EXPERIMENT/RUN/      a finished run:
        config.json  metrics.jsonl  sessions.jsonl  quality.json    from its run folder, see docs/rem_atari.md
        evaluation.json                 what `rem-atari evaluate` found out, if it was asked
        result.json                     the command, and how much of the metrics was kept

A run is called `seed-N`, or `VARIANT-seed-N` where an experiment compares variants.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rem_atari.config.presets import PRESETS
from rem_atari.report.history import MetricLine, Returns, read_lines, returns_of, total_seconds
from rem_atari.report.quality import QUALITY_FILE
from rem_atari.report.rivals import Rivals, read_rivals
from rem_atari.runs.folder import open_run_folder
from rem_atari.runs.reading import is_number, newest_summary
from rem_atari.runs.session import read_sessions, train_command

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "docs" / "results" / "data"

MOST_METRIC_BYTES = 300_000
"""Longer metrics are thinned: of the training phases only every second, third, ... epoch is kept."""

BLIND_FILE = "blind.json"

DIGITS = 6
"""Significant digits of the numbers kept."""

ALWAYS_KEPT = ("random", "collect_random", "collect", "evaluate")

RUN_NAME = re.compile(r"(?:(?P<variant>[\w.-]+)-)?seed-(?P<seed>\d+)")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of an experiment.

    Attributes:
        name: its folder's name.
        lines: its metrics.
        temperature: of the actions in its own evaluations.
        sessions: when and on what it was started and resumed.
        quality: its quality.json, or None.
        evaluation: the summary of `rem-atari evaluate`, or None.
        about: its result.json.
    """

    name: str
    lines: list[MetricLine]
    temperature: float
    sessions: list[dict[str, Any]]
    quality: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    about: Mapping[str, Any]

    @property
    def variant(self) -> str:
        """The name of the variant; empty for the main runs."""
        found = RUN_NAME.fullmatch(self.name)
        return self.name if found is None else found["variant"] or ""

    @property
    def command(self) -> str | None:
        """The command that starts such a run, with the code of `commit`."""
        said = self.sessions[0].get("reproduce") if self.sessions else None
        return said or self.about.get("command")

    @property
    def commit(self) -> str | None:
        """Commit of the code that it was started with."""
        return self.sessions[0].get("commit") if self.sessions else None

    @property
    def agent(self) -> Returns | None:
        """The agent's mean return, as `rem-atari evaluate` says if it was asked, else the last evaluation."""
        return _summary_returns(self.evaluation) or returns_of(self.lines, "evaluate")

    @property
    def played_at(self) -> float:
        """Temperature of the actions in the games of `agent`."""
        return self.temperature if self.evaluation is None else self.evaluation["temperature"]

    @property
    def random(self) -> Returns | None:
        """Random play's mean return, from the measurement with more games."""
        found = [returns_of(self.lines, "random")]
        if self.evaluation is not None:
            found.append(_summary_returns(self.evaluation.get("random_play")))
        return max((each for each in found if each is not None), key=lambda each: each.episodes, default=None)

    @property
    def env_steps(self) -> int:
        """Environment steps collected."""
        return max((int(line["env_steps"]) for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """Wall time."""
        return total_seconds(self.lines)

    @property
    def cpu_seconds(self) -> float | None:
        """Time of processors, or None where it was not measured."""
        return max((line["cpu_seconds"] for line in self.lines if "cpu_seconds" in line), default=None)


@dataclass(frozen=True)
class Experiment:
    """Runs that belong together: name of the folder, title, text in Markdown, the runs, and their rivals."""

    name: str
    title: str
    text: str
    results: list[Result]
    rivals: Rivals | None


def load_experiments(folder: Path = RESULTS) -> list[Experiment]:
    """All experiments: those of `order.txt` in its order, then the others by name."""
    order = (folder / "order.txt").read_text().split() if (folder / "order.txt").is_file() else []
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [load_experiment(folder / name) for name in names]


def load_experiment(folder: Path) -> Experiment:
    """An experiment and its runs, the main ones first, then the variants."""
    readme = folder / "README.md"
    title, _, text = (readme.read_text() if readme.is_file() else f"# {folder.name}\n").partition("\n")
    results = [load_result(path) for path in folder.iterdir() if (path / "metrics.jsonl").is_file()]
    results.sort(key=lambda result: (result.variant, len(result.name), result.name))
    rivals = read_rivals(folder / BLIND_FILE)
    return Experiment(folder.name, title.removeprefix("# "), text.strip(), results, rivals)


def load_result(folder: Path) -> Result:
    """A run's raw results."""
    return Result(
        name=folder.name,
        lines=read_lines(folder / "metrics.jsonl", []),
        temperature=_load(folder / "config.json")["evaluation"]["temperature"],
        sessions=read_sessions(folder / "sessions.jsonl"),
        quality=_load(folder / QUALITY_FILE),
        evaluation=_load(folder / "evaluation.json"),
        about=_load(folder / "result.json") or {},
    )


def add_result(run: Path, experiment: str, name: str, folder: Path = RESULTS) -> Path:
    """Copy the results in a run's folder into the raw results, in place of an earlier run of that name.

    Raises:
        ValueError: the name is none of a run's.
        UsageError: `run` is no run folder.
    """
    if RUN_NAME.fullmatch(name) is None:
        raise ValueError(f"the run's name is {name!r}; wanted seed-N or VARIANT-seed-N")
    source = open_run_folder(run)
    config = source.load_config()
    lines, every = thin(read_lines(source.metrics, []))
    target = folder / experiment / name
    target.mkdir(parents=True, exist_ok=True)
    about = {
        "command": train_command(config, PRESETS.get(config.preset)),
        "metrics": "all" if every == 1 else f"1 in {every} epochs of the training phases",
    }
    summary = newest_summary(source)
    if summary is not None and summary["env_steps"] < max((line["env_steps"] for line in lines), default=0):
        summary = None  # it judges an agent that has learned more since
    quality = _load(run / QUALITY_FILE)
    _write(target / "config.json", config.to_dict())
    _write(target / "result.json", about)
    for path, data in ((target / "evaluation.json", summary), (target / QUALITY_FILE, quality)):
        path.unlink(missing_ok=True)
        if data is not None:
            # The folder of the run is private and not part of the result.
            _write(path, _rounded({key: value for key, value in data.items() if key != "run"}))
    rivals = read_rivals(source.blind)
    if rivals is not None:
        _write(folder / experiment / BLIND_FILE, _rounded(rivals.data))
    _write_lines(target / "metrics.jsonl", lines)
    _write_lines(target / "sessions.jsonl", read_sessions(source.sessions))
    return target


def thin(lines: Sequence[MetricLine]) -> tuple[list[MetricLine], int]:
    """The lines with their numbers rounded, as many as are allowed; and of how many epochs one was kept."""
    rounded = [_rounded(line) for line in lines if not line.get("interrupted")]
    last = max((line["epoch"] for line in rounded), default=0)
    for every in range(1, last + 2):
        kept = [
            line
            for line in rounded
            if line["phase"] in ALWAYS_KEPT or line["epoch"] % every == 0 or line["epoch"] == last
        ]
        if sum(len(json.dumps(line)) + 1 for line in kept) <= MOST_METRIC_BYTES:
            return kept, every
    return kept, every


def evaluations(result: Result) -> Iterator[tuple[MetricLine, Returns]]:
    """The evaluations of a run, in order, each as a line and its returns."""
    for line in result.lines:
        found = returns_of([line], "evaluate")
        if found is not None:
            yield line, found


def _summary_returns(summary: Mapping[str, Any] | None) -> Returns | None:
    if summary is None:
        return None
    error = summary.get("standard_error")
    return Returns(
        mean=summary["mean_return"],
        standard_error=error if is_number(error) else None,
        episodes=int(summary["episodes"]),
    )


def _rounded(value: Any) -> Any:
    """JSON data with every float at DIGITS significant digits."""
    if isinstance(value, float):
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


def _load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
