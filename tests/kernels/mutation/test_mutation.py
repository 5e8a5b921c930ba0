"""The mutator makes the mutants it should; and the kernels' checks catch at least 95% of them (slow)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
MODULES = sorted(
    path.stem
    for path in (ROOT / "kernels").glob("*.py")
    if "\n@triton.jit" in path.read_text(encoding="utf-8")
)

SOURCE = '''
import triton
import triton.language as tl

def launcher(x):
    return x + 1

@triton.jit
def kernel(p_x, n, BLOCK: tl.constexpr):
    """γ + 1."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_x < n) & (o_x >= 0)
    b_x = tl.load(p_x + o_x[:, None], mask=mask, other=0.0)  # γ - 1
    b_x = tl.where(mask, b_x, -b_x)
    tl.store(p_x, tl.maximum(tl.sum(b_x, 0), 2), mask=mask)
'''

EXPECTED = (
    {
        ("o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)", change)
        for change in (
            "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) -> "
            "tl.program_id(0) * BLOCK - tl.arange(0, BLOCK)",
            "tl.program_id(0) -> tl.program_id(0) + 1",
            "tl.arange(0, BLOCK) -> tl.arange(0, BLOCK) + 1",
        )
    }
    | {
        ("mask = (o_x < n) & (o_x >= 0)", change)
        for change in (
            "(o_x < n) & (o_x >= 0) -> o_x < n",
            "(o_x < n) & (o_x >= 0) -> o_x >= 0",
            "o_x < n -> o_x <= n",
            "o_x >= 0 -> o_x > 0",
            "0 -> 1",
            "0 -> -1",
        )
    }
    | {
        ("b_x = tl.load(p_x + o_x[:, None], mask=mask, other=0.0)  # γ - 1", change)
        for change in ("p_x + o_x[:, None] -> p_x - o_x[:, None]", "mask -> mask | True", "0.0 -> 1")
    }
    | {
        ("b_x = tl.where(mask, b_x, -b_x)", change)
        for change in ("tl.where(mask, b_x, -b_x) -> tl.where(mask, -b_x, b_x)", "-b_x -> b_x")
    }
    | {
        ("tl.store(p_x, tl.maximum(tl.sum(b_x, 0), 2), mask=mask)", change)
        for change in (
            "tl.maximum(tl.sum(b_x, 0), 2) -> tl.minimum(tl.sum(b_x, 0), 2)",
            "2 -> 3",
            "2 -> 1",
            "mask -> mask | True",
        )
    }
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )


def test_the_mutants_of_a_kernel() -> None:
    """Every sign, comparison, integer, mask and the like, one at a time, and nothing outside of kernels."""
    program = f"""
from mutants import mutants_of
for mutant in mutants_of({SOURCE!r}):
    assert mutant.function == "kernel" and mutant.number == 1
    compile(mutant.source, "mutant", "exec")
    assert sum(a != b for a, b in zip(mutant.source.split(), {SOURCE!r}.split(), strict=False))
    print(mutant.line, mutant.change, sep="\\t")
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    found = [tuple(line.split("\t")) for line in done.stdout.splitlines()]
    assert len(found) == len(set(found))
    assert set(found) == EXPECTED


def test_every_kernel_has_checks() -> None:
    tree = ast.parse((HERE / "suites.py").read_text(encoding="utf-8"))
    (suites,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SUITES"
    )
    assert {ast.literal_eval(key) for key in suites.keys} == set(MODULES)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_checks_catch_the_mutants(module: str) -> None:
    done = run("run.py", module)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
