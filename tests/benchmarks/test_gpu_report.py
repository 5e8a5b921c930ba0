"""The GPU report without a GPU: its arithmetic, what it makes of failures, and its rehearsal."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import retpop
from benchmarks.gpu import report, suite, worker
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.floors import Ceilings
from benchmarks.gpu.ops import Entry, Sizes, rotation, separate_pop, timed
from benchmarks.gpu.rows import Row, append_row, read_rows
from benchmarks.peers import flash_linear_attention
from benchmarks.work import Work

ROOT = Path(__file__).parent.parent.parent

CPU = torch.device("cpu")

FLOORS = [
    Row(part="floors", what="copy", seconds=2.0, floor_bytes=8_000),
    Row(part="floors", what="matrix product", dtype="bfloat16", seconds=0.5, floor_flops=1_000),
]
"""4,000 bytes and 2,000 operations a second."""

ROW = Row(part="pop", what="pop_rows", shape="tiny", dtype="bfloat16", way="forward", mode="eager")


def test_rows_outlive_their_writer(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert read_rows(path) == []
    append_row(path, ROW)
    with path.open("a") as file:
        file.write('{"part": "pop", "wha')
    assert read_rows(path) == [ROW]


@pytest.mark.parametrize(
    ("moved", "computed", "share"),
    [(4_000, 0, 0.5), (4_000, 1_000, 0.5), (2_000, 3_000, 0.75), (0, 0, None)],
)
def test_a_floor_is_the_later_of_moving_and_computing(moved: int, computed: int, share: float | None) -> None:
    row = replace(ROW, seconds=2.0, floor_bytes=moved, floor_flops=computed)
    assert Ceilings(FLOORS).fraction(row) == share


@pytest.mark.parametrize("row", [replace(ROW, floor_bytes=8), replace(ROW, seconds=1.0, floor_bytes=8)])
def test_no_share_without_a_time_or_a_ceiling(row: Row) -> None:
    assert Ceilings([]).fraction(row) is None


def test_the_yardstick_of_rem_is_that_of_the_targets() -> None:
    """169 MB and 9.4 GFLOP for POP at the training shape in bfloat16."""
    rem = Sizes(B=64, N=10, L=65, M=64, H=4, D=64)
    assert rem.flops == pytest.approx(9.4e9, rel=0.03)
    assert 4 * 2 * rem.B * rem.tokens * rem.H * rem.D == pytest.approx(169e6, rel=0.01)


def test_what_backward_must_move() -> None:
    """POP reads its inputs again; a rotation does not need them. The final state is no output of training."""
    tiny = Sizes(B=1, N=2, L=5, M=4, H=1, D=16)
    token = 4 * tiny.tokens * 16
    rows = {(row.way, row.mode): row for row in timed(separate_pop(tiny, torch.float32, CPU), Clock(CPU))}
    forward, both = (rows[way, "graph"].floor_bytes for way in ("forward", "forward+backward"))
    assert forward == 4 * token + 4 * 16 * 16
    assert both - forward == (3 + 1 + 3) * token
    rows = {row.way: row for row in timed(rotation("", (1, 9, 2, 16), torch.float32, CPU), Clock(CPU))}
    assert rows["forward+backward"].floor_bytes == 2 * rows["forward"].floor_bytes == 8 * 4 * 9 * 2 * 16


@pytest.mark.parametrize("part", worker.PARTS)
def test_every_part_measures(part: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    assert worker.main([part, "--rows", str(rows), "--dry-run"]) == 0
    found = read_rows(rows)
    assert {row.part for row in found} == {part}
    assert all(row.seconds or "not measured" in row.note for row in found)


class FlashLinearAttention:
    """Its functions, without a decay that a graph could hold; this version has no fused_chunk_retention."""

    def __init__(self) -> None:
        self.fused_recurrent_retention = self.chunk_retention

    @staticmethod
    def chunk_retention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        log_decay = retpop.retnet_decay(q.shape[2])
        out, state = retpop.retention(q, k, v, log_decay, scale=scale, state=initial_state)
        return out, state if output_final_state else None


def test_flash_linear_attention_where_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flash_linear_attention, "functions", FlashLinearAttention)
    rows = tmp_path / "rows"
    assert worker.main(["peers", "--rows", str(rows), "--dry-run"]) == 0
    found = {(row.what, row.way, row.mode) for row in read_rows(rows) if "fla" in row.what}
    both = ("fla chunk_retention", "fla chunk_retention, composed")
    assert found == {(what, way, "eager") for what in both for way in ("forward", "forward+backward")} | {
        ("fla fused_recurrent_retention", "forward", "eager"),
        ("fla fused_chunk_retention", "", ""),
    }


def test_the_composition_is_pop() -> None:
    sizes = Sizes(B=2, N=3, L=5, M=4, H=2, D=8)
    tokens = [torch.randn(2, 15, 2, 8) for _ in range(3)] + [torch.randn(2, 3, 4, 2, 8) for _ in range(3)]
    chunk_retention = FlashLinearAttention.chunk_retention
    found = flash_linear_attention.compose_pop(chunk_retention, tokens[:3], tokens[3:], None, sizes.L, 0)
    expected = retpop.pop_retention(*tokens, retpop.retnet_decay(2), block_size=sizes.L)
    for a, e in zip(found, expected[:2], strict=True):
        torch.testing.assert_close(a, e)


def _works(*errors: Exception | None) -> Iterator[Entry]:
    for index, error in enumerate(errors):

        def run(error: Exception | None = error) -> list[torch.Tensor]:
            if error is not None:
                raise error
            return [torch.zeros(1)]

        yield Entry(part="pop", what=str(index), shape="", dtype=torch.float32, work=Work(run=run, graded=0))


@pytest.mark.parametrize(
    ("error", "after"),
    [(ValueError("no such shape\nat all"), True), (RuntimeError("CUDA error: misaligned address"), False)],
)
def test_a_case_that_fails_costs_that_case(error: Exception, after: bool) -> None:
    """Unless the device is lost: what came after it would tell nothing."""
    found = list(worker.time_entries(lambda clock: _works(None, error, None), Clock(CPU), "pop"))
    failed = [row for row in found if row.failed]
    assert [row.what for row in failed] == ["1"]
    assert failed[0].note == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert {row.what for row in found} == {"0", "1"} | ({"2"} if after else set())


JUNIT = """<testsuites><testsuite><testcase name="test_pop[rem]" time="1.5"><properties>
<property name="out" value="0.002 of 0.004"/></properties></testcase>
<testcase name="test_retention" time="0.1"><failure message="out: 1 is above 0.004&#10;more"/></testcase>
<testcase name="test_tail" time="0"><skipped message="needs memory"/></testcase></testsuite></testsuites>"""


def test_tests_become_rows_with_their_errors(tmp_path: Path) -> None:
    (tmp_path / "junit").write_text(JUNIT)
    passed, failed, skipped = suite.rows(tmp_path / "junit")
    assert (passed.note, passed.failed, passed.seconds) == ("out 0.002 of 0.004", False, 1.5)
    assert (failed.note, failed.failed) == ("out: 1 is above 0.004", True)
    assert (skipped.note, skipped.failed) == ("skipped: needs memory", False)


ALL_SKIPPED = '<testsuite><testcase name="a"><skipped message="no GPU"/></testcase></testsuite>'


@pytest.mark.parametrize("junit", [None, "<testsuite/>", ALL_SKIPPED])
def test_no_test_that_ran_is_a_failure(junit: str | None, tmp_path: Path) -> None:
    path = tmp_path / "junit"
    if junit is not None:
        path.write_text(junit)
    assert any(row.failed for row in suite.rows(path))


def test_a_part_is_stopped_at_its_limit_with_all_it_started(tmp_path: Path) -> None:
    pipe, log = tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    script = f"(echo up; sleep 60; echo late) > {pipe} & wait"
    ended = report.run_limited(["sh", "-c", script], 0.5, log, os.environ)
    assert ended.status is None
    os.set_blocking(reader, True)
    with os.fdopen(reader) as file:
        assert "late" not in file.read()  # ends when nobody is left who could write
    ended = report.run_limited([sys.executable, "-c", "print(7); exit(3)"], 60, log, os.environ)
    assert (ended.status, log.read_text()) == (3, "7\n")


def test_tests_that_are_stopped_leave_what_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is reached when the second test has begun."""
    (tmp_path / "test_two.py").write_text(
        "import time\n\ndef test_first():\n    pass\n\n"
        f"def test_second():\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n    time.sleep(600)\n"
    )

    class Patient(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 0.5:
                while not (tmp_path / "begun").exists():
                    time.sleep(0.01)
            return super().wait(timeout)

    monkeypatch.setattr(report.subprocess, "Popen", Patient)
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}", str(tmp_path)]
    ended = report.run_limited(command, 0.5, tmp_path / "log", os.environ)
    assert ended.status is None
    first, *_ = suite.rows(junit)
    assert (first.what, first.failed) == ("test_first", False)


