"""What every test shares: helpers, skips without an extra, poisoned memory, a quicker interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

# Triton looks at this when a kernel is defined: every kernel of this process runs in its interpreter, except
# where benchmarks/gpu_report.sh, which runs tests/gpu, has said otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from coverage import Coverage
from hypothesis import settings
from torch.utils._device import _device_constructors

TESTS = Path(__file__).parent

# With --import-mode=importlib nothing under tests/ is importable; the helpers live in a folder of their own.
sys.path.append(str(TESTS / "support"))

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("explore", deadline=None, max_examples=300)  # pytest --hypothesis-profile=explore
settings.load_profile("repeatable")

EXTRAS = {
    "benchmarks/test_performance_page.py": ("matplotlib", "atari"),
    "examples/rem_atari": ("gymnasium", "atari"),
    "examples/rem_atari/playground": ("anyio", "play"),
    "examples/rem_atari/scores": ("rliable", "scores"),
    "models/test_pretrained.py": ("safetensors", "hub"),
}
"""Tests that import packages of an extra at their top: one such package, and the extra."""


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport | None:
    """Skip a file in `EXTRAS` whose extra is missing; the word names the package and the extra."""
    if not isinstance(collector, pytest.Module):
        return None
    for place, (package, extra) in EXTRAS.items():
        if collector.path.is_relative_to(TESTS / place) and find_spec(package) is None:
            reason = f"Skipped: {package} is not installed (extra `{extra}`)"
            return pytest.CollectReport(collector.nodeid, "skipped", (str(collector.path), 1, reason), [])
    return None


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make` (torch.empty or a relative), whose memory is NaN (or a wild integer) until it is written."""

    def make_poisoned(*args: object, **options: object) -> torch.Tensor:
        tensor = make(*args, **options)
        if tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)

    return make_poisoned


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Reading memory before writing it gives NaN in every test, not whatever happened to lie there."""
    # `with torch.device(...)` knows the functions it redirects by identity: let it learn the real ones first.
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ]:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Save half of the time of kernels in Triton's interpreter."""
    if find_spec("triton") is None:
        yield
        return
    from quick_interpreter import quicken

    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


UNCOUNTED = tuple(TESTS / name for name in ("kernels", "examples", "benchmarks"))
"""Tests of code outside of retpop/, of which coverage counts nothing; its tracer would double their time."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Coverage stands still during the tests in `UNCOUNTED`."""
    coverage = Coverage.current()
    if coverage is None or not any(item.path.is_relative_to(folder) for folder in UNCOUNTED):
        return (yield)
    coverage.stop()
    try:
        return (yield)
    finally:
        coverage.start()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what other tests left in its caches."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
