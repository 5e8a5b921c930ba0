"""``rem-atari sweep``: a run per game and seed, on Ray, on one machine or a cluster.

A run is one Ray task in a process of its own. If its process dies, Ray starts the task again, and the task
resumes from the run's folder. The whole sweep resumes in the same way: the runs' folders hold its only state.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from rem_atari.arguments import ResumeArguments, ScoresArguments, SweepArguments, TrainArguments
from rem_atari.commands.counting import tell
from rem_atari.commands.tables import format_table
from rem_atari.config import Config
from rem_atari.config.reading import flatten
from rem_atari.errors import RunError, StoppedError, UsageError, explain
from rem_atari.evaluation import describe_mean
from rem_atari.report.history import last_value, read_lines, returns_of
from rem_atari.runs.folder import RunFolder, is_run_folder, open_run_folder
from rem_atari.runs.session import read_sessions
from rem_atari.scores.published import atari100k_games

REFRESH_SECONDS = 2.0
"""Seconds between reads of the runs' folders."""

SAVING_SECONDS = 60.0
"""Seconds that runs get to save after a signal."""


ATTEMPTS = 4
"""Attempts to start Ray, whose own timeouts of 15 to 30 seconds are too short on a busy machine."""


@dataclass
class SweptRun:
    """A run of the sweep.

    Attributes:
        path: its folder.
        config: its configuration.
        starts_before: number of starts before this sweep.
        ended: whether its task ended.
        problem: what went wrong, or None.
    """

    path: Path
    config: Config
    starts_before: int
    ended: bool = False
    problem: str | None = None

    @property
    def starts(self) -> int:
        """Number of starts, by this sweep and before."""
        return len(read_sessions(RunFolder(self.path).sessions))

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.path.parent / "logs" / f"{self.path.name}.log"

    def describe(self) -> list[str]:
        """Its line of the table: name, state, epochs, starts, mean return."""
        lines = read_lines(RunFolder(self.path).metrics, [])
        epoch, returns, starts = last_value(lines, "epoch"), returns_of(lines, "evaluate"), self.starts
        state = "running" if starts > self.starts_before else "waiting"
        if self.ended:
            state = "done" if self.problem is None else "failed"
        return [
            self.path.name,
            state,
            f"{0 if epoch is None else int(epoch) + 1}/{self.config.schedule.epochs}",
            str(starts),
            "" if returns is None else describe_mean(returns.mean, returns.standard_error),
        ]


def sweep(arguments: SweepArguments) -> None:
    """Run the unfinished runs, show a table meanwhile, and print the scores.

    Raises:
        UsageError: a game, a seed or a number is wrong, or a folder holds a run with other settings.
        RunError: runs failed; the message names them. The others are done.
        StoppedError: a signal came; the same command goes on.
    """
    runs = plan(arguments)
    with _ray(arguments.address) as ray:
        _run_all(ray, runs, arguments)
    paths = [run.path for run in runs if run.problem is None]
    if paths:
        _print_scores(paths)
    failed = [run for run in runs if run.problem is not None]
    if failed:
        reasons = "; ".join(f"{run.path.name}: {run.problem} (log: {run.log})" for run in failed)
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {reasons}")


def plan(arguments: SweepArguments) -> list[SweptRun]:
    """The runs, each with its folder and its configuration.

    Raises:
        UsageError: see `sweep`.
    """
    config = arguments.config
    if arguments.cpus <= 0 or arguments.retries < 0 or (arguments.gpus is not None and arguments.gpus < 0):
        raise UsageError(
            f"--cpus is {arguments.cpus:g}, wanted more than 0; --gpus is {arguments.gpus}, "
            f"--retries {arguments.retries}, wanted at least 0"
        )
    if config.threads == 0:  # by default torch would use all cores of the machine, in each run
        config = replace(config, threads=max(1, int(arguments.cpus)))
    runs = []
    for game in _games(arguments.games) or [None]:
        for seed in arguments.seeds or [config.seed]:
            own = replace(_with_game(config, game), seed=seed)
            name = re.sub(r"[^A-Za-z0-9._]+", "_", own.env.id or own.env.game)
            path = (arguments.out / f"{name}-{seed}").absolute()
            _check_settings(path, own)
            runs.append(SweptRun(path, own, len(read_sessions(RunFolder(path).sessions))))
    if len({run.path for run in runs}) < len(runs):
        raise UsageError("a game or a seed is named twice; each run is made once")
    return runs


def run_one(config: Config, path: Path, log: Path) -> str | None:
    """Train a run in this process from its beginning, or resume it.

    Returns:
        None, or the problem.
    """
    from rem_atari.commands.resume import resume
    from rem_atari.commands.train import train

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            if is_run_folder(path):
                resume(ResumeArguments(run=path))
            else:
                train(TrainArguments(config=config, run=path))
        except Exception as error:
            traceback.print_exc()
            return str(error) if isinstance(error, RunError) else explain(error)
    return None


