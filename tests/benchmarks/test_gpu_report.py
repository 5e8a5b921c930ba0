"""The GPU report without a GPU: its arithmetic, what it makes of failures, and its rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from benchmark_rows import ROW

import retpop
from benchmarks import __main__ as command_line
from benchmarks import gpu_report as report
from benchmarks import measurements, pop, retention, runner, token_wise
from benchmarks.measurements import IN_GRAPH, Measurement, read
from benchmarks.peers import flash_linear_attention
from benchmarks.timing import QUICK
from benchmarks.work import BOTH, FORWARD, Contender, Group, Problem, Work

ROOT = Path(__file__).parent.parent.parent

CPU = torch.device("cpu")

PARTS = [name for name, part in report.PARTS.items() if part.ops]


def test_the_yardstick_of_rem_is_that_of_the_targets() -> None:
    """169 MB and 9.4 GFLOP for POP at the training shape in bfloat16."""
    rem = pop.GPU_SHAPES["paper_train"]
    assert rem.flops == pytest.approx(9.4e9, rel=0.03)
    assert 4 * 2 * rem.B * rem.tokens * rem.H * rem.D == pytest.approx(169e6, rel=0.01)


def test_what_backward_must_move() -> None:
    """POP reads its inputs again; a rotation does not need them. The final state is no output of training."""
    tiny = pop.Sizes(B=1, N=2, L=5, M=4, H=1, D=16)
    token = 4 * tiny.tokens * 16
    passes = pop.by_us(pop.problem(tiny, torch.float32, CPU), backend="torch").passes()
    forward, both = (passes[direction].floor_bytes for direction in (FORWARD, BOTH))
    assert forward == 4 * token + 4 * 16 * 16
    assert both - forward == (3 + 1 + 3) * token
    problem = token_wise.rotation_problem(retention.Sizes(B=1, T=9, H=2, D=16), torch.float32, CPU)
    passes = token_wise.rotation(problem, backend="triton").passes()
    assert passes[BOTH].floor_bytes == 2 * passes[FORWARD].floor_bytes == 8 * 4 * 9 * 2 * 16


SHORTER = {
    "pop": ["--pass", FORWARD],
    "retention": ["--pass", FORWARD],
    "decoder": ["--op", "step"],
    "compiled decoder": ["--op", "step"],
}
"""Less work for parts that take long in the interpreter; `test_the_whole_rehearsal` does it all."""


REHEARSED_PART = "token-wise"
"""The part of the short rehearsal."""


@pytest.mark.parametrize("part", [part for part in PARTS if part != REHEARSED_PART])
def test_every_part_measures(part: str, tmp_path: Path) -> None:
    asked = report.PARTS[part]
    if "fla" in asked.backends.split(",") and find_spec("fla") and not torch.cuda.is_available():
        pytest.skip("flash-linear-attention is installed and needs a GPU")
    words = asked.command(tmp_path / "rows", dry_run=True)
    assert words[1:3] == ["-m", "benchmarks"]
    assert command_line.main([*words[3:], *SHORTER.get(part, [])]) == 0
    assert_measured(asked, read(tmp_path / "rows"))


def assert_measured(asked: report.Part, found: list[Measurement]) -> None:
    """Rows of a part: nothing else, nothing failed, and in a graph too where it has backends of ours."""
    assert found
    assert {row.op for row in found} <= set(asked.ops.split(","))
    assert all(row.samples for row in found)
    assert not any(map(report._failed, found))
    graphs = {row.backend for row in found if row.backend.endswith(IN_GRAPH)}
    wanted = asked.backends.removesuffix(",fla")
    assert graphs == ({wanted + IN_GRAPH} if wanted else set())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_asks_for_what_is_there(part: str) -> None:
    """Of the names on its command line on a GPU."""
    words = report.PARTS[part].command(Path("rows"), dry_run=False)
    options = command_line.parser().parse_args(words[3:])
    found = list(report.PARTS[part].selection().groups())
    direct = set(options.op) & set(runner.DIRECT)
    assert direct or {group.op for group in found} == set(options.op)
    for names, name in ((options.mode, "mode"), (options.dtype, "dtype")):
        assert names is None or {getattr(group, name) for group in found} == set(names)


class FlashLinearAttention:
    """Its functions, with decays made in the call; this version has no fused_chunk_retention."""

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
    """Eagerly only, and right."""
    monkeypatch.setattr(flash_linear_attention, "functions", FlashLinearAttention)
    words = ["run", "--dry-run", "--dtype", "fp32", "--op", "pop,retention", "--backend", "fla"]
    assert command_line.main([*words, "--csv", str(tmp_path / "rows")]) == 0
    found = read(tmp_path / "rows")
    assert {row.verdict for row in found} == {"right"}
    assert {(row.op, row.mode, row.backend, row.direction) for row in found} == {
        ("pop", "pop", "fla, composed", FORWARD),
        ("pop", "pop", "fla, composed", BOTH),
        ("retention", "chunkwise", "fla, chunk_retention", FORWARD),
        ("retention", "chunkwise", "fla, chunk_retention", BOTH),
        ("retention", "recurrent", "fla, fused_recurrent_retention", FORWARD),
    }


def group(*runs: Callable[[], object]) -> Group:
    """A contender for each run, that runs it when it is timed."""

    def make(problem: Problem, *, run: Callable[[], object]) -> Work:
        work = retention.by_us(problem, backend="torch")
        return replace(work, run=lambda: run() or work.run(), answer=work.run)

    return Group(
        op="retention",
        shape="test",
        mode="chunkwise",
        dtype="float32",
        passes=(FORWARD,),
        problem=partial(retention.problem, retention.SHAPES["tiny"], torch.float32),
        contenders={
            str(i): Contender(make=partial(make, run=run), reference=retention.reference, states=1)
            for i, run in enumerate(runs)
        },
    )


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_case_that_fails_costs_that_case(calls_before: int) -> None:
    """Whether it fails when it is checked or when it warms up."""
    left = iter(range(calls_before))

    def fail() -> None:
        if next(left, None) is None:
            raise ValueError("no such shape\nat all")

    (found,) = runner.measure(group(lambda: None, fail, lambda: None), CPU, QUICK)
    assert [row.verdict for row in found] == ["right", "failed", "right"]
    assert found[1].note == "ValueError: no such shape"
    assert [len(row.samples) for row in found] == [2, 0, 2]


def test_a_lost_device_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came after it would tell nothing: the group's rows are failures, and no other group is begun."""

    def lose() -> None:
        raise RuntimeError("CUDA error: misaligned address")

    begun = []

    def groups() -> object:
        for runs in ((lambda: None,), (lose, lambda: None), (lambda: None,)):
            begun.append(runs)
            yield group(*runs)

    monkeypatch.setitem(runner.OPS, "retention", groups)
    found = list(runner.run(runner.Selection(ops=["retention"]), CPU, QUICK))
    assert [[row.verdict for row in rows] for rows in found] == [["right"], ["failed", "failed"]]
    assert found[1][0].note == "RuntimeError: CUDA error: misaligned address"
    assert len(begun) == 2


