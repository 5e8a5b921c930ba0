"""The example: a resumed run is the run itself, two processes are one, and windows follow each other."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from retpop.models import RetNetLM

SCRIPT = Path(__file__).parents[3] / "examples" / "language_model" / "train.py"
TEXT = "A short text that is read over and over, until the model knows it by heart. " * 20


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("language_model_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(folder: Path, *more: str) -> list[str]:
    """The command line of a tiny run below ``folder``, which is made."""
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    sizes = "--steps 12 --rows 4 --window 16 --width 16 --layers 1 --save-every 5 --sample 5"
    return [str(folder / "text.txt"), "--folder", str(folder / "run"), *sizes.split(), *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return RetNetLM.from_pretrained(folder / "run" / "model").state_dict()


def test_a_resumed_run_is_the_run_itself(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(words(tmp_path / "whole"))
    stopped, step = words(tmp_path / "stopped"), train.Trainer.train_step

    def stop_at_8(trainer: object) -> torch.Tensor:
        if trainer.step == 8:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", stop_at_8)
        with pytest.raises(KeyboardInterrupt):
            train.main(stopped)
    capsys.readouterr()
    train.main(stopped)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "step 10",
        "step 12",
        "held-out text",
    ]
    expected = weights(tmp_path / "whole")
    for name, weight in weights(tmp_path / "stopped").items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.slow
def test_two_processes_are_one(train: ModuleType, tmp_path: Path) -> None:
    train.main(words(tmp_path / "one", "--steps", "3"))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(SCRIPT),
    ]
    done = subprocess.run(
        [*launch, *words(tmp_path / "two", "--steps", "3")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = weights(tmp_path / "one")
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_rows_read_stretches_of_their_own_without_a_gap(train: ModuleType) -> None:
    text = torch.arange(200, dtype=torch.uint8)
    streams = train.Streams(text, rows=3, window=8)
    pieces = [streams.at(step) for step in range(streams.steps)]
    read = torch.cat([tokens for tokens, _, _ in pieces], dim=1)
    assert read[:, 0].tolist() == [0, 66, 132]
    assert (read.diff(dim=1) == 1).all()
    assert all(torch.equal(targets, tokens + 1) for tokens, targets, _ in pieces)
    assert [over for _, _, over in pieces] == [True] + [False] * (streams.steps - 1)
    assert torch.equal(streams.at(streams.steps)[0], pieces[0][0])
    assert torch.equal(train.Streams(text, 3, 8, rank=1, world=3).at(2)[0], pieces[2][0][1:2])
    with pytest.raises(ValueError, match="The text has 200 bytes; 30 rows of 8 need more"):
        train.Streams(text, rows=30, window=8)


def test_bits_are_those_of_one_pass_over_the_text(train: ModuleType) -> None:
    model = train.build(train.arguments(["--width", "16", "--layers", "1"])).double()
    text = torch.frombuffer(bytearray(TEXT[:100], "ascii"), dtype=torch.uint8)
    loss, _ = model(text[None, :-1].long(), targets=text[None, 1:].long())
    assert train.bits_per_byte(model, text, window=13) == pytest.approx(loss.item() / math.log(2))
