"""The performance page says what the results say; targets are met, missed or not measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_rows import ROW

from benchmarks import page, plots
from benchmarks.measurements import Measurement, append
from benchmarks.targets import Judged, Results, judge, slope

TRAINING = replace(ROW, op="decoder", direction="forward+backward", samples=(1.0,), flops=1_400)


def judged(results: Results, words: str) -> Judged:
    """The one target whose name has these words."""
    (found,) = [each for each in judge(results) if words in each.target.name]
    return found


def test_without_results_nothing_was_measured() -> None:
    found = judge(Results())
    assert {each.verdict for each in found} == {
        "not measured: not in these results",
        "not measured: no GPU",
    }


@pytest.mark.parametrize(("flops", "verdict"), [(1_400, "met"), (1_200, "**missed** by 8%")])
def test_a_share_of_the_matrix_rate_is_judged(flops: int, verdict: str) -> None:
    """2,000 operations a second: 1,400 of them in a second are 70%; 65% are wanted."""
    slower = replace(TRAINING, backend="compile", flops=flops, samples=(4.0,))
    found = judged(Results(rows=[replace(TRAINING, flops=flops), slower]), "decoder, float32")
    assert found.verdict == verdict
    assert found.figure.text.endswith(", torch")


def test_a_wrong_row_meets_nothing() -> None:
    wrong = replace(TRAINING, verdict="wrong")
    assert judged(Results(rows=[wrong]), "decoder, float32").figure is None
    theirs = replace(TRAINING, backend="yet-another-retnet", samples=(2.0,))
    assert judged(Results(rows=[TRAINING, theirs]), "two-pass port").verdict == "met"
    assert judged(Results(rows=[wrong, theirs]), "two-pass port").figure is None


def test_the_fastest_chunks_of_theirs_count() -> None:
    ours = replace(ROW, op="retention", shape="long", mode="chunkwise", samples=(1.0,))
    theirs = [
        replace(ours, backend=f"yet-another-retnet, chunks of {size}", samples=(seconds,))
        for size, seconds in ((64, 3.0), (128, 1.4), (256, 2.0))
    ]
    found = judged(Results(rows=[ours, *theirs]), "T = 4096")
    assert found.figure.value == pytest.approx(1.4)
    assert found.verdict == "**missed** by 7%"
    assert judged(Results(rows=[ours, *theirs]), "every mode").verdict == "met"


def test_single_tokens_count_among_the_modes() -> None:
    """Of every batch by itself; points of a series do not."""
    ours = replace(ROW, op="retention", mode="recurrent", samples=(1.0,))
    rows = []
    for shape, size, seconds in (("token", 1, 1.2), ("token", 64, 0.9), ("batch", 1, 0.1)):
        row = replace(ours, shape=shape, size=size)
        rows += [row, replace(row, backend="yet-another-retnet", samples=(seconds,))]
    found = judged(Results(rows=rows), "every mode")
    assert found.figure.text.endswith("retention, recurrent, token at batch 64, forward")
    assert found.verdict == "**missed** by 10%"
    assert judged(Results(rows=rows[:2]), "every mode").verdict == "met"
    shown = page.render("<!-- generated: operations -->\n<!-- end -->", Results(rows=rows))
    assert shown.count("| **retpop**, torch |") == 2


def lengths(power: float, **changes: object) -> list[Measurement]:
    """Times that grow with a power of the length, up to 16k; beyond, as if they were quadratic."""
    row = replace(ROW, op="retention", shape="length", mode="chunkwise", **changes)
    return [
        replace(row, size=1024 * 2**n, samples=((2.0**n) ** (power if n < 5 else 2),), peak_bytes=100 * 2**n)
        for n in range(7)
    ]


def test_slopes_are_those_of_the_logarithms() -> None:
    assert slope([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)
    found = judged(Results(rows=lengths(1.05)), "tokens, forward, time")
    assert found.figure.value == pytest.approx(1.05)
    assert found.verdict == "met"
    assert judged(Results(rows=lengths(1.2)), "tokens, forward, time").verdict == "**missed** by 9%"
    assert judged(Results(rows=lengths(1.2)), "tokens, forward, memory").verdict == "met"


def test_a_later_token_may_not_take_longer() -> None:
    first = replace(ROW, op="step", shape="positions_in_turn", backend="torch, position 256")
    later = replace(first, backend="torch, position 4096", samples=(2.1, 1.05, 3.15))
    found = judged(Results(rows=[first, later]), "recurrent step")
    assert found.verdict == "met"
    assert found.figure.text == "1.05x (1.05 to 1.05) the first's: position 4096"
    slow = replace(later, samples=(2.4, 1.2, 3.6))
    assert judged(Results(rows=[first, later, slow]), "recurrent step").verdict == "**missed** by 9%"


def test_the_audits_targets_keep_their_verdicts() -> None:
    row = {"part": "target", "limit": "1.05", "where": "pop_fwd, rem training"}
    rows = [row | {"target": "bytes", "worst": "1.01"}, row | {"target": "flops", "worst": "1.3"}]
    rows.append({"part": "compile"})
    found = [each for each in judge(Results(audit=rows)) if each.target.name.startswith("kernels")]
    assert [each.verdict for each in found] == ["met", "**missed** by 24%"]


GPU_ROW = replace(
    ROW,
    machine="a GPU",
    shape="paper_train",
    mode="rows",
    dtype="bfloat16",
    backend="triton, CUDA graph",
    samples=(1.0,),
    flops=0,
    floor_bytes=700,
    copy_rate=1_000.0,
)


def test_a_gpus_report_is_judged() -> None:
    both = replace(GPU_ROW, direction="forward+backward", mode="pop", backend="triton")
    theirs = replace(both, backend="fla, composed", samples=(1.5,))
    run = replace(GPU_ROW, op="rem_atari", mode="projected run, in all", samples=(3000.0,))
    results = Results(gpu=[GPU_ROW, both, theirs, run])
    assert judged(results, "share of the copy bandwidth").verdict == "met"
    assert judged(results, "calls composed").verdict == "**missed** by 25%"
    assert judged(results, "600 epochs").figure.text == "50 min (a GPU)"
    assert judged(results, "D 64, bfloat16, forward, beside").verdict == "not measured: not in these results"
    broken = Results(gpu=[replace(GPU_ROW, verdict="failed")])
    assert judged(broken, "share of the copy bandwidth").figure is None
    shown = page.render("<!-- generated: gpu -->\n<!-- end -->", results)
    assert "a GPU, commit abc123" in shown
    assert "| 70% |" in shown


def test_what_is_written_by_hand_stays() -> None:
    text = "# Title\n\n<!-- generated: losses -->\nold\n<!-- end -->\n\nBy hand.\n"
    made = page.render(text, Results(rows=[ROW]))
    assert made == (
        "# Title\n\n<!-- generated: losses -->\n\nNowhere, in these results.\n\n<!-- end -->\n\nBy hand.\n"
    )
    assert page.render(made, Results(rows=[ROW])) == made
    with pytest.raises(ValueError, match="'nothing' is no generated part"):
        page.render("<!-- generated: nothing -->\n<!-- end -->", Results(rows=[ROW]))


def test_where_we_lose_is_said() -> None:
    faster = replace(ROW, backend="rival", samples=(1.0, 0.5, 1.5), computes="attention")
    lost = page.render("<!-- generated: losses -->\n<!-- end -->", Results(rows=[ROW, faster]))
    assert "- pop, rem_train, pop, B4, float32, forward: rival (attention) takes 0.50x" in lost
    wrong = replace(faster, verdict="wrong")
    assert "Nowhere" in page.render("<!-- generated: losses -->\n<!-- end -->", Results(rows=[ROW, wrong]))


def test_other_results_of_the_same_commit_stand_beside(tmp_path: Path) -> None:
    """Two threads beside one; of another commit, nothing."""
    for name, machine, seconds in (
        ("cpu_1_thread-abc", "cpu, 1 thread", 1.0),
        ("cpu_2_threads-abc", "cpu, 2 threads", 2.0),
        ("cpu_4_threads-def", "cpu, 4 threads", 1.0),
    ):
        append(tmp_path / f"{name}.csv", [replace(TRAINING, machine=machine, samples=(seconds,))])
    results = page.load(tmp_path / "cpu_1_thread-abc.csv", tmp_path)
    shown = page.render("<!-- generated: others -->\n<!-- end -->", results)
    assert "| what | wanted | cpu, 1 thread | cpu, 2 threads |" in shown
    (line,) = [line for line in shown.splitlines() if "decoder, float32" in line]
    assert "70%" in line
    assert "35%" in line
    assert "**missed** by 46%" in line
    assert "`benchmarks/results/cpu_2_threads-abc.csv`" in shown
    assert "4 threads" not in shown
    alone = page.load(tmp_path / "cpu_4_threads-def.csv", tmp_path)
    assert "Not measured." in page.render("<!-- generated: others -->\n<!-- end -->", alone)


def test_the_newest_results_are_shown(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        page.newest(tmp_path)
    (tmp_path / "kernel_audit.csv").write_text("commit,part\nabc,target\n")
    append(tmp_path / "a.csv", [ROW, replace(ROW, date="2026-03-01T00:00:00", backend="rival")])
    append(tmp_path / "b.csv", [replace(ROW, date="2026-02-01T00:00:00")])
    assert page.newest(tmp_path).name == "a.csv"


def test_every_picture_is_drawn_where_there_are_results(tmp_path: Path) -> None:
    groups: list[Measurement] = [TRAINING]
    long = replace(ROW, op="retention", shape="long", mode="chunkwise", sizes="B1 T4096 H4 D64")
    groups += [long, replace(long, backend="yet-another-retnet, chunks of 64")]
    groups += lengths(1.0)
    groups += [replace(ROW, op="step", shape="position", size=size) for size in (256, 1024)]
    groups += [replace(ROW, op="imagination", shape="tokens", size=size) for size in (16, 64)]
    written = plots.write(Results(rows=groups), tmp_path, ["svg", "png"])
    assert {path.name for path in written} == {f"{n}.{k}" for n in plots.PLOTS for k in ("svg", "png")}
    first = {path: path.read_bytes() for path in written}
    plots.write(Results(rows=groups), tmp_path, ["svg", "png"])
    assert {path: path.read_bytes() for path in written} == first
    assert plots.write(Results(), tmp_path / "none") == []


@pytest.fixture(scope="module")
def shown() -> Results:
    """What the pages show: the results that the performance page names."""
    text = page.PAGES[0].read_text(encoding="utf-8")
    (name,) = re.findall(r"^\| rows \| `benchmarks/results/(\S+)`", text, re.MULTILINE)
    return page.load(page.RESULTS / name)


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_the_pages_are_up_to_date(path: Path, shown: Results) -> None:
    text = path.read_text(encoding="utf-8")
    assert page.PART.search(text)
    assert page.render(text, shown) == text, "python -m benchmarks page"


def test_the_pictures_are_up_to_date(shown: Results) -> None:
    text = page.PAGES[0].read_text(encoding="utf-8")
    pictures = re.findall(r"\(performance/(\w+)\.svg\)", text)
    assert set(pictures) == set(plots.PLOTS)
    for name in pictures:
        assert plots.digest(shown) in (page.PICTURES / f"{name}.svg").read_text(encoding="utf-8"), name
