"""On what a run was trained: each time that it was started or resumed leaves a line in sessions.jsonl."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rem_atari.runs.folder import RunFolder

PACKAGES = ("retpop", "torch", "numpy", "gymnasium", "ale-py", "minatar")
"""Packages whose versions a run may depend on."""

GIT_SECONDS = 5.0


def record_session(
    run: RunFolder,
    command: str,
    *,
    reproduce: str,
    device: str,
    edits: Mapping[str, Any] | None = None,
) -> None:
    """Add a line to a run's sessions.jsonl.

    Args:
        run: its folder.
        command: what began: train or resume.
        reproduce: the command line that starts such a run with the code of now.
        device: torch device that it runs on.
        edits: the settings that were edited by hand since the run wrote them, what each was and is; None:
            nobody did.
    """
    began: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "reproduce": reproduce,
    }
    if edits is not None:
        began["edited"] = edits
    with run.sessions.open("a", encoding="utf-8") as file:
        file.write(json.dumps(began | describe_session(device)) + "\n")


def describe_session(device: str) -> dict[str, Any]:
    """Commit, versions and machine of this process."""
    return {
        "commit": find_commit(Path(__file__).parent),
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
    }


def find_commit(folder: Path) -> str | None:
    """The git commit of the code in `folder`, marked "-dirty" if it was changed since; None if it has none.

    A package that was installed into an environment within somebody's repository is none of that one's files.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return _git(folder, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The lines of a sessions.jsonl that can be read, oldest first; none without the file."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def recorded_edits(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that sessions say were edited by hand: what each was at first, and what it is."""
    found: dict[str, Any] = {}
    for session in sessions:
        edited = session.get("edited")
        for path, change in edited.items() if isinstance(edited, dict) else ():
            if isinstance(change, list) and len(change) == 2:
                found[path] = (found[path][0] if path in found else change[0], change[1])
    return found


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
    )
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # importlib.metadata's PackageNotFoundError is one
            continue
    return found


def _processor() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