def test_the_table_comes_last_and_a_failure_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    timed_rows = [replace(ROW, mode=mode, seconds=2.0, floor_bytes=4_000) for mode in ("eager", "graph")]
    broken = Row(part="tests", what="test_pop", note="too far off", failed=True)
    report.print_report([*FLOORS, *timed_rows, broken])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED tests: test_pop   too far off"
    assert [line.split() for line in lines if line.startswith("pop_rows")] == [
        ["pop_rows", "tiny", "bfloat16", "forward", "2", "s", "2", "s", "50%"]
    ]
    assert lines[-1] == "tests: 0 passed, 1 failed, 0 skipped"


@pytest.mark.parametrize(("failed", "status"), [((), 0), (("tests", "pop"), 1), (("pop",), 2)])
def test_the_exit_status_tells_whether_the_tests_passed(
    failed: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RETPOP_REPORT_FOLDER", str(tmp_path))
    monkeypatch.setattr(
        report, "_run_part", lambda part, *_, **__: [Row(part=part, what=part, failed=part in failed)]
    )
    assert report.main(["--dry-run", "--out", str(tmp_path)]) == status


def rehearse(folder: Path, *arguments: str) -> tuple[str, list[dict[str, str]]]:
    """Run the script's dry run as a machine would that has not installed retpop: its output, and the CSV."""
    # The checkout's editable installation is taken back before anything is imported.
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "named = [(x, getattr(x, '__module__', '')) for x in sys.meta_path]\n"
        "sys.meta_path[:] = [x for x, module in named if '__editable__' not in module]\n"
        "sys.path[:] = [x for x in sys.path if '__editable__' not in x]\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OUT", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_report.sh", "--dry-run", "--out", "results", *arguments],
        cwd=folder,
        env=environment | {"PYTHON": sys.executable, "PYTHONPATH": str(folder), "RETPOP_COMMIT": "abc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "results" / "gpu_rehearsal_abc.csv").open(encoding="utf-8") as file:
        return done.stdout, list(csv.DictReader(file))


def test_a_short_rehearsal(tmp_path: Path) -> None:
    """Two parts, from another folder, without an installation."""
    shown, rows = rehearse(tmp_path, "--parts", "floors,token-wise")
    assert {row["part"] for row in rows} == {"floors", "token-wise"}
    assert {row["commit"] for row in rows} == {"abc"}
    assert "norm_gate" in shown.rpartition("of floor")[2]


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    shown, rows = rehearse(tmp_path)
    assert {row["part"] for row in rows} == set(report.LIMITS)
    assert " 0 failed" in shown.splitlines()[-3]
