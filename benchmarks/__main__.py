"""Measure retpop beside other libraries: `python -m benchmarks run`, `compare`, `against`, `plot`, `page`.

python -m benchmarks run                             everything, about 15 minutes on 2 cores
python -m benchmarks run --op pop --shape rem_train --dtype bf16 --backend torch,compile
python -m benchmarks run --quick                     tiny shapes, seconds
python -m benchmarks compare 1a2b3c 4d5e6f           two commits, or two files
python -m benchmarks against ../before --op pop      this checkout and another, sample by sample in one run
python -m benchmarks page                            the performance pages and their plots, from the results

`compare` and `against` exit with 1 if a row became slower by more than 5% (--limit) and beyond the noise, or
became wrong.
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

from benchmarks import against, compare, measurements, page, runner
from benchmarks.machine import commit, machine
from benchmarks.timing import QUICK, REHEARSAL, Effort
from benchmarks.work import BOTH, DTYPES, FORWARD, UPDATE

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "backward": BOTH}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except FileNotFoundError as error:
        sys.exit(str(error))
    return status


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure, print, and add to this machine's and commit's CSV")
    run.set_defaults(command=_run)
    _add_selection(run)
    run.add_argument(
        "--dry-run", action="store_true", help="a GPU's run on a CPU: --quick, and Triton interpreted"
    )
    run.add_argument("--csv", type=Path, help="default: benchmarks/results/MACHINE-COMMIT.csv")
    two = commands.add_parser("compare", help="two sets of results, line by line")
    two.set_defaults(command=_compare)
    two.add_argument("before", metavar="A", help="a CSV, or the first digits of a commit")
    two.add_argument("after", metavar="B", help="another")
    other = commands.add_parser("against", help="the library of another checkout, in turn with this one")
    other.set_defaults(command=_against)
    other.add_argument("other", metavar="CHECKOUT", type=Path, help="a folder with retpop/ and kernels/")
    _add_selection(other)
    for each in (two, other):
        each.add_argument("--limit", type=float, default=compare.LIMIT, help="default: %(default)s")
    plot = commands.add_parser("plot", help="draw results into a folder")
    plot.set_defaults(command=_plot)
    plot.add_argument("--out", type=Path, help="default: docs/performance")
    plot.add_argument(
        "--format", type=_names(["svg", "png"]), default=["svg"], metavar="A,B", help="svg, png"
    )
    pages = commands.add_parser("page", help="the performance pages, the README's table, and their pictures")
    pages.set_defaults(command=_page)
    for each in (plot, pages):
        each.add_argument("--results", help="a CSV, or the first digits of a commit; default: the newest")
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    ops = [*runner.OPS, *runner.DIRECT]
    parser.add_argument("--op", type=_names(ops), metavar="A,B", help=", ".join(ops))
    parser.add_argument("--shape", type=_names(), metavar="A,B", help="as the operations' modules name them")
    parser.add_argument("--mode", type=_names(), metavar="A,B", help="parallel, chunkwise, pop, rows, ...")
    parser.add_argument("--dtype", type=_names([*DTYPES, *SHORT]), metavar="A,B", help="fp32, bf16")
    parser.add_argument(
        "--backend", type=_names(), metavar="A,B", help="torch, compile, triton, or another's name"
    )
    passes = [FORWARD, BOTH, UPDATE, "backward"]
    parser.add_argument("--pass", dest="passes", type=_names(passes), metavar="A,B")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two samples, no CSV")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, the time it computes: for a busy CPU"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")


def _names(known: Sequence[str] | None = None) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if known is not None and (unknown := set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
        return [SHORT.get(name, name) for name in names]

    return parse


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def selected(options: argparse.Namespace, *, on_gpu: bool, tiny: bool) -> dict[str, Any]:
    """The fields of `runner.Selection`."""
    named = {f"{name}s": getattr(options, name) for name in ("op", "shape", "mode", "dtype", "backend")}
    return {**named, "passes": options.passes, "tiny": tiny, "on_gpu": on_gpu}


def _run(options: argparse.Namespace) -> int:
    device = torch.device("cpu") if options.dry_run else _device(options)
    tiny, on_gpu = options.quick or options.dry_run, options.dry_run or device.type == "cuda"
    effort = REHEARSAL if options.dry_run else QUICK if options.quick else Effort()
    if options.cpu_time:
        torch.set_num_threads(1)
        effort = replace(effort, clock=time.process_time)
    name, path = machine(device, effort.clock), options.csv
    if path is None and not tiny:
        path = measurements.path_of(name, commit())
    started, found = time.monotonic(), []
    selection = runner.Selection(**selected(options, on_gpu=on_gpu, tiny=tiny))
    for rows in runner.run(selection, device, effort):
        measurements.print_measurements(rows)
        sys.stdout.flush()
        found += rows
        if path is not None:
            measurements.append(path, rows)
    if not found:
        sys.exit("nothing to measure: no operation here has that shape, mode, dtype, backend and pass")
    print(f"\n{len(found)} rows on {name} in {time.monotonic() - started:.0f} s", end="")
    print("" if path is None else f"; they are in {path}")
    return int(any(row.verdict == measurements.FAILED for row in found))


def _compare(options: argparse.Namespace) -> int:
    before, after = (measurements.read(measurements.find(name)) for name in (options.before, options.after))
    changes = compare.compare(before, after)
    if not changes:
        sys.exit("they have no measurement in common")
    return compare.report(changes, options.limit)


def _against(options: argparse.Namespace) -> int:
    device = _device(options)
    selection = selected(options, on_gpu=device.type == "cuda", tiny=options.quick)
    selection["backends"] = options.backend or ["torch", "compile", "triton"]
    changes = []
    how = {"quick": options.quick, "cpu_time": options.cpu_time}
    for change in against.compare_with(options.other, selection, str(device), **how):
        print("  ".join(compare.line(change, options.limit)), flush=True)
        changes.append(change)
    if not changes:
        sys.exit("nothing to measure: no operation here has that shape, mode, dtype, backend and pass")
    print()
    return compare.report(changes, options.limit)


def _plot(options: argparse.Namespace) -> int:
    from benchmarks import plots  # imports Matplotlib, which a machine that only measures need not have

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


def _results(name: str | None) -> Any:
    return page.load(page.newest() if name is None else measurements.find(name))


if __name__ == "__main__":
    sys.exit(main())
