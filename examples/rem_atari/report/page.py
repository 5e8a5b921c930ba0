"""The report: report.html, one self-contained page, and its pictures as files in media/."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from rem_atari.config.presets import PRESETS
from rem_atari.config.reading import flatten
from rem_atari.errors import RunWarning, explain
from rem_atari.films.pictures import save_imagination, save_reconstructions
from rem_atari.report import sections
from rem_atari.report.charts import charts_of, save_curves
from rem_atari.report.contents import Report, RunData, RunFile, attempt, gather, load_run, quality_json
from rem_atari.report.dream_section import horizon
from rem_atari.report.quality import QUALITY_FILE
from rem_atari.report.summary import header, the_run
from rem_atari.report.text import section, size, table
from rem_atari.runs.command_line import named_modules
from rem_atari.runs.config_file import describe_edits
from rem_atari.runs.durable import make_writable, replace_file
from rem_atari.runs.folder import is_run_folder
from rem_atari.runs.reading import is_number
from rem_atari.runs.session import short_commit
from rem_atari.runs.tensorboard import show_pictures

PURPOSES = {
    "config.json": "the resolved configuration",
    QUALITY_FILE: "what this page measures on held-out frames, as JSON",
    "metrics.jsonl": "what each phase of each epoch measured, one JSON object a line",
    "sessions.jsonl": "when, with which code and on what the run was started and resumed",
    "tensorboard": "the same for TensorBoard",
    "checkpoints": "weights, optimisers and counters, with checksums",
    "replay": "the experience trained on, in append-only shards",
    "heldout": "steps of the last evaluation, never trained on",
    "evaluation": "whole games played by `rem-atari evaluate`: scores, episodes, films",
    "blind.json": "returns of policies that see nothing, by `rem-atari blind`",
    "media/curves.png": "the curves of this page",
    "media/reconstructions.png": "frames beside their reconstructions",
    "media/imagination.gif": "the imagined films",
}
"""Files that a run's folder may hold, in the order in which the page lists them."""


def write_report(run: Path) -> Path:
    """Write a run's report.html, its measurements as quality.json, and the pictures in it as files in media/.

    TensorBoard shows the same pictures and films, at the last epoch.

    The page names whatever the run lacks (a run stopped early, no held-out frames, a part that never
    trained). Earlier reports are replaced.

    Args:
        run: the run's folder.

    Returns:
        The path of the page.

    Raises:
        UsageError: `run` is no run folder, or its configuration cannot be read.
        OSError: the report cannot be written.
    """
    return write_page(load_run(run))


def write_page(data: RunData) -> Path:
    """Write report.html, quality.json and media/ from what is known of a run or an exported agent.

    Returns:
        The path of the page.

    Raises:
        OSError: the report cannot be written.
    """
    run = data.folder.path
    media = run / "media"
    make_writable(media)
    report = gather(data)
    for picture, save in (
        ("curves.png", _save_curves),
        ("reconstructions.png", _save_reconstructions),
        ("imagination.gif", _save_imagination),
    ):
        attempt(f"media/{picture}", data.notes, partial(save, media / picture, report))
    if is_run_folder(run):
        shown = [media / name for name in ("reconstructions.png", "imagination.gif")]
        show = partial(show_pictures, data.folder.tensorboard, shown, _epoch(report))
        attempt("TensorBoard's pictures", data.notes, show)
    replace_file(run / QUALITY_FILE, quality_json(report).encode())
    page = run / "report.html"
    replace_file(page, render(report, list_files(run)).encode())
    return page


def _epoch(report: Report) -> int:
    """The epoch of the last line of metrics, 0 without any."""
    epochs = [line["epoch"] for line in report.lines if is_number(line.get("epoch"))]
    return int(epochs[-1]) if epochs else 0


def _save_curves(path: Path, report: Report) -> None:
    charts = charts_of(report.lines)
    if charts:
        save_curves(path, charts)


def _save_reconstructions(path: Path, report: Report) -> None:
    if report.quality.frames is not None:
        redrawn = report.quality.frames.redrawn
        save_reconstructions(path, redrawn.frames, redrawn.reconstructions)


def _save_imagination(path: Path, report: Report) -> None:
    if report.scenes:
        save_imagination(path, report.scenes)


def list_files(run: Path) -> list[RunFile]:
    """The files of a run that the folder holds, with sizes in bytes."""
    return [
        RunFile(name, purpose, _size_of(run / name))
        for name, purpose in PURPOSES.items()
        if (run / name).exists()
    ]


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())


def render(report: Report, run_files: Sequence[RunFile]) -> str:
    """The whole page as HTML text; `run_files` are the files in the run's folder."""
    from_top_to_bottom = (
        header,
        sections.imagination,
        the_run,
        sections.reconstructions,
        horizon,
        sections.measures,
        sections.rivals,
        sections.curves,
        sections.signs,
        sections.speed,
        configuration,
        reproduce,
    )
    parts = files("rem_atari.report")
    config = report.config
    return Template(parts.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"REM on {report.game}: {config.preset}, seed {config.seed}"),
        style=parts.joinpath("page.css").read_text(encoding="utf-8"),
        body="\n".join([*(_make(make, report) for make in from_top_to_bottom), file_table(run_files)]),
        script=parts.joinpath("page.js").read_text(encoding="utf-8"),
    )


def _make(make: Callable[[Report], str], report: Report) -> str:
    """A section of the page; a sentence takes the place of one that fails."""
    try:
        return make(report)
    except Exception as error:
        name = make.__name__.replace("_", " ")
        note = f"The section on {name} could not be made: {explain(error)}."
        warnings.warn(note, RunWarning, stacklevel=2)
        return section(name.capitalize(), f'<p class="note">{escape(note)}</p>')


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
        blocks.append(
            f'<details><summary>{escape(group)} <span class="faint small">{changed} of {len(paths)} differ'
            f" from the paper</span></summary>"
            f"{table(('Setting', 'Value', 'Paper'), rows)}</details>"
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
    """A table of the files in the run's folder."""
    rows = "".join(
        f"<tr><td><code>{escape(file.name)}</code></td><td>{escape(file.purpose)}</td>"
        f'<td class="number">{size(file.size)}</td></tr>'
        for file in run_files
    )
    return section("Files", table(("File", "What it holds", "Size"), rows, numeric=("Size",)))


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
    if named_modules(report.config.env):
        lead += "<p>It is to be run where the game's module is found, such as in its folder.</p>"
    return section("How to reproduce", f"{lead}<pre>{escape(report.command)}</pre>{_sessions(report)}")


def _sessions(report: Report) -> str:
    """A table of the run's starts and resumptions: time, code and machine."""
    if not report.sessions:
        return ""
    rows = "".join(map(_session_row, report.sessions))
    return table(("Started", "By", "Commit", "Versions", "Machine"), rows)


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


def setting_text(value: object) -> str:
    """A setting's value as a person writes it."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
