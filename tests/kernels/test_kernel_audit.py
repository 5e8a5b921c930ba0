"""The audit of the compiled kernels: its parts on what is known, and the kernels themselves for sm_90.

Anything that compiles runs in a process of its own: this one has TRITON_INTERPRET=1.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.floors import chunk_flops
from benchmarks.kernel_audit.__main__ import main
from benchmarks.kernel_audit.cases import CASES, CORE, PARTS
from benchmarks.kernel_audit.compiled import count, main_loop, read_amdgcn, read_sass
from benchmarks.kernel_audit.targets import judge, merge, read
from benchmarks.kernel_audit.triton_ir import overflows

ROOT = Path(__file__).parent.parent.parent


def run_compiler(*command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """A Python that compiles kernels and keeps nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT / "tests" / "support")}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def run_program(program: str, cache: Path) -> Any:
    """What a program prints as JSON."""
    done = run_compiler("-c", program, cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- reading machine code ----

SASS = """
\t\tFunction : some_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x0 */
        /*0010*/                   LDGSTS.E.128 [R1], [R2.64] ;    /* 0x0 */
        /*0020*/               @P2 BRA 0xb0 ;                      /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R4, R5 ; /* 0x0 */
        /*0040*/                   BSSY B0, 0x80 ;                 /* 0x0 */
        /*0050*/                   LDGSTS.E.128 [R1], [R2.64] ;    /* 0x0 */
        /*0060*/               @P1 BRA 0xc0 ;                      /* 0x0 */
        /*0070*/                   BSYNC B0              ?trans5;  /* 0x0 */
        /*0080*/              @!P0 BRA 0x30 ;                      /* 0x0 */
        /*0090*/                   STG.E [R8.64], R4 ;             /* 0x0 */
        /*00a0*/                   EXIT ;                          /* 0x0 */
        /*00b0*/                   EXIT ;                          /* 0x0 */
        /*00c0*/                   MUFU.RCP R3, R3 ;               /* 0x0 */
        /*00d0*/                   BSYNC B0 ;                      /* 0x0 */
        /*00e0*/                   BRA 0xe0;                       /* 0x0 */
"""

AMDGCN = """
some_kernel:
\t.loc 1 2 3
\ts_load_dwordx2 s[2:3], s[0:1], 0x0  ; a comment
\ts_cbranch_scc0 .LBB0_2
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_add_i32 s0, s0, 1
\ts_cbranch_scc1 .LBB0_1
.LBB0_2:
\ts_endpgm
"""


def test_the_loop_of_a_listing() -> None:
    """Its slow path after the end belongs to it; the jump to itself that pads the end is no loop."""
    code = read_sass(SASS)
    loop = main_loop(code)
    assert len(code) == 15
    opcodes = ["HGMMA.64x64x16.F32.BF16", "BSSY", "LDGSTS.E.128", "BRA", "BSYNC", "BRA", "MUFU.RCP", "BSYNC"]
    assert [line.opcode for line in loop] == opcodes
    assert (count(code, "LDGSTS"), count(loop, "LDGSTS"), count(loop, "HGMMA|HMMA")) == (2, 1, 1)
    assert main_loop(read_sass(SASS.replace("@!P0 BRA 0x30", "NOP"))) == []


WAITING = """
\t\tFunction : waiting_kernel
        /*0000*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ; /* 0x0 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR5+0x8000], R53 ; /* 0x0 */
        /*0020*/              @!P3 BRA 0x10 ;                      /* 0x0 */
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;         /* 0x0 */
        /*0040*/               @P0 BRA 0x0 ;                       /* 0x0 */
        /*0050*/                   EXIT ;                          /* 0x0 */
"""


def test_a_loop_that_only_waits_is_none() -> None:
    assert len(main_loop(read_sass(WAITING))) == 5
    assert main_loop(read_sass(WAITING.replace("@P0 BRA 0x0", "NOP"))) == []


def test_the_loop_of_amd_assembly() -> None:
    code = read_amdgcn(AMDGCN)
    assert [line.opcode for line in main_loop(code)] == [
        "v_mfma_f32_32x32x8_bf16",
        "s_add_i32",
        "s_cbranch_scc1",
    ]
    assert len(code) == 6


# ---- offsets, targets, the table ----

TTIR = """
  tt.func public @k(%p: !tt.ptr<f32> loc("p"), %T: i32 loc("T"), %stride: i32 loc("stride")) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c64 = arith.constant 64 : i32 loc(#loc1)
    %b = tt.get_program_id x : i32 loc(#loc1)
    %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc1)
    scf.for %n = %c0 to %T step %c64  : i32 {
      %s = tt.splat %n : i32 -> tensor<64xi32> loc(#loc1)
      %row = arith.addi %s, %r : tensor<64xi32> loc(#loc1)
      %ss = tt.splat %stride : i32 -> tensor<64xi32> loc(#loc1)
      %o = arith.muli %row, %ss : tensor<64xi32> loc(#loc1)
      %pp = tt.splat %p : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc1)
      %a = tt.addptr %pp, %o : tensor<64x!tt.ptr<f32>>, tensor<64xi32> loc(#loc1)
    } loc(#loc1)
"""


@pytest.mark.parametrize(("length", "stride", "found"), [(4096, 256, 0), (2**23, 255, 0), (2**23, 256, 1)])
def test_offsets_are_followed_up_to_the_addresses(length: int, stride: int, found: int) -> None:
    where = overflows(TTIR, {"T": length, "stride": stride}, (8, 1, 1))
    assert len(where) == found
    assert all(line.startswith("%o = arith.muli %row, %ss") for line in where)


def test_products_that_end_in_no_address_are_nobodys_business() -> None:
    assert (
        overflows(
            TTIR.replace("tt.addptr %pp, %o", "tt.addptr %pp, %r"), {"T": 2**30, "stride": 512}, (1, 1, 1)
        )
        == []
    )


def test_products_of_unknown_values_count() -> None:
    assert len(overflows(TTIR, {"T": 4096}, (1, 1, 1))) == 1


def test_counters_are_known_by_their_name_in_the_source() -> None:
    carried = TTIR.replace("%T: i32", "%n0: i32").replace(
        "scf.for %n = %c0 to %T step %c64  : i32 {",
        "scf.for %i = %c0 to %c64 step %c64 iter_args(%n_7 = %n0) -> (i32) : i32 {",
    )
    carried = carried.replace("tt.splat %n :", "tt.splat %n_7 :")
    assert len(overflows(carried, {"stride": 256}, (1, 1, 1))) == 1
    for most, found in ((2**22, 0), (2**23, 1)):
        assert len(overflows(carried, {"stride": 256}, (1, 1, 1), {"n": (0, most)})) == found


def test_floors_are_those_of_the_documents() -> None:
    """POP at REM's training shape is 9.4 GFLOP."""
    flops = 64 * 4 * 10 * (chunk_flops(65, 64, 64) + chunk_flops(64, 64, 64, takes_in=False))
    assert round(flops / 1e9, 1) == 9.4
    (case,) = [case for case in CASES if case.name == "pop_fwd, rem training, bfloat16"]
    assert case.flops * case.batch == flops


def counted(**changes: object) -> dict[str, object]:
    row = {"part": "traffic", "op": "pop_fwd", "shape": "rem training", "dtype": "bfloat16", "failure": ""}
    figures = {"head_dim": 64, "architecture": "sm_90", "bytes": 104, "floor_bytes": 100}
    return {**row, **figures, "flops": 130, "yardstick_flops": 100, **changes}


def misses(*rows: dict[str, object]) -> list[str]:
    return [verdict.target.name for verdict in judge(rows) if not verdict.met]


def test_targets_are_judged_by_their_worst_case() -> None:
    assert misses(counted()) == []
    assert misses(counted(), counted(bytes=106)) == ["POP forward, rem training: bytes over the floor"]
    assert misses(counted(flops=131)) == ["POP forward, rem training: flops over the yardstick"]
    assert misses(counted(bytes=106, shape="D 100"), counted(bytes=106, op="retention_fwd")) == []


def test_a_case_that_fails_is_a_miss() -> None:
    (missed,) = misses(counted(), {**counted(), "failure": "AuditError: stores twice", "bytes": None})
    assert "do not compile or run" in missed


VERSIONS = {"commit": "abc", "triton": "3.9.0", "torch": "2.13.0"}


def test_the_csv_says_what_its_rows_hold_for(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "audit.csv"
    merge(path, [counted(overflows=[]), counted(bytes=106, kernel="second")], VERSIONS)
    with path.open(encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert all(record.items() >= VERSIONS.items() for record in records)
    assert [record["bytes"] for record in records[:2]] == ["104", "106"]
    assert {record["verdict"] for record in records[2:]} == {"met", "missed"}


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        counted(overflows=["a b", "c d"], grid=[1, 2, 3], grid_fits=False, seconds=0.0, worst=1e-05),
        counted(overflows=[], grid=[], failure="ValueError: 3.5 is none"),
    ]
    merge(tmp_path / "audit.csv", rows, VERSIONS)
    found = read(tmp_path / "audit.csv")
    assert [{**row, **VERSIONS, "hazards": []} for row in rows] == [{"hazards": [], **row} for row in found]


def test_a_case_takes_the_place_of_its_rows(tmp_path: Path) -> None:
    """The others stay, with their commit; the targets are judged over all; what is not audited now goes."""
    path = tmp_path / "audit.csv"
    imagined = counted(shape="rem imagination", bytes=106)
    merge(path, [counted(), counted(kernel="second"), imagined], VERSIONS)
    merge(path, [counted(bytes=103)], VERSIONS | {"commit": "def"})
    assert [(row["shape"], row["commit"]) for row in read(path)] == [
        ("rem training", "def"),
        ("rem imagination", "abc"),
    ]
    assert "rem imagination: bytes" in "".join(misses(*read(path)))
    merge(path, [counted()], VERSIONS | {"triton": "3.10.0"})
    assert len(read(path)) == 1
    path.write_text(path.read_text(encoding="utf-8").replace("rem training", "no such shape"))
    merge(path, [imagined], VERSIONS | {"triton": "3.10.0"})
    assert [row["shape"] for row in read(path)] == ["rem imagination"]


@pytest.mark.parametrize("part", PARTS)
def test_op_shape_and_dtype_name_a_case(part: str) -> None:
    names = {case.name for case in PARTS[part]}
    assert len(names) == len(PARTS[part])
    assert CORE[part] <= names


# ---- compilers ----

COMPILE_KNOWN = """
import dataclasses, json
import torch
from audit_kernels import loop_kernel, narrow_kernel, turning_kernel
from benchmarks.kernel_audit.compiled import compile_for, recorded, ttir_of
from benchmarks.kernel_audit.triton_ir import overflows

def launch(dtype, precision, blocks=10):
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, 640), (640, 64)))
    c = torch.empty(64, 64, device="meta")
    loop_kernel[(1,)](a, b, c, blocks, a.stride(0), M=64, K=32, N=64, PRECISION=precision, num_warps=4)

found = {}
for architecture in ("sm_90", "gfx942"):
    with recorded(architecture) as launches:
        launch(torch.float16, "ieee")
        launch(torch.float32, "ieee")
        launch(torch.float32, "ieee", blocks=1)
    assert launches[1].key == launches[2].key != launches[0].key
    found[architecture] = [dataclasses.asdict(compile_for(architecture, item)) for item in launches[:2]]
with recorded("sm_90") as launches:
    for wide in (False, True):
        x = torch.empty(1, device="meta")
        narrow_kernel[(2**21,)](x, x, 32, BLOCK=64, WIDE=wide)
with recorded("sm_90") as turned:
    a, b = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((64, 640), (640, 64)))
    c = torch.empty(64, 64, device="meta")
    loop_kernel[(1,)](a, b, c, 10, a.stride(0), M=64, K=32, N=64, PRECISION="ieee", SCALED=True, num_warps=4)
    for second in (False, True):
        turning_kernel[(1,)](a, b, c, SIZE=64, SECOND=second, num_warps=4)
found["hazards"] = [compile_for("sm_90", item).hazards for item in turned]
found["overflows"] = [len(overflows(ttir_of("sm_90", x), x.arguments, x.grid)) for x in launches]
print(json.dumps(found))
"""


def test_what_known_kernels_compile_to(tmp_path: Path) -> None:
    found = run_program(COMPILE_KNOWN, tmp_path)
    assert found.pop("overflows") == [1, 0]
    from_registers, turned_first, turned_second = found.pop("hazards")
    assert from_registers
    assert all("reads registers while" in sentence for sentence in from_registers)
    assert len(turned_first) == 1
    assert "a product's result, transposed" in turned_first[0]
    assert turned_second == []
    for architecture, (half, single) in found.items():
        assert half["stack"] == single["stack"] == 0
        assert half["hazards"] == single["hazards"] == []
        assert 0 < half["shared"] < single["shared"] <= single["shared_limit"]
        assert 0 < half["loop_mma"] <= half["hgmma"] + half["hmma"]
        assert 0 < half["loop_instructions"] < half["instructions"]
        if architecture.startswith("sm_"):
            assert single["hgmma"] + single["hmma"] == 0  # ieee float32 has no tensor cores there
            assert 0 < half["loop_async_copies"] < half["async_copies"]
        assert (half["hgmma"] > 0) == (architecture == "sm_90")


COMPILE_THREE_PRODUCTS = """
import dataclasses, json
import torch, triton
from benchmarks.kernel_audit.calls import launcher, on_architecture
from benchmarks.kernel_audit.compiled import compile_for, recorded

triton.knobs.language.fp32_default = "tf32x3"
q, k, v, grad = (torch.empty(64, 256, 4, 64, device="meta") for _ in range(4))
inputs = q, k, v, torch.empty(4, device="meta"), None, 1.0
with on_architecture("sm_90", "retention_bwd"), recorded("sm_90") as launches:
    launcher("retention_fwd")(*inputs)
    launcher("retention_bwd")(*inputs, None, grad, None)
found = {item.key: item for item in launches}.values()
print(json.dumps({item.name: dataclasses.asdict(compile_for("sm_90", item)) for item in found}))
"""


def test_three_products_of_float32_are_those_of_tensor_cores(tmp_path: Path) -> None:
    found = run_program(COMPILE_THREE_PRODUCTS, tmp_path)
    assert found.keys() == {"retention_fwd_kernel", "retention_bwd_kernel"}
    for figures in found.values():
        assert figures["stack"] == 0
        assert figures["hazards"] == []
        assert figures["loop_mma"] > 0


def assert_all_met(printed: str, *promises: str) -> None:
    """The audit printed no missed target, and a met one for each promise."""
    lines = printed.splitlines()
    assert not any(line.startswith("MISSED") for line in lines)
    for promise in promises:
        assert any(promise in line for line in lines if line.startswith("met")), f"no row says: {promise}"


def audited(*arguments: str, cache: Path) -> str:
    """What `python -m benchmarks.kernel_audit` prints; all targets have to be met."""
    done = run_compiler("-m", "benchmarks.kernel_audit", *arguments, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_compiled_kernels_meet_their_targets_on_sm_90(tmp_path: Path) -> None:
    printed = audited("--core", "--arch", "sm_90", "--part", "compile,huge", cache=tmp_path)
    assert_all_met(printed, "stack bytes", "async copies", "wrong results", "leave 32 bits")


def test_counted_kernels_meet_their_targets(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has TRITON_INTERPRET=1."""
    assert main(["--core", "--part", "traffic"]) == 0
    assert_all_met(capsys.readouterr().out, "bytes over the floor", "flops over the yardstick")


@pytest.mark.slow
def test_the_kernels_meet_their_targets_everywhere(tmp_path: Path) -> None:
    assert_all_met(audited("--csv", str(tmp_path / "audit.csv"), cache=tmp_path))


COUNT_VARIANTS = """
import json
import torch
from benchmarks.kernel_audit.calls import launcher, on_architecture
from benchmarks.kernel_audit.compiled import recorded

H, D = 4, 64
log_decay = torch.empty(H, device="meta")

def tokens(*shape, D=D):
    return torch.empty(*shape, H, D, dtype=torch.bfloat16, device="meta")

def state(rows):
    return torch.empty(rows, H, D, D, device="meta")

def pop(B, N, P, offset, before=None, resets=False, L=65, M=64, D=D):
    q, u = tokens(B, N * L, D=D), tokens(B, P, M, D=D)
    reset = torch.empty(B, N, dtype=torch.bool, device="meta") if resets else None
    launcher("pop_fwd")(q, q, q, u, u, u, log_decay, before, reset, L, offset, 0.125)

def retention(B, T, before=None, bounds=None):
    q = tokens(B, T)
    launcher("retention_fwd")(q, q, q, log_decay, before, 0.125, bounds)

def bounds(S):
    return torch.empty(S + 1, dtype=torch.int64, device="meta")

def step(B):
    q = tokens(B)
    launcher("retention_step")(q, q, q, log_decay, state(B), 0.125)

def norm_gate(T):
    x = tokens(2, T)
    launcher("norm_gate_fwd")(x, x, None, None, "groupnorm", 1e-6)

def rotary(T):
    q, angles = tokens(2, T), torch.empty(1, T, 1, D, device="meta")
    launcher("rotary_fwd")(q, q, angles, angles, "retnet")

def rem_run():
    for N in (1, 5, 10, 20):  # segments as they are cut for training
        pop(64, N, N, 0, resets=True)
    for B in (64, 128):
        pop(B, 20, 1, 20)  # burn-in
        pop(B, 1, 1, 1, state(B))  # imagination

def pop_bwd(B, N, P, offset, before=None, L=65, M=64):
    q, u = tokens(B, N * L), tokens(B, P, M)
    inputs = (q, q, q, u, u, u, log_decay, before, None, q, u, before)
    launcher("pop_bwd")(*inputs, L, offset, 0.125, [True] * 7)

def retention_bwd(B, T, before=None, bounds=None):
    q = tokens(B, T)
    launcher("retention_bwd")(q, q, q, log_decay, before, 0.125, bounds, q, before)

def norm_gate_bwd(T):
    x = tokens(2, T)
    launcher("norm_gate_bwd")(x, x, None, None, x, "groupnorm", 1e-6)

CALLS = {
    "pop, training": ("pop_fwd", lambda: [pop(64, N, N, 0) for N in (1, 2, 10, 16, 20)]),
    "pop, N and P": ("pop_fwd", lambda: [pop(64, N, P, 0) for N, P in ((3, 3), (3, 1), (1, 1), (1, 2))]),
    "pop, offset": ("pop_fwd", lambda: [pop(64, *npo) for npo in ((3, 1, 1), (3, 1, 3), (2, 2, 1))]),
    "pop, a run of REM": ("pop_fwd", rem_run),
    "pop, imagination": ("pop_fwd", lambda: [pop(B, 1, 1, 1, state(B)) for B in (33, 48, 64, 128)]),
    "pop, a small batch": ("pop_fwd", lambda: [pop(1, N, N, 0, state(1), True) for N in (4, 9, 16)]),
    "pop, D 128": ("pop_fwd", lambda: [pop(64, N, N, 0, D=128) for N in (1, 2, 10, 16)]),
    "retention, T": ("retention_fwd", lambda: [retention(64, T) for T in (1, 16, 65, 130, 650, 1024, 4096)]),
    "retention, long": ("retention_fwd", lambda: [retention(1, T) for T in (16384, 16385, 20000, 65536)]),
    "retention, narrow slices": (
        "retention_fwd",
        lambda: [retention(1, T) for T in (4096, 4097, 5000, 8192)],
    ),
    "retention, packed": (
        "retention_fwd",
        lambda: [retention(1, T, state(S), bounds(S)) for T, S in ((65, 16), (130, 17), (650, 16))],
    ),
    "retention, packed and long": (
        "retention_fwd",
        lambda: [retention(1, T, state(S), bounds(S)) for T, S in ((40_000, 2), (70_001, 3), (2**24, 8))],
    ),
    "retention, batch": ("retention_fwd", lambda: [retention(B, 650) for B in (64, 65, 2**15)]),
    "step": ("retention_step", lambda: [step(B) for B in (80, 81, 96, 127)]),
    "norm_gate": ("norm_gate_fwd", lambda: [norm_gate(T) for T in (1, 16, 65, 130)]),
    "pop, backward": (
        "pop_bwd",
        lambda: [pop_bwd(64, N, P, offset) for N, P, offset in ((1, 1, 1), (10, 9, 1), (20, 18, 2))],
    ),
    "pop, backward, split": (
        "pop_bwd",
        lambda: [pop_bwd(1, N, N, 0, state(1)) for N in (4, 9, 16)],
    ),
    "retention, backward": ("retention_bwd", lambda: [retention_bwd(64, T) for T in (16, 65, 130, 1024)]),
    "retention, backward, split": ("retention_bwd", lambda: [retention_bwd(1, T) for T in (4096, 5003)]),
    "retention, backward, packed, split": (
        "retention_bwd",
        lambda: [retention_bwd(1, T, state(S), bounds(S)) for T, S in ((40_000, 2), (70_001, 3), (2**24, 8))],
    ),
    "norm_gate, backward": ("norm_gate_bwd", lambda: [norm_gate_bwd(T) for T in (1, 16, 65, 130)]),
    "rotary": ("rotary_fwd", lambda: [rotary(T) for T in (1, 16, 65, 130)]),
}

found = {}
for name, (op, calls) in CALLS.items():
    with on_architecture("sm_90", op), recorded("sm_90") as launches:
        calls()
    keys = {}
    for launch in launches:
        keys.setdefault(launch.name, set()).add(launch.key)
    found[name] = {kernel: len(variants) for kernel, variants in keys.items()}
print(json.dumps(found))
"""


def test_lengths_and_counts_compile_nothing_new(tmp_path: Path) -> None:
    """In one schedule T, N, P, offsets and the batch stay out of what Triton looks a compiled kernel up by.

    An offset of 0 is another kernel than an offset of 1 and more: no prediction starts from the first state
    there.
    """
    found = run_program(COUNT_VARIANTS, tmp_path)
    assert len(found) == 22
    # With and without resets, a state before, and an offset: each is a flag of the kernel. The stride of
    # `reset` is N, and a stride of 1 counts apart.
    assert found.pop("pop, a run of REM")["pop_fwd_kernel"] <= 4
    for call, kernels in found.items():
        assert kernels, call
        for kernel, variants in kernels.items():
            # A split sweeps for the states alone first, and then for the gradients; it scans both ways.
            twice = "backward" in call and "split" in call and ("bwd" in kernel or kernel.startswith("scan"))
            assert variants == 1 + twice, f"{call}: {kernel} is compiled {variants} times"
