"""The report of a run: one HTML page with curves, pictures and measures, and the pictures as files."""

from __future__ import annotations

from rem_atari.report.page import write_report

__all__ = ["write_report"]
