"""The subcommands: one module each, imported when called, so that ``--help`` answers at once."""

from __future__ import annotations

from rem_atari.arguments import (
    Arguments,
    BenchmarkArguments,
    BlindArguments,
    DiagnoseArguments,
    EvaluateArguments,
    ExportArguments,
    ListArguments,
    PlayArguments,
    RecordArguments,
    ReportArguments,
    ResumeArguments,
    RetrainArguments,
    ScoresArguments,
    SweepArguments,
    TrainArguments,
    WeightsArguments,
)


def run_command(arguments: Arguments) -> None:
    """Run the subcommand of these arguments.

    Raises:
        RunError: it failed, was used wrongly, or was stopped; see :mod:`rem_atari.errors`.
    """
    match arguments:
        case TrainArguments():
            from rem_atari.commands.train import train

            train(arguments)
        case ResumeArguments():
            from rem_atari.commands.resume import resume

            resume(arguments)
        case EvaluateArguments():
            from rem_atari.commands.evaluate import evaluate

            evaluate(arguments)
        case BlindArguments():
            from rem_atari.commands.blind import blind

            blind(arguments)
        case RecordArguments():
            from rem_atari.commands.record import record

            record(arguments)
        case PlayArguments():
            from rem_atari.commands.play import play

            play(arguments)
        case ReportArguments():
            from rem_atari.commands.report import report

            report(arguments)
        case DiagnoseArguments():
            from rem_atari.commands.diagnose import diagnose_run

            diagnose_run(arguments)
        case RetrainArguments():
            from rem_atari.commands.retrain import retrain

            retrain(arguments)
        case ExportArguments():
            from rem_atari.commands.export import export

            export(arguments)
        case ScoresArguments():
            from rem_atari.commands.scores import scores

            scores(arguments)
        case SweepArguments():
            from rem_atari.commands.sweep import sweep

            sweep(arguments)
        case BenchmarkArguments():
            from rem_atari.commands.benchmark import benchmark

            benchmark(arguments)
        case WeightsArguments():
            from rem_atari.commands.weights import weights

            weights(arguments)
        case ListArguments():
            from rem_atari.commands.listing import list_everything

            list_everything(arguments)
