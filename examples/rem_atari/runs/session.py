"""How a run was made: its command line, and in sessions.jsonl a line for each start and resumption."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rem_atari.config import Config
from rem_atari.config.reading import flatten
from rem_atari.runs.command_line import command_line
from rem_atari.runs.folder import RunFolder
from rem_atari.runs.reading import read_json_lines

PACKAGES = ("retpop", "torch", "numpy", "gymnasium", "ale-py", "minatar")
"""Packages whose versions a run may depend on."""

GIT_SECONDS = 5.0

COMMIT_LENGTH = 7
"""Digits of a commit that are shown."""


def log_session(
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
        edits: the settings that were edited by hand since the run wrote them, with old and new value, or
            None.
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

    A package in a virtual environment inside another repository does not belong to that repository.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return _git(folder, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The lines of a sessions.jsonl that can be read, oldest first; none without the file."""
    return read_json_lines(path)[0]


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


def short_commit(commit: object) -> str:
    """The first digits of a commit, and whether the code had been changed since."""
    digits, mark, changed = str(commit or "unknown").partition("-")
    return digits[:COMMIT_LENGTH] + mark + changed


def train_command(config: Config, preset: Config | None) -> str:
    """The command line that gives `config`: the preset and a flag for every setting that differs from it.

    Args:
        config: the run's configuration.
        preset: the preset it names, or None where there is none of that name: then every setting that differs
            from the defaults becomes a flag.
    """
    base = flatten((preset or Config()).to_dict())
    words = ["train"]
    if preset is not None:
        words += ["--preset", config.preset]
    always = ("seed", "env.game") if config.env.id is None else ("seed",)
    settings = {path: value for path, value in flatten(config.to_dict()).items() if path != "preset"}
    return command_line(config.env, [*words, *changed_flags(settings, base, always)])


def changed_flags(settings: dict[str, Any], base: dict[str, Any], always: Collection[str] = ()) -> list[str]:
    """Settings that differ from `base`, and those that are given `always`, as words of the command line.

    Args:
        settings: values by dotted paths.
        base: what the command line has without a flag, likewise.
        always: paths.
    """
    return [
        word
        for path, value in settings.items()
        if value != base[path] or path in always
        for word in _flag(path, value)
    ]


def _flag(path: str, value: object) -> list[str]:
    """A setting as words of the command line."""
    name = path.replace("_", "-")
    if isinstance(value, bool):
        group, _, leaf = name.rpartition(".")
        prefix = f"{group}." if group else ""
        return [f"--{name}" if value else f"--{prefix}no-{leaf}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *(str(entry) for entry in values)]
