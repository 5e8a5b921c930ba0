"""The sections of the page on how the run was made: configuration, files, and how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rem_atari.config import Config, EnvConfig
from rem_atari.config.presets import PRESETS
from rem_atari.config.reading import flatten
from rem_atari.report.contents import Report, RunFile
from rem_atari.report.sections import section
from rem_atari.report.text import size
from rem_atari.runs.command_line import program
from rem_atari.runs.config_file import describe_edits

COMMIT_LENGTH = 7
"""Digits of a commit that are shown."""


def configuration(report: Report) -> str:
    """Every setting, with the published agent's beside those that differ from it."""
    ours, paper = flatten(report.config.to_dict()), flatten(PRESETS["paper"].to_dict())
    groups: dict[str, list[str]] = {}
    for path in ours:
        groups.setdefault(path.rpartition(".")[0] or "run", []).append(path)
    blocks = []
    for group, paths in groups.items():
        changed = sum(ours[path] != paper[path] for path in paths)
        rows = "".join(_setting_row(path, ours[path], paper[path]) for path in paths)
        head = "<thead><tr><th>Setting</th><th>Value</th><th>Paper</th></tr></thead>"
        blocks.append(
            f'<details><summary>{escape(group)} <span class="faint small">{changed} of {len(paths)} differ'
            f" from the paper</span></summary>"
            f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div></details>'
        )
    lead = (
        "<p>The resolved configuration; what differs from the published agent's (the preset"
        " <code>paper</code>) is bold.</p>"
    )
    return section("Configuration", lead + "".join(blocks))


def _setting_row(path: str, value: object, paper: object) -> str:
    same = value == paper
    return (
        f'<tr class="{"default" if same else "set"}"><td><code>{escape(path)}</code></td>'
        f"<td><code>{escape(setting_text(value))}</code></td>"
        f'<td class="faint">{"" if same else f"<code>{escape(setting_text(paper))}</code>"}</td></tr>'
    )


def file_table(run_files: Sequence[RunFile]) -> str:
    """What lies in the run's folder."""
    rows = "".join(
        f"<tr><td><code>{escape(file.name)}</code></td><td>{escape(file.purpose)}</td>"
        f'<td class="number">{size(file.size)}</td></tr>'
        for file in run_files
    )
    head = '<thead><tr><th>File</th><th>What it holds</th><th class="number">Size</th></tr></thead>'
    return section("Files", f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>')


def reproduce(report: Report) -> str:
    """The command that starts the run again."""
    bounded = [
        path
        for path, value in flatten(report.config.to_dict()).items()
        if path.endswith("max_seconds") and value
    ]
    lead = "<p>This command starts the same run in a new folder; the seed fixes everything that is drawn.</p>"
    if bounded:
        lead += (
            "<p>Some phases are bounded by wall time"
            f" ({', '.join(f'<code>{escape(path)}</code>' for path in bounded)}): a slower machine,"
            " or a busier one, does less in them and ends elsewhere.</p>"
        )
    if report.edits:
        lead += (
            "<p>The configuration was edited by hand after the run had begun"
            f" ({escape(describe_edits(report.edits))}): the command starts with the edited one, which is not"
            " the same run.</p>"
        )
    if program(report.config.env) != program(EnvConfig()):
        lead += "<p>It is to be run where the game's module is found, such as in its folder.</p>"
    return section("How to reproduce", f"{lead}<pre>{escape(report.command)}</pre>{_sessions(report)}")


def _sessions(report: Report) -> str:
    """When, with which code and on what the run was started and resumed."""
    if not report.sessions:
        return ""
    titles = ("Started", "By", "Commit", "Versions", "Machine")
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = "".join(map(_session_row, report.sessions))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _session_row(session: Mapping[str, Any]) -> str:
    versions = session.get("versions")
    listed = versions.items() if isinstance(versions, dict) else ()
    machine = (
        f"{session.get('processor')}, cores: {session.get('cores')}, threads: {session.get('threads')},"
        f" {session.get('device')}"
    )
    cells = (
        session.get("started"),
        session.get("command"),
        short_commit(session.get("commit")),
        ", ".join(f"{name} {number}" for name, number in listed),
        machine,
    )
    return f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"


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
    words = [*program(config.env), "train"]
    if preset is not None:
        words += ["--preset", config.preset]
    always = ("seed", "env.game") if config.env.id is None else ("seed",)
    for path, value in flatten(config.to_dict()).items():
        if path != "preset" and (value != base[path] or path in always):
            words += _flag(path, value)
    return shlex.join(words)


def _flag(path: str, value: object) -> list[str]:
    """A setting as words of the command line."""
    name = path.replace("_", "-")
    if isinstance(value, bool):
        group, _, leaf = name.rpartition(".")
        prefix = f"{group}." if group else ""
        return [f"--{name}" if value else f"--{prefix}no-{leaf}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *(str(entry) for entry in values)]


def setting_text(value: object) -> str:
    """A setting's value as a person writes it."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
