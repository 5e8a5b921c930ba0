"""What a user gets: a wheel built from the checkout works in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = {"retpop": "retpop", "retpop/kernels": "kernels", "rem_atari": "examples/rem_atari"}
"""Folders of the wheel, and where they lie in the checkout."""

USE_A_LAYER = """
import sys
from importlib.metadata import version
import torch, retpop, retpop.kernels, rem_atari
for module in (retpop, retpop.kernels, rem_atari):
    assert module.__file__.startswith(sys.prefix), module.__file__
config = retpop.RetNetConfig(embed_dim=32, num_heads=2, num_layers=1, ffn_dim=64)
out, state = retpop.MultiScaleRetention(config)(torch.zeros(2, 5, 32))
assert out.shape == (2, 5, 32) and state.position.tolist() == [5, 5]
print("retpop", version("retpop"))
"""


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel, and the wheel."""

    python: Path
    wheel: Path
    outside: Path

    def run(self, *arguments: str) -> str:
        """What a program of the environment prints; it starts outside the checkout and must succeed."""
        # An empty PYTHON* environment: nothing of the surrounding run may reach in.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            arguments,
            cwd=self.outside,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed without dependencies into an empty environment."""
    folder = tmp_path_factory.mktemp("package")
    wheel = build_wheel(folder)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    )
    # The dependencies come from here, by a path that follows no other .pth file: so an editable install of
    # this checkout stays invisible, and `retpop` can only be the wheel's.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    outside = folder / "outside"
    outside.mkdir()
    return Installed(python, wheel, outside)


def build_wheel(folder: Path) -> Path:
    """Build from a copy, so that the checkout keeps no build folder and an old one cannot leak in."""
    copy = folder / "checkout"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("retpop", "kernels", "examples"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, copy / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", copy)
    (wheel,) = (folder / "dist").glob("retpop-*.whl")
    return wheel


def run(*arguments: object) -> str:
    done = subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_wheel_runs_a_layer(installed: Installed) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert installed.run(str(installed.python), "-c", USE_A_LAYER) == f"retpop {project['version']}\n"


def test_the_installed_command_answers(installed: Installed) -> None:
    command = installed.python.with_name("rem-atari")
    by_script = installed.run(str(command), "--help")
    by_module = installed.run(str(installed.python), "-m", "rem_atari", "--help")
    assert "train" in by_script
    assert "train" in by_module


def test_the_wheel_holds_every_file_of_the_sources(installed: Installed) -> None:
    """Modules, data of the report, py.typed: nothing that lies in a package stays behind."""
    with zipfile.ZipFile(installed.wheel) as archive:
        held = set(archive.namelist())
    expected = {
        f"{target}/{path.relative_to(CHECKOUT / source).as_posix()}"
        for target, source in SOURCES.items()
        for path in (CHECKOUT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "retpop/py.typed" in expected
    assert sorted(expected - held) == []


def test_the_wheel_holds_the_license_and_nothing_foreign(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        held = archive.namelist()
        (license_file,) = (name for name in held if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license_file) == (CHECKOUT / "LICENSE").read_bytes()
    assert {name.split("/")[0].split("-")[0] for name in held} == {"retpop", "rem_atari"}


def test_every_package_of_the_tree_is_listed() -> None:
    listed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        f"{target}/{path.parent.relative_to(CHECKOUT / source).as_posix()}".removesuffix("/.").replace(
            "/", "."
        )
        for target, source in SOURCES.items()
        for path in (CHECKOUT / source).rglob("*.py")
    }
    assert sorted(listed) == sorted(found)


def test_every_package_of_the_tree_has_an_init() -> None:
    folders = {path.parent for source in SOURCES.values() for path in (CHECKOUT / source).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
