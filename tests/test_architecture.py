"""The house: imports flow one way, heavy or optional packages stay out, and the public names are there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import retpop

ROOT = Path(__file__).parent.parent

LAYERS = [
    "retpop.kernels",
    "retpop.distributed",
    "retpop.ops",
    "retpop.layers",
    "retpop.models",
    "retpop.integrations",
    "rem_atari",
]
"""From the ground up: a module imports what lies below it. `retpop.checkpoints` is beside `retpop.models`."""

FOUNDATIONS = {"retpop.arguments", "retpop.decay", "retpop.position", "retpop.state", "retpop.config"}

FOLDERS = {
    "retpop": ROOT / "retpop",
    "retpop.kernels": ROOT / "kernels",
    "rem_atari": ROOT / "examples" / "rem_atari",
}

PUBLIC = {
    "retention",
    "pop_retention",
    "explain_backend",
    "retnet_decay",
    "log_spaced_decay",
    "RetNetConfig",
    "RetNetState",
    "MultiScaleRetention",
    "RetNetDecoder",
}


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def package_of(module: str, path: Path) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(module: str, path: Path) -> frozenset[str]:
    """Dotted names that a module imports anywhere, relative ones resolved; `from a import b` is a.b."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package_of(module, path).split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> int | None:
    """The height of a module in the house; None for foundations and for what is not ours."""
    if inside(name, "retpop.checkpoints"):
        name = "retpop.models"
    return next((height for height, package in enumerate(LAYERS) if inside(name, package)), None)


MODULES = modules()


def test_the_walk_finds_the_packages() -> None:
    assert {"retpop", "retpop.ops.reference", "retpop.layers", "retpop.config", "rem_atari.config"} <= set(
        MODULES
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_flow_one_way(module: str) -> None:
    height = layer_of(module)
    for name in imports_of(module, MODULES[module]):
        below = layer_of(name)
        if height is not None and below is not None:
            assert below <= height, f"{module} imports {name}, which stands above it"
        if any(inside(module, foundation) for foundation in FOUNDATIONS):
            assert below is None, f"{module} is a foundation and imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if inside(m, "retpop.kernels")))
def test_kernels_import_nothing_of_ours_but_each_other(module: str) -> None:
    tree = parsed(MODULES[module])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(inside(alias.name, "retpop") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert not inside(node.module, "retpop")
    for name in imports_of(module, MODULES[module]):
        assert not inside(name, "retpop") or inside(name, "retpop.kernels")


def test_nobody_imports_kernels_or_examples_by_their_folders() -> None:
    for folder in ("retpop", "kernels", "examples", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imports_of("x.y", path):
                assert not inside(name, "kernels"), f"{path} imports {name}"
                assert not inside(name, "examples"), f"{path} imports {name}"


def test_the_reference_imports_no_triton_and_nothing_of_the_faster_forms() -> None:
    names = imports_of("retpop.ops.reference", MODULES["retpop.ops.reference"])
    ours = {name for name in names if name.startswith("retpop")}
    assert ours == {"retpop.arguments.state_dtype"}
    assert {name.split(".")[0] for name in names - ours} <= {"__future__", "torch", "math", "einops"}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if inside(m, "retpop")))
def test_backends_are_told_apart_in_one_place(module: str) -> None:
    """Everybody else calls the backend's functions. A comparison with a backend's name is a second choice."""
    for node in ast.walk(parsed(MODULES[module])):
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        parts += [node.value] if isinstance(node, ast.MatchValue) else []
        parts += [x for part in parts for x in getattr(part, "elts", ())]
        words = {x.value for x in parts if isinstance(x, ast.Constant)}
        assert module == "retpop.ops.dispatch" or not words & {"torch", "triton", "reference"}


def test_one_more_argument_of_pop_touches_a_dozen_signatures() -> None:
    """Functions that take POP's numbers one by one, in the library and the kernels, and records of them."""
    functions, records = [], []
    for module in (m for m in MODULES if inside(m, "retpop")):
        for node in ast.walk(parsed(MODULES[module])):
            if isinstance(node, ast.FunctionDef):
                names, found = {x.arg for x in (*node.args.args, *node.args.kwonlyargs)}, functions
            elif isinstance(node, ast.ClassDef):
                fields = [x.target for x in node.body if isinstance(x, ast.AnnAssign)]
                names, found = {ast.unparse(x) for x in fields}, records
            else:
                continue
            if names >= {"block_size", "offset"}:
                found.append(f"{module}.{node.name}")
    assert "retpop.ops.pop.pop_retention" in functions
    assert len(functions) <= 12, functions
    assert "retpop.ops.rows.PopSpec" in records
    assert len(records) <= 2, records


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("module", sorted(m for m in MODULES if inside(m, "retpop")))
def test_private_names_of_torch_stand_in_one_module(module: str) -> None:
    """Imported, reached through a module of torch, or read from its objects (a module's hooks, say)."""
    tree = parsed(MODULES[module])
    found = [n for n in imports_of(module, MODULES[module]) if n.startswith("torch.")]
    found = [name for name in found if any(map(is_private, name.split(".")))]
    of_torch = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "torch"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if (isinstance(root, ast.Name) and root.id in of_torch) or node.attr.endswith(
                ("_hooks", "_parameters")
            ):
                found.append(ast.unparse(node))
    assert module == "retpop._torch" or not found


def test_public_names() -> None:
    assert set(retpop.__all__) >= PUBLIC
    for name in retpop.__all__:
        assert getattr(retpop, name) is not None
    undocumented = [
        n for n in retpop.__all__ if callable(getattr(retpop, n)) and not getattr(retpop, n).__doc__
    ]
    assert not undocumented
    assert callable(retpop.checkpoints.load_yet_another_retnet)


def run_python(program: str) -> str:
    """The standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_retpop_loads_neither_triton_nor_an_extra() -> None:
    """Measured against a plain `import torch`, whatever that loads by itself."""
    program = """
import json, sys
import torch
before = set(sys.modules)
import retpop
print(json.dumps([sorted(before), sorted(sys.modules)]))
"""
    before, after = (set(names) for names in json.loads(run_python(program)))
    extras = {
        *("triton", "gymnasium", "ale_py", "tyro", "rich", "tensorboard", "safetensors", "PIL", "matplotlib"),
        *("rem_atari", "pytest", "hypothesis", "yet_another_retnet"),
        *("transformers", "huggingface_hub", "peft", "accelerate", "torchscale", "fla"),
    }
    loaded = {name for name in after - before if name.split(".")[0] in extras}
    assert not loaded
    assert "triton" not in after
    assert not any(inside(name, "retpop.kernels") for name in after)


def test_it_works_where_triton_is_missing() -> None:
    """None in sys.modules makes every `import triton` fail as if it were not installed."""
    program = """
import sys
sys.modules["triton"] = None
import torch
import retpop

config = retpop.RetNetConfig(embed_dim=8, num_heads=2, num_layers=1, ffn_dim=8)
out, state = retpop.RetNetDecoder(config)(torch.randn(1, 5, 8))
q = torch.randn(1, 5, 2, 4)
print(tuple(out.shape), retpop.explain_backend(q))
try:
    retpop.retention(q, q, q, retpop.retnet_decay(2), backend="triton")
except Exception as error:
    print(type(error).__name__, error)
"""
    shape, error = run_python(program).splitlines()
    assert shape.startswith("(1, 5, 8)")
    assert "backend" in error
    assert "triton" in error
