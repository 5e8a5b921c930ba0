"""What every benchmark shares: the device, and timing that waits for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def timed(benchmark: BenchmarkFixture, device: torch.device) -> Callable[[str, Callable[[], object]], None]:
    """``timed(group, run)`` times ``run``; what shares a group stands in one table."""

    def time_it(group: str, run: Callable[[], object]) -> None:
        def run_to_the_end() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{group}, {device.type}, {torch.get_num_threads()} threads"
        benchmark.pedantic(run_to_the_end, rounds=5, warmup_rounds=1)

    return time_it
