"""``rem-atari report RUN``: write a run's report again."""

from __future__ import annotations

from rem_atari.arguments import ReportArguments
from rem_atari.errors import RunError, UsageError
from rem_atari.runs.folder import RunFolder, open_run_folder


def report(arguments: ReportArguments) -> None:
    """Write a run's report again, and print its path."""
    from rem_atari.report import write_report

    run = open_run_folder(arguments.run)
    try:
        page = write_report(run.path)
    except UsageError:
        raise
    except Exception as error:
        raise RunError(explain_unwritten(run, error)) from error
    print(f"report: {page}")


def explain_unwritten(run: RunFolder, error: Exception) -> str:
    """The sentence for a report that failed."""
    return f"the report of {run.path} could not be written ({str(error) or type(error).__name__})"
