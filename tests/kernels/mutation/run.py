"""Put every small fault into the kernels, one at a time, and see whether the checks of `suites` notice.

    python tests/kernels/mutation/run.py [MODULE ...] [--all] [--equivalents PATH]

Each mutant runs in a fork of this process, in which `retpop.kernels` is read from a copy of its folder with
one file changed. It is caught if a check fails, if the process dies, or if it runs for too long. Survivors
that are equivalent to the original are listed in equivalents.toml with the reason; the rest are printed.
Exits with 1 if fewer than 95% of the mutants that are not equivalent are caught, or if the list names what
is no longer so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parent.parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from mutants import Mutant, mutants_of  # noqa: E402
from suites import SUITES, Check  # noqa: E402

import retpop.kernels  # noqa: E402

KERNELS = Path(retpop.kernels.__file__).parent
EQUIVALENTS = Path(__file__).parent / "equivalents.toml"
SECONDS = 30
ENOUGH = 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=[*SUITES])
    parser.add_argument("--verbose", action="store_true", help="print every mutant and what caught it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return max(judge(module, options.verbose) for module in options.modules)


def judge(module: str, verbose: bool) -> int:
    """Run all mutants of a module and print the result; 1 if too many survive or the list is out of date."""
    checks = quickest_first(SUITES[module]())
    started = time.monotonic()
    mutants = mutants_of((KERNELS / f"{module}.py").read_text(encoding="utf-8"))
    survivors = []
    for mutant in mutants:
        caught = catch(module, mutant, checks)
        if verbose:
            print(f"{caught or 'SURVIVED':60.60}  {mutant.name}", flush=True)
        if not caught:
            survivors.append(mutant.name)
    equivalents = read_equivalents(module)
    missed = [name for name in survivors if name not in equivalents]
    stale = [name for name in equivalents if name not in survivors]
    counted = len(mutants) - len(set(survivors) & set(equivalents))
    share = 1 - len(missed) / counted if counted else 1.0
    print(
        f"{module}: {len(mutants)} mutants, {len(mutants) - len(survivors)} caught, "
        f"{len(survivors) - len(missed)} equivalent, {len(missed)} missed: {share:.1%} "
        f"({time.monotonic() - started:.0f} s)"
    )
    for title, names in (("missed", missed), ("listed as equivalent but caught or gone", stale)):
        for function, line, change in names:
            print(f"  {title}: {function}\n    {line}\n    {change}")
    return int(share < ENOUGH or bool(stale))


def quickest_first(checks: list[Check]) -> list[Check]:
    """The checks in the order of the time they take; the original passes them all."""
    seconds = []
    for check in checks:
        started = time.monotonic()
        check()
        seconds.append(time.monotonic() - started)
    return [checks[i] for i in sorted(range(len(checks)), key=seconds.__getitem__)]


def catch(module: str, mutant: Mutant, checks: list[Check]) -> str:
    """What caught the mutant, in a word or a sentence; empty if nothing did."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        shutil.copytree(KERNELS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / f"{module}.py").write_text(mutant.source, encoding="utf-8")
        child = os.fork()
        if child == 0:
            _be_mutant(folder, checks, said)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}"
        said.seek(0)
        return said.read() if os.WEXITSTATUS(status) else ""


def _be_mutant(folder: str, checks: list[Check], said: object) -> None:
    """In the fork: take the kernels from the folder, run the checks, and leave with what happened."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: it may be busy with other work
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    status = 0
    try:
        retpop.kernels.__path__[:] = [folder]
        for name in [name for name in sys.modules if name.startswith("retpop.kernels.")]:
            del sys.modules[name]
            delattr(retpop.kernels, name.rpartition(".")[2])  # or `from . import tiles` finds the original
        for check in checks:
            check()
    except BaseException as error:
        said.write(f"{type(error).__name__}: {error}"[:200].replace("\n", " "))
        said.flush()
        status = 1
    os._exit(status)


def read_equivalents(module: str) -> dict[tuple[str, str, str], str]:
    """The names of the mutants of a module that do no harm, with the reason."""
    entries = tomllib.loads(EQUIVALENTS.read_text(encoding="utf-8")).get(module, [])
    return {
        (entry["function"], entry["line"], change): entry["why"]
        for entry in entries
        for change in entry["changes"]
    }


if __name__ == "__main__":
    sys.exit(main())
