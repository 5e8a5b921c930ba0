"""The device of the tests on a GPU: CUDA, or the CPU where they rehearse in the interpreter."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import REHEARSAL

from retpop.ops.custom import interpreting


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
