"""The conditions of a result: machine, commit and versions; and the packages of another checkout."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

MEASURED = ("retpop", "kernels", "examples", "benchmarks", ":!benchmarks/results")
"""The files that a result depends on, as git's pathspecs."""


@cache
def commit() -> str:
    """The checkout's commit when it is first asked for, with "+changes" where files differ from it.

    RETPOP_COMMIT names the commit of a copy without git; else that is "unknown".
    """
    if given := os.environ.get("RETPOP_COMMIT"):
        return given
    try:
        name, changes = (
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", *MEASURED])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+changes" if changes else name


def machine(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> str:
    """For example "AMD EPYC, 2 threads" or "NVIDIA H200", with the clock if it is not the wall's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    timed = ", CPU time" if clock is time.process_time else ""
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}{timed}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def origin(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> dict[str, str]:
    """Machine, commit, date (UTC) and PyTorch of a measurement that is taken now."""
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return {"machine": machine(device, clock), "commit": commit(), "date": date, "torch": torch.__version__}


def version_of(package: str) -> str:
    """Its installed version, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def slug(text: str) -> str:
    """Text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def environment_with(library: Path, folder: Path) -> dict[str, str]:
    """Environment of a process that imports retpop and its kernels from ``library``, a checkout.

    Benchmarks and rem_atari come from this checkout. Nothing needs to be installed: packages are links in
    ``folder``, which must exist, because `retpop.kernels` lies beside `retpop` in a checkout.
    """
    package = folder / "retpop"
    package.mkdir()
    for path in (library / "retpop").iterdir():
        (package / path.name).symlink_to(path.resolve())
    (package / "kernels").symlink_to((library / "kernels").resolve())
    (folder / "rem_atari").symlink_to(ROOT / "examples" / "rem_atari")
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Safe path: the working folder, which may be a checkout, does not come before these.
    own = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **own}
