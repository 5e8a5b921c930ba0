"""Results as files: what is kept, what a ratio of two says, what two runs say, and how times are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_rows import RECORD

from benchmarks import __main__ as command_line
from benchmarks import records
from benchmarks.compare import compare, print_changes
from benchmarks.machine import slug
from benchmarks.records import RefusedError, append, find, ratio, read
from benchmarks.timing import RATE, Effort, interleaved, peak_bytes, quartiles

CPU = torch.device("cpu")


def test_a_record_sums_up_its_samples() -> None:
    assert (RECORD.seconds, RECORD.spread, RECORD.fraction) == (2.0, (1.5, 2.5), 0.25)
    assert replace(RECORD, flops=0).fraction is None
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rows_come_back_and_the_later_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    other = replace(RECORD, backend="rival, chunks of 64", peak_bytes=12, size=3, note='says "no", twice')
    append(path, [RECORD, other])
    later = replace(RECORD, samples=(5.0,), date="2026-01-03T00:00:00")
    append(path, [later])
    assert read(path) == [later, other]


def test_results_are_found_by_their_commit(tmp_path: Path) -> None:
    for name in ("cpu-abc123", "cpu-abd456_changes"):
        append(tmp_path / f"{name}.csv", [RECORD])
    assert find("abc", tmp_path).name == "cpu-abc123.csv"
    assert find("abd456+changes", tmp_path).name == "cpu-abd456_changes.csv"
    assert find(str(tmp_path / "cpu-abc123.csv")) == tmp_path / "cpu-abc123.csv"
    for name in ("ab", "ff", ""):
        with pytest.raises(FileNotFoundError):
            find(name, tmp_path)
    assert records.path_of("AMD EPYC, 2 threads", "abc+changes").name == "amd_epyc_2_threads-abc_changes.csv"
    assert slug("H200 (80 GB)") == "h200_80_gb"


def test_samples_taken_in_turn_are_compared_one_by_one() -> None:
    """A slow moment that both have seen is no spread of their ratio."""
    twice = replace(RECORD, backend="rival", samples=(4.0, 2.0, 6.0))
    found = ratio(twice, RECORD)
    assert (found.low, found.middle, found.high) == (2.0, 2.0, 2.0)
    assert str(found) == "2.00x (2.00 to 2.00)"
    apart = ratio(replace(twice, date="another"), RECORD)
    assert apart.middle == 2.0
    assert apart.low < 2.0 < apart.high


@pytest.mark.parametrize("verdict", ["wrong", "failed"])
def test_no_ratio_of_what_is_not_right(verdict: str) -> None:
    bad = replace(RECORD, backend="rival", verdict=verdict)
    for sides in ((bad, RECORD), (RECORD, bad)):
        with pytest.raises(RefusedError, match=f"rival is {verdict}"):
            ratio(*sides)


def test_two_runs_are_compared_at_equal_matrix_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """The machine is half as fast in the second: what takes twice as long there has not changed."""
    slow = replace(RECORD, samples=(4.0, 4.0), matrix_rate=1_000.0)
    before = [replace(RECORD, samples=(2.0, 2.0), backend=name) for name in ("a", "b", "c", "gone")]
    after = [
        replace(slow, backend="a"),
        replace(slow, backend="b", samples=(1.0, 1.2)),
        replace(slow, backend="c", verdict="wrong"),
    ]
    same, faster, refused = compare(before, after)
    assert (same.verdict, same.time.middle, same.at_equal_rate.middle) == ("equal", 2.0, 1.0)
    assert faster.verdict == "faster"
    assert "c is wrong" in refused.refused
    print_changes([same, faster, refused])
    shown = capsys.readouterr().out
    assert "refused: c is wrong" in shown
    assert shown.endswith("B is faster in 1 of 3, slower in 0\n")


def test_runs_take_turns() -> None:
    order: list[str] = []
    effort = Effort(rounds=3, least=1, sample_seconds=0.0, group_seconds=60.0)
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, CPU, effort)
    assert "".join(order) == "aabbcc" + "aabbcc" + "ccbbaa" + "aabbcc"  # each after itself
    assert {name: len(samples) for name, samples in found.items()} == dict.fromkeys("abc", 3)


def test_what_takes_long_is_measured_the_least_times() -> None:
    effort = Effort(rounds=50, least=2, sample_seconds=0.0, group_seconds=0.0)
    assert len(interleaved({RATE: lambda: None}, CPU, effort)[RATE]) == 2


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
    assert "pop, pop, tiny (B2 N3 L5 M4 H2 D16), float32" in shown
    assert command_line.main(["compare", str(path), str(path)]) == 0
    assert "slower in 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--op", "nothing"], ["--dtype", "int8"], ["--quick", "--mode", "nothing"]]
)
def test_what_is_not_there_is_not_run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(["run", *words])
    assert ended.value.code != 0
