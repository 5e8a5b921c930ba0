"""What a user gets: a wheel built from the checkout works in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SOURCES = {"retpop": "retpop", "retpop/kernels": "kernels", "rem_atari": "examples/rem_atari"}
"""Folders of the wheel, and where they lie in the checkout."""

LEFT_OUT = {"__pycache__"}
"""Folders that are not for the wheel; results are measured runs, which the docs cite."""

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


IMPORT_THE_AGENT = """
import importlib, json, pkgutil, sys
import rem_atari
assert rem_atari.__file__.startswith(sys.prefix), rem_atari.__file__
names = [module.name for module in pkgutil.walk_packages(rem_atari.__path__, "rem_atari.")]
missing = {}
for name in names:
    if name != "rem_atari.__main__":
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing[name] = error.name
print(json.dumps([len(names), missing]))
"""

INSIDE_TRANSFORMERS = """
import retpop.integrations.transformers
from transformers import AutoModelForCausalLM
theirs = AutoModelForCausalLM.from_pretrained("my-model")
assert torch.equal(theirs(text).logits, model(text)[0])
assert theirs.generate(text, max_new_tokens=2, num_beams=2).shape[1] == text.shape[1] + 2
"""
"""What that page shows of transformers, after the model and the folder of its other examples."""

OF_THE_SCORES = {"rem_atari.commands.scores", "rem_atari.scores.plots", "rem_atari.scores.aggregates"}
"""Modules that need the extra `scores`; `rem-atari scores` alone imports them."""

OF_THE_PAGE = {"rem_atari.commands.play", "rem_atari.playground.server"}
"""Modules that need the extra `play`; `rem-atari play` alone imports them."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the wheel, some packages that it asks for, and nothing else."""

    python: Path
    outside: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside the checkout."""
        # An empty PYTHON* environment: nothing of the surrounding run may reach in.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(
            [str(self.python.parent / words[0]), *words[1:]],
            cwd=self.outside,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def prints(self, *words: str) -> str:
        """What a program of the environment prints; it must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """What ``pip install retpop`` gives."""
    return make_environment(tmp_path_factory.mktemp("plain"), wheel, PROJECT["dependencies"])


@pytest.fixture(scope="module")
def with_extra(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """What ``pip install 'retpop[atari]'`` gives."""
    return make_environment(tmp_path_factory.mktemp("extra"), wheel, asked_for_with("atari"))


def asked_for_with(extra: str) -> list[str]:
    """What ``pip install 'retpop[extra]'`` asks for; an extra may name another one."""
    asked_for = list(PROJECT["dependencies"])
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        own = requirement.name == PROJECT["name"]
        asked_for += [x for inner in requirement.extras for x in asked_for_with(inner)] if own else [text]
    return asked_for


def make_environment(folder: Path, wheel: Path, asked_for: Iterable[str]) -> Environment:
    """Install the wheel; link the packages asked for, and those that they need, from where the tests run."""
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for package in packages_needed(asked_for):
        files = [file for file in package.files or () if file.parts[0] not in ("..", "__pycache__")]
        for name in {file.parts[0] for file in files} - {entry.name for entry in site.iterdir()}:
            (site / name).symlink_to(package.locate_file(name))
    (folder / "outside").mkdir()
    return Environment(python, folder / "outside")


def packages_needed(asked_for: Iterable[str]) -> list[Distribution]:
    """The packages that requirements name, those that they require, and so on."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(text) for text in asked_for]
    while waiting:
        requirement = waiting.pop()
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in found:
            package = found[requirement.name] = distribution(requirement.name)
            waiting += [Requirement(text) for text in package.requires or ()]
    return list(found.values())


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


def test_the_installed_wheel_runs_a_layer(plain: Environment) -> None:
    assert plain.prints("python", "-c", USE_A_LAYER) == f"retpop {PROJECT['version']}\n"


@pytest.mark.parametrize("command", [["rem-atari"], ["python", "-m", "rem_atari"]])
def test_the_command_answers_where_its_extra_is_not_installed(plain: Environment, command: list[str]) -> None:
    overview = plain.prints(*command, "--help")
    assert "train" in overview
    assert "pip install 'retpop[atari]'" in overview
    alone = plain.run(*command)
    assert (alone.returncode, alone.stdout, alone.stderr) == (2, "", overview)
    train = plain.run(*command, "train")
    assert train.returncode == 1
    assert train.stderr == (
        "rem-atari: the package tyro is needed and not installed: pip install 'retpop[atari]'\n"
    )


def test_the_extra_holds_all_that_the_agent_needs(with_extra: Environment) -> None:
    found, missing = json.loads(with_extra.prints("python", "-c", IMPORT_THE_AGENT))
    assert found > 50
    assert set(missing) <= OF_THE_SCORES | OF_THE_PAGE
    assert set(missing.values()) <= {"rliable", "pandas", "anyio", "starlette", "uvicorn"}
    assert "--env.game" in with_extra.prints("rem-atari", "train", "--help")


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "more"), [("hub", ""), ("transformers", INSIDE_TRANSFORMERS)])
def test_the_examples_run_with_the_one_extra_that_they_name(
    extra: str, more: str, wheel: Path, tmp_path: Path
) -> None:
    """As a reader runs those of the language model: from the wheel, outside of the checkout."""
    try:
        environment = make_environment(tmp_path, wheel, asked_for_with(extra))
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    page = (CHECKOUT / "docs" / "language_model.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    environment.prints("python", "-c", "\n".join((*blocks, more)))


def test_the_wheel_holds_every_file_of_the_sources(wheel: Path) -> None:
    """Modules, data of the report, py.typed: nothing that lies in a package stays behind."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {
        f"{target}/{path.relative_to(CHECKOUT / source).as_posix()}"
        for target, source in SOURCES.items()
        for path in (CHECKOUT / source).rglob("*")
        if path.is_file() and LEFT_OUT.isdisjoint(path.relative_to(CHECKOUT / source).parts)
    }
    assert "retpop/py.typed" in expected
    assert sorted(expected - held) == []


def test_the_wheel_holds_the_license_and_nothing_foreign(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
        (license_file,) = (name for name in held if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license_file) == (CHECKOUT / "LICENSE").read_bytes()
    assert {name.split("/")[0].split("-")[0] for name in held} == {"retpop", "rem_atari"}


def test_every_package_of_the_tree_is_listed() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
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