def _games(words: Sequence[str]) -> list[str]:
    """The named games; all26 stands for those of Atari 100K."""
    from rem_atari.envs import list_games

    games = [game for word in words for game in (atari100k_games() if word == "all26" else [word])]
    known = list_games() if games else []
    for game in games:
        if not _is_id(game) and game not in known:
            close = difflib.get_close_matches(game, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "`rem-atari list games` names them"
            raise UsageError(f"--games: there is no Atari game {game!r}; {hint}")
    return games


def _is_id(game: str) -> bool:
    return "/" in game or ":" in game


def _with_game(config: Config, game: str | None) -> Config:
    if game is None:
        return config
    chosen = {"id": game} if _is_id(game) else {"game": game, "id": None}
    return replace(config, env=replace(config.env, **chosen))


def _check_settings(path: Path, config: Config) -> None:
    """Raise UsageError if the folder holds a run with other settings."""
    if not is_run_folder(path):
        return
    saved, wanted = (flatten(each.to_dict()) for each in (open_run_folder(path).read_config().config, config))
    for name, value in wanted.items():
        if saved[name] != value:
            raise UsageError(
                f"{path} was begun with {name} {saved[name]!r}, not {value!r}; name another folder with --out"
            )


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster or started on this machine, without its reports to its makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    local = {} if address is not None else {"include_dashboard": False}
    for attempt in range(ATTEMPTS):
        try:
            # Ray's own messages about a failed start would fill the screen before the next attempt.
            ray.init(address=address, log_to_driver=False, logging_level="CRITICAL", **local)
            break
        except ConnectionError as error:
            raise UsageError(f"--address {address}: there is no Ray cluster: {error}") from error
        except Exception as error:
            ray.shutdown()
            if attempt == ATTEMPTS - 1:
                raise RunError(
                    f"Ray did not start in {ATTEMPTS} attempts; a busy machine is too slow for its timeouts: "
                    "try again later, or start it with `ray start --head` and add --address auto. "
                    f"Its last error: {explain(error)}"
                ) from error
            tell(f"Ray did not start (attempt {attempt + 1} of {ATTEMPTS}): {explain(error)}")
    try:
        yield ray
    finally:
        ray.shutdown()


def _run_all(ray: Any, runs: Sequence[SweptRun], arguments: SweepArguments) -> None:
    """One task per run; returns when all have ended."""
    gpus = arguments.gpus
    if gpus is None:
        gpus = 0.0 if arguments.config.device == "cpu" else 1.0
    # A new process for each run, as if it were started by hand.
    task = ray.remote(num_cpus=arguments.cpus, num_gpus=gpus, max_retries=arguments.retries, max_calls=1)(
        run_one
    )
    waiting = {task.remote(run.config, run.path, run.log): run for run in runs}
    try:
        with _table(runs) as show:
            while waiting:
                ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=REFRESH_SECONDS)
                for reference in ended:
                    run = waiting.pop(reference)
                    run.ended, run.problem = True, _problem(ray, reference)
                show()
    except KeyboardInterrupt as signal:
        tell("stopping: the runs save")
        for reference in waiting:
            ray.cancel(reference)  # it reaches the run as SIGINT does
        ray.wait(list(waiting), num_returns=len(waiting), timeout=SAVING_SECONDS)
        done = sum(run.ended for run in runs)
        raise StoppedError(
            f"stopped by {str(signal) or 'SIGINT'} with {done} of {len(runs)} runs done; "
            "the same command goes on"
        ) from None


def _problem(ray: Any, reference: Any) -> str | None:
    try:
        problem: str | None = ray.get(reference)
    except ray.exceptions.RayError as error:  # its process died once more than there are retries
        return explain(error).partition(". ")[0]
    return problem


@contextmanager
def _table(runs: Sequence[SweptRun]) -> Iterator[Any]:
    """A function that shows the state of the runs: on a terminal one table, else a line for each change."""
    header = ["run", "state", "epochs", "starts", "mean return"]
    if sys.stderr.isatty():
        with Live(console=Console(file=sys.stderr), auto_refresh=False) as live:
            yield lambda: live.update(
                format_table(header, [run.describe() for run in runs], text_columns=2), refresh=True
            )
        return
    said: dict[Path, str] = {}

    def show() -> None:
        for run in runs:
            name, state, epochs, starts, returns = run.describe()
            if said.get(run.path, "waiting0") != state + starts:
                said[run.path] = state + starts
                about = f", mean return {returns}" if returns else ""
                tell(f"{name}: {state}, epoch {epochs}, start {starts}{about}")

    yield show


def _print_scores(paths: Sequence[Path]) -> None:
    """`rem-atari scores` of the runs, if they have any."""
    try:
        from rem_atari.commands.scores import scores

        scores(ScoresArguments(runs=tuple(paths)))
    except ModuleNotFoundError as error:
        tell(f"no scores: {error.name} is not installed; pip install 'retpop[scores]', then rem-atari scores")
    except UsageError as error:
        tell(f"no scores: {error}")
