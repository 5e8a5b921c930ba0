"""How many files a reader opens to follow one call: those that it enters, once all is loaded and warm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
from module_cases import small_config
from retention_cases import RetentionCase, normal

from retpop import RetNetDecoder

ROOT = Path(__file__).parent.parent
CASE = RetentionCase.make(1, 20, 2, 4, 4, dtype=torch.float32, with_state=False)


def files_entered(call: Callable[[], object]) -> set[str]:
    """The files of `retpop/` and `kernels/` in which a function is entered, in this thread or another."""
    call()
    entered: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            entered.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = (Path(code.co_filename) for code in entered if code.co_name != "<module>")
    names = (str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT))
    return {name for name in names if name.startswith(("retpop/", "kernels/"))}


def with_gradient() -> None:
    case = CASE.for_gradients()
    torch.autograd.grad(case.run()[0].sum(), case.leaves())


def pop(backend: str) -> Callable[[], object]:
    decoder = RetNetDecoder(small_config(num_layers=1, position="retnet")).eval()
    x, x_pred = (normal(*shape, 12, seed=1, dtype=torch.float32) for shape in ((1, 6), (1, 2, 4)))
    return torch.no_grad()(lambda: decoder.pop(x, x_pred, block_size=3, backend=backend))


CALLS: dict[str, tuple[Callable[[], object], int]] = {
    "retention": (CASE.run, 8),
    "retention, with gradient": (with_gradient, 9),
    "packed": (lambda: CASE.run(cu_seqlens=torch.tensor([0, 5, 20])), 9),
    "retention by kernels": (lambda: CASE.run(backend="triton"), 13),
    "decoder.pop": (pop("torch"), 17),
    "decoder.pop by kernels": (pop("triton"), 22),
}


@pytest.mark.parametrize("name", CALLS)
def test_files_entered_by_one_call(name: str) -> None:
    call, most = CALLS[name]
    entered = files_entered(call)
    assert len(entered) <= most, sorted(entered)
