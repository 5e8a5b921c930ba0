"""The page "With other tools" runs as it stands, with the packages of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "with_other_tools.md"
BLOCK = re.compile(r"^```(?:python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "torchao", "accelerate", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `interplay`)")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "example"}
    for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        exec(compile(match[1], PAGE, "exec"), namespace)
