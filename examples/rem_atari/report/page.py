"""The report as one HTML page that needs nothing else: styles, script and images are inside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from rem_atari.errors import RunWarning, explain
from rem_atari.report import colophon, quality_sections, sections
from rem_atari.report.contents import Report, RunFile

SECTIONS = (
    sections.header,
    sections.imagination,
    sections.reconstructions,
    quality_sections.horizon,
    quality_sections.measures,
    sections.curves,
    sections.signs,
    sections.speed,
    colophon.configuration,
    colophon.reproduce,
)
"""The page from top to bottom, as far as the report alone decides it."""


def render(report: Report, run_files: Sequence[RunFile]) -> str:
    """The whole page as HTML text; `run_files` is what lies in the run's folder."""
    parts = files("rem_atari.report")
    config = report.config
    return Template(parts.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"REM on {report.game}: {config.preset}, seed {config.seed}"),
        style=parts.joinpath("page.css").read_text(encoding="utf-8"),
        body="\n".join([*(_make(make, report) for make in SECTIONS), colophon.file_table(run_files)]),
        script=parts.joinpath("page.js").read_text(encoding="utf-8"),
    )


def _make(make: Callable[[Report], str], report: Report) -> str:
    """A section of the page; one that fails says so in its place, and the others are there."""
    try:
        return make(report)
    except Exception as error:
        name = make.__name__.replace("_", " ")
        note = f"The section on {name} could not be made: {explain(error)}."
        warnings.warn(note, RunWarning, stacklevel=2)
        return sections.section(name.capitalize(), f'<p class="note">{escape(note)}</p>')