JUNIT = """<testsuites><testsuite><testcase name="test_pop[rem]" time="1.5"><properties>
<property name="out" value="0.002 of 0.004"/></properties></testcase>
<testcase name="test_retention" time="0.1"><failure message="out: 1 is above 0.004&#10;more"/></testcase>
<testcase name="test_tail" time="0"><skipped message="needs memory"/></testcase></testsuite></testsuites>"""


def test_tests_become_rows_with_their_errors(tmp_path: Path) -> None:
    (tmp_path / "junit").write_text(JUNIT)
    passed, failed, skipped = report.rows_of_tests(tmp_path / "junit")
    assert (passed.note, passed.verdict, passed.seconds) == ("out 0.002 of 0.004", "right", 1.5)
    assert (failed.note, failed.verdict) == ("out: 1 is above 0.004", "failed")
    assert (skipped.note, skipped.verdict) == ("skipped: needs memory", "right")


def test_the_worst_error_of_each_dtype_is_named() -> None:
    rows = [
        replace(ROW, op="tests", mode=f"test_{name}[torch.{dtype}]", note=note)
        for name, dtype, note in (
            ("pop", "bfloat16", "out 0.002 of 0.004; grad q 0.004 of 0.005"),
            ("step", "bfloat16", "out 0.001 of 0.004"),
            ("pop", "float32", "state 1e-06 of 5e-06"),
            ("pop", "float16", "skipped: needs memory"),
        )
    ]
    assert report.worst_errors(rows) == [
        "worst error, bfloat16: 80% of the bound, grad q of test_pop[torch.bfloat16]",
        "worst error, float32: 20% of the bound, state of test_pop[torch.float32]",
    ]


ALL_SKIPPED = '<testsuite><testcase name="a"><skipped message="no GPU"/></testcase></testsuite>'


