"""What all tests of the agent share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one chart of a report's curves, because all take a second; reports of fixtures have all."""
    page = sys.modules.get("rem_atari.report.page")
    if page is None:
        return
    save_curves = page.save_curves

    def save_one(path: Path, charts: Sequence[object]) -> None:
        save_curves(path, charts[:1])

    monkeypatch.setattr(page, "save_curves", save_one)


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without the report that takes them longer than the run itself."""
    monkeypatch.setattr("rem_atari.report.write_report", lambda run: run / "report.html")
