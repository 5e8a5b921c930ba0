"""The device of the tests on a GPU: CUDA, or the CPU where they rehearse in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from gpu_cases import REHEARSAL

from retpop.ops.triton_backend.custom import interpreting


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; without a GPU the test is skipped."""
    if REHEARSAL:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if interpreting():
        pytest.skip("TRITON_INTERPRET is on; benchmarks/gpu_report.sh runs these with TRITON_INTERPRET=0")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def a_device_that_works() -> None:
    """After a kernel's illegal access every call of the process fails: leave, and say so.

    pytest-xdist then starts another process. That costs the test that was to begin, and not all that follow.
    """
    if REHEARSAL or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"an earlier test has lost the device: {error}", returncode=3)
