"""Results as files: what is kept, what a ratio of two says, and what two runs say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_rows import ROW

from benchmarks import __main__ as command_line
from benchmarks import measurements
from benchmarks.compare import compare, report
from benchmarks.machine import ROOT, slug
from benchmarks.measurements import RefusedError, append, find, ratio, read
from benchmarks.timing import Effort, in_turn, peak_bytes, quartiles, sampler
from benchmarks.work import FORWARD

CPU = torch.device("cpu")


def test_a_row_sums_up_its_samples() -> None:
    assert (ROW.seconds, ROW.spread, ROW.fraction) == (2.0, (1.5, 2.5), 0.25)
    assert replace(ROW, flops=0).fraction is None
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rows_come_back_and_the_later_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    other = replace(ROW, backend="rival, chunks of 64", peak_bytes=12, size=3, note='says "no", twice')
    append(path, [ROW, other])
    later = replace(ROW, samples=(5.0,), date="2026-01-03T00:00:00")
    append(path, [later])
    assert read(path) == [later, other]


def test_rows_outlive_their_writer(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert read(path) == []
    append(path, [ROW])
    with path.open("a") as file:
        file.write("a machine,abc,2026")
    assert read(path) == [ROW]
    other = replace(ROW, backend="rival")
    append(path, [other])
    assert read(path) == [ROW, other]


def test_rows_of_before_the_later_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    append(path, [ROW])
    lines = [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    assert read(path) == [ROW]
    with pytest.raises(ValueError, match="has other columns"):
        append(path, [ROW])


@pytest.mark.parametrize(
    ("moved", "computed", "share"),
    [(4_000, 0, 0.5), (4_000, 1_000, 0.5), (2_000, 3_000, 0.75), (0, 0, None)],
)
def test_a_floor_is_the_later_of_moving_and_computing(moved: int, computed: int, share: float | None) -> None:
    """4,000 bytes and 2,000 operations a second."""
    row = replace(ROW, samples=(2.0,), floor_bytes=moved, flops=computed, copy_rate=4_000.0)
    assert row.fraction == share


@pytest.mark.parametrize("changes", [{"samples": ()}, {"matrix_rate": 0.0}])
def test_no_share_without_a_time_or_a_ceiling(changes: dict[str, object]) -> None:
    assert replace(ROW, **changes).fraction is None


def test_results_are_found_by_their_commit(tmp_path: Path) -> None:
    for name in ("cpu-abc123", "cpu-abd456_changes"):
        append(tmp_path / f"{name}.csv", [ROW])
    assert find("abc", tmp_path).name == "cpu-abc123.csv"
    assert find("abd456+changes", tmp_path).name == "cpu-abd456_changes.csv"
    assert find(str(tmp_path / "cpu-abc123.csv")) == tmp_path / "cpu-abc123.csv"
    for name in ("ab", "ff", ""):
        with pytest.raises(FileNotFoundError):
            find(name, tmp_path)
    assert (
        measurements.path_of("AMD EPYC, 2 threads", "abc+changes").name
        == "amd_epyc_2_threads-abc_changes.csv"
    )
    assert slug("H200 (80 GB)") == "h200_80_gb"


def test_samples_taken_in_turn_are_compared_one_by_one() -> None:
    """A slow moment that both have seen is no spread of their ratio."""
    twice = replace(ROW, backend="rival", samples=(4.0, 2.0, 6.0))
    found = ratio(twice, ROW)
    assert (found.low, found.middle, found.high) == (2.0, 2.0, 2.0)
    assert str(found) == "2.00x (2.00 to 2.00)"
    apart = ratio(replace(twice, date="another"), ROW)
    assert apart.middle == 2.0
    assert apart.low < 2.0 < apart.high


@pytest.mark.parametrize("verdict", ["wrong", "failed"])
def test_no_ratio_of_what_is_not_right(verdict: str) -> None:
    bad = replace(ROW, backend="rival", verdict=verdict)
    for sides in ((bad, ROW), (ROW, bad)):
        with pytest.raises(RefusedError, match=f"rival is {verdict}"):
            ratio(*sides)


def test_two_runs_are_compared_at_equal_matrix_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """The machine is half as fast in the second: what takes twice as long there has not changed."""
    slow = replace(ROW, samples=(4.0, 4.0), matrix_rate=1_000.0)
    before = [replace(ROW, samples=(2.0, 2.0), backend=name) for name in ("a", "b", "gone")]
    after = [replace(slow, backend="a"), replace(slow, backend="b", samples=(1.0, 1.2))]
    same, faster = compare(before, after)
    assert (same.verdict(), same.time.middle, same.at_equal_rate.middle) == ("equal", 2.0, 1.0)
    assert faster.verdict() == "faster"
    assert report([same, faster]) == 0
    assert "\nB is faster in 1 of 2, slower in 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("after", "verdict", "status"),
    [
        ({"samples": (2.08, 2.08)}, "slower", 0),
        ({"samples": (2.12, 2.12)}, "SLOWER", 1),
        ({"samples": (1.5, 3.0)}, "equal", 0),  # more than 5% at the median, within the noise
        ({"verdict": "wrong", "note": "output"}, "refused: torch is wrong: output", 1),
    ],
)
def test_a_row_that_got_slower_or_wrong_fails_a_comparison(
    after: dict[str, object], verdict: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = compare([replace(ROW, samples=(2.0, 2.0))], [replace(ROW, **after)])
    assert changes[0].verdict() == verdict
    assert report(changes, limit=1.05) == status
    assert verdict in capsys.readouterr().out
    assert report(changes, limit=1.2) == int(verdict.startswith("refused"))


def test_this_checkout_is_as_fast_as_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """Two processes, alternately; samples of a tiny call say nothing of their times."""
    words = ["against", str(ROOT), "--quick", "--op", "pop", "--dtype", "fp32", "--backend", "torch"]
    assert command_line.main([*words, "--pass", FORWARD, "--cpu-time", "--limit", "1000"]) == 0
    shown = capfd.readouterr().out
    assert shown.count("pop, pop, tiny  float32  torch") == 2  # as it comes and at the end
    assert "not right any more: 0" in shown


def test_runs_take_turns() -> None:
    order: list[str] = []
    effort = Effort(rounds=3, least=1, sample_seconds=1e-9, group_seconds=60.0)
    samplers = {name: sampler(lambda name=name: order.append(name), CPU, effort) for name in "abc"}
    found = in_turn(samplers, effort)
    assert "".join(order) == "aabbcc" + "aabbcc" + "ccbbaa" + "aabbcc"  # each after itself
    assert {name: len(samples) for name, samples in found.items()} == dict.fromkeys("abc", 3)


def test_what_takes_long_is_measured_the_least_times() -> None:
    effort = Effort(rounds=50, least=2, sample_seconds=0.0, group_seconds=0.0)
    assert len(in_turn({"it": lambda: 1.0}, effort)["it"]) == 2


def test_peak_memory_is_what_is_held_at_once() -> None:
    def run() -> torch.Tensor:
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b.sum()

    assert 8_000 <= peak_bytes(run, CPU) < 9_000
    kept = torch.zeros(5000)
    assert peak_bytes(lambda: kept.add_(1), CPU) < 1_000


def test_a_quick_run_ends_in_a_table_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    words = ["run", "--quick", "--op", "pop,step", "--dtype", "fp32", "--backend", "torch,yet-another-retnet"]
    assert command_line.main([*words, "--csv", str(path)]) == 0
    rows = read(path)
    assert {row.op for row in rows} == {"pop", "step"}
    assert {row.backend for row in rows} == {"torch", "yet-another-retnet"}
    assert {row.verdict for row in rows} == {"right"}
    assert all(row.peak_bytes and row.fraction for row in rows)
    shown = capsys.readouterr().out
    assert "pop, pop, tiny (B1 N2 L5 M4 H2 D16), float32" in shown
    assert command_line.main(["compare", str(path), str(path)]) == 0
    assert "slower in 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--op", "nothing"], ["--dtype", "int8"], ["--quick", "--mode", "nothing"]]
)
def test_what_is_not_there_is_not_run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(["run", *words])
    assert ended.value.code != 0
