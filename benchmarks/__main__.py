"""Measure retpop beside others: `python -m benchmarks run`, `compare`, `plot`, `page`.

python -m benchmarks run                             everything, about 15 minutes on 2 cores
python -m benchmarks run --op pop --shape rem_train --dtype bf16 --backend torch,compile
python -m benchmarks run --quick                     tiny shapes, seconds
python -m benchmarks compare 1a2b3c 4d5e6f           two commits, or two files
python -m benchmarks page                            docs/performance.md and its plots, from the results
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, page, records, runner, targets
from benchmarks.machine import commit, machine
from benchmarks.timing import QUICK, Effort
from benchmarks.work import BOTH, DTYPES, FORWARD

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "backward": BOTH}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.command(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure, print, and add to this machine's and commit's CSV")
    run.set_defaults(command=_run)
    run.add_argument("--op", type=_names(list(runner.OPS)), metavar="A,B", help=", ".join(runner.OPS))
    run.add_argument("--shape", type=_names(), metavar="A,B", help="as the operations' modules name them")
    run.add_argument("--mode", type=_names(), metavar="A,B", help="parallel, chunkwise, recurrent, pop, ...")
    run.add_argument("--dtype", type=_names([*DTYPES, *SHORT]), metavar="A,B", help="fp32, bf16")
    run.add_argument(
        "--backend", type=_names(), metavar="A,B", help="torch, compile, triton, or another's name"
    )
    run.add_argument("--pass", dest="passes", type=_names([FORWARD, BOTH, "backward"]), metavar="A,B")
    run.add_argument("--quick", action="store_true", help="tiny shapes, two samples, no CSV")
    run.add_argument("--device", help="default: a GPU if there is one")
    run.add_argument(
        "--cpu-time", action="store_true", help="one thread, the time it computes: for a busy CPU"
    )
    run.add_argument("--csv", type=Path, help="default: benchmarks/results/MACHINE-COMMIT.csv")
    compare_them = commands.add_parser("compare", help="two sets of results, line by line")
    compare_them.set_defaults(command=_compare)
    compare_them.add_argument("before", metavar="A", help="a CSV, or the first digits of a commit")
    compare_them.add_argument("after", metavar="B", help="another")
    plot = commands.add_parser("plot", help="draw results into a folder")
    plot.set_defaults(command=_plot)
    plot.add_argument("--results", help="a CSV, or the first digits of a commit; default: the newest")
    plot.add_argument("--out", type=Path, help="default: docs/performance")
    plot.add_argument(
        "--format", type=_names(["svg", "png"]), default=["svg"], metavar="A,B", help="svg, png"
    )
    pages = commands.add_parser("page", help="docs/performance.md, the README's table, and their pictures")
    pages.set_defaults(command=_page)
    pages.add_argument("--results", help="a CSV, or the first digits of a commit; default: the newest")
    return parser


def _names(known: Sequence[str] | None = None) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if known is not None and (unknown := set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
        return [SHORT.get(name, name) for name in names]

    return parse


def _run(options: argparse.Namespace) -> int:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    selection = runner.Selection(
        ops=options.op,
        shapes=options.shape,
        modes=options.mode,
        dtypes=options.dtype,
        backends=options.backend,
        passes=options.passes,
        tiny=options.quick,
    )
    effort = QUICK if options.quick else Effort()
    if options.cpu_time:
        torch.set_num_threads(1)
        effort = replace(effort, clock=time.process_time)
    name = machine(device, effort.clock)
    path = options.csv
    if path is None and not options.quick:
        path = records.path_of(name, commit())
    groups = list(selection.groups(device))
    if not groups:
        sys.exit("nothing to measure: no operation here has that shape, mode, dtype, backend and pass")
    started, failed = time.monotonic(), False
    for group in groups:
        found = runner.measure(group, device, effort)
        runner.print_records(found)
        sys.stdout.flush()
        failed |= any(record.verdict == records.FAILED for record in found)
        if path is not None:
            records.append(path, found)
    print(f"\n{len(groups)} groups on {name} in {time.monotonic() - started:.0f} s", end="")
    print("" if path is None else f"; rows in {path}")
    return int(failed)


def _compare(options: argparse.Namespace) -> int:
    before, after = (records.read(_found(name)) for name in (options.before, options.after))
    changes = compare.compare(before, after)
    if not changes:
        sys.exit("they have no measurement in common")
    compare.print_changes(changes)
    return 0


def _plot(options: argparse.Namespace) -> int:
    from benchmarks import plots  # Matplotlib, which a machine that only measures can do without

    for path in plots.write(_results(options.results), options.out or page.PICTURES, options.format):
        print(path)
    return 0


def _page(options: argparse.Namespace) -> int:
    from benchmarks import plots

    results = _results(options.results)
    plots.write(results)
    for path in page.PAGES:
        path.write_text(page.render(path.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(path)
    return 0


def _results(name: str | None) -> targets.Results:
    try:
        path = page.newest() if name is None else records.find(name)
    except FileNotFoundError as error:
        sys.exit(str(error))
    return page.load(path)


def _found(name: str) -> Path:
    try:
        return records.find(name)
    except FileNotFoundError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
