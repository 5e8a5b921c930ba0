"""``rem-atari report RUN``: the report of a run or of an exported agent."""

from __future__ import annotations

from pathlib import Path

from rem_atari.arguments import ReportArguments
from rem_atari.commands.counting import counting, tell
from rem_atari.errors import RunError, UsageError, describe_os_error
from rem_atari.runs.exported import is_exported
from rem_atari.runs.folder import open_run_folder
from rem_atari.runs.trained import load_trained

GAMES = 16
"""Games of an exported agent's report, where none are asked for."""


def report(arguments: ReportArguments) -> None:
    """Write a report, and print its path.

    Raises:
        UsageError: there is no such run or agent, or a value is out of its range.
        RunError: the report cannot be written.
    """
    if arguments.games is not None and arguments.games < 2:
        raise UsageError(f"--games is {arguments.games}, wanted at least 2")
    is_agent = is_exported(arguments.run) or not arguments.run.exists()
    print(f"report: {_of_agent(arguments) if is_agent else _of_run(arguments)}")


def _of_run(arguments: ReportArguments) -> Path:
    from rem_atari.report import write_report

    if arguments.games is not None:
        raise UsageError("--games is for exported agents; a run's report measures the games that it recorded")
    run = open_run_folder(arguments.run)
    try:
        return write_report(run.path)
    except UsageError:
        raise
    except Exception as error:
        raise RunError(explain_unwritten(run.path, error)) from error


def _of_agent(arguments: ReportArguments) -> Path:
    from rem_atari.report.exported import write_agent_report

    trained = load_trained(arguments.run, step="newest", device="cpu", say=tell)
    games = GAMES if arguments.games is None else arguments.games
    with counting("playing, at random and as the agent", 2 * games, "games") as advance:
        try:
            return write_agent_report(trained, str(arguments.run), games, advance=advance)
        except (UsageError, RunError):
            raise
        except Exception as error:
            raise RunError(explain_unwritten(arguments.run, error)) from error


def explain_unwritten(run: Path, error: Exception) -> str:
    """The sentence for a report that failed."""
    reason = describe_os_error(error) if isinstance(error, OSError) else str(error) or type(error).__name__
    return f"the report of {run} could not be written ({reason})"