@pytest.mark.parametrize("junit", [None, "<testsuite/>", ALL_SKIPPED])
def test_no_test_that_ran_is_a_failure(junit: str | None, tmp_path: Path) -> None:
    path = tmp_path / "junit"
    if junit is not None:
        path.write_text(junit)
    assert any(row.verdict == "failed" for row in report.rows_of_tests(path))


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
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # their imports take seconds
    ended = report.run_limited(command, 0.5, tmp_path / "log", environment)
    assert ended.status is None
    first, *_ = report.rows_of_tests(junit)
    assert (first.mode, first.verdict) == ("test_first", "right")


def test_the_table_comes_last_and_a_failure_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    eager = replace(ROW, backend="triton", samples=(2.0,), floor_bytes=4_000, copy_rate=4_000.0)
    graph = replace(eager, backend="triton" + IN_GRAPH, samples=(1.25,))
    rival = replace(ROW, backend="rival", verdict="wrong", note="output")
    broken = report._failure("tests", "too far off")
    report.print_report({"pop": [eager, graph, rival], "tests": [broken]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED tests tests forward: too far off"
    shown = [line.split() for line in lines if line.startswith("pop, pop")]
    assert shown[0][-6:] == ["forward", "2", "s", "1.25", "s", "80%"]
    assert shown[1][-2:] == ["wrong:", "output"]
    assert lines[-1] == "tests: 0 passed, 1 failed, 0 skipped"


@pytest.mark.parametrize(("failed", "status"), [((), 0), (("tests", "pop"), 1), (("pop",), 2)])
def test_the_exit_status_tells_whether_the_tests_passed(
    failed: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_part(part: str, *_: object, **__: object) -> list[Measurement]:
        return [report._failure(part, "cut")] if part in failed else []

    monkeypatch.setattr(report, "_run_part", run_part)
    assert report.main(["--dry-run", "--out", str(tmp_path)]) == status


def test_rows_of_a_part_that_is_cut_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_limited(command: list[str], *_: object) -> report.Ended:
        measurements.append(Path(command[command.index("--csv") + 1]), [ROW])
        return report.Ended(status=None, seconds=60.0)

    monkeypatch.setattr(report, "run_limited", run_limited)
    (tmp_path / "pop.log").touch()
    csv = tmp_path / "report.csv"

    def run_part(part: str, left: float) -> list[Measurement]:
        command = report.command_of(part, [part], csv, tmp_path, dry_run=False)
        return report._run_part(part, command, left, csv, tmp_path, {"TRITON_INTERPRET": "0"})

    kept, cut = run_part("pop", 1000.0)
    assert kept == ROW
    assert (cut.verdict, cut.note) == ("failed", "stopped after 60 s")
    expected = report.PARTS["retention"].projected
    (late,) = run_part("retention", expected - 2)
    assert late.note == f"skipped: it is expected to take {expected:.0f} s, and {expected - 2:.0f} s are left"
    assert read(csv) == [kept, cut, late]


def test_a_part_is_expected_to_take_what_it_measures() -> None:
    """More contenders take longer; what is not counted takes its limit; none takes more than that."""
    parts = report.PARTS
    assert parts["token-wise"].projected < replace(parts["token-wise"], dtypes="").projected
    assert parts["rem_atari"].projected == parts["rem_atari"].limit
    assert replace(parts["pop"], limit=13.0).projected == 13.0


def test_what_a_report_launches_is_recorded(tmp_path: Path) -> None:
    """Kernels of tests and of an operation, each once, without a GPU."""
    path = tmp_path / "rows"
    command = report.command_of(
        report.COMPILE, ["token-wise", report.COMPILE, report.TESTS], path, tmp_path, dry_run=True
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "RETPOP_GPU_TESTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row.mode: int(row.note.split()[0]) for row in read(path)}
    assert found["token-wise"] > 3
    assert found["tests"] > 60


def rehearse(folder: Path, *arguments: str) -> tuple[str, list[Measurement]]:
    """Run the script's dry run as a machine would that has not installed retpop: its output, and its rows."""
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
    return done.stdout, read(folder / "results" / "gpu_rehearsal_abc.csv")


def test_a_short_rehearsal(tmp_path: Path) -> None:
    """One part, from another folder, without an installation."""
    shown, rows = rehearse(tmp_path, "--parts", REHEARSED_PART)
    assert_measured(report.PARTS[REHEARSED_PART], rows)
    assert {row.commit for row in rows} == {"abc"}
    assert "norm_gate" in shown.rpartition("of floor")[2]


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    shown, rows = rehearse(tmp_path)
    ops = {op for part in report.PARTS.values() for op in part.ops.split(",") if op} | {"tests", "compile"}
    assert {row.op for row in rows} == ops
    assert " 0 failed" in shown.splitlines()[-3]
