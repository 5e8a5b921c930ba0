"""The `torch.library` ops of the Triton backend: what torch asks of an op, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from op_cases import BACKWARD, FORWARD, KINDS, flat, run
from torch import Tensor

from retpop.ops.triton_backend import custom

ALL = {**FORWARD, **BACKWARD}

CASES = [(case, kind) for case in ALL for kind in KINDS if not (case in BACKWARD and kind == "requires grad")]
"""A backward has no derivative; `test_a_derivative_of_a_derivative_is_refused` is its sixth kind."""

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations compute in plain PyTorch, for what does not depend on their values."""
    monkeypatch.setattr(custom, "interpreting", lambda: False)


@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize(("case", "kind"), CASES)
def test_opcheck(case: str, kind: str) -> None:
    """Schema, aliasing, fakes, autograd registration; where gradients are wanted, AOT dispatch as well."""
    name, make = ALL[case]
    arguments = make(kind)
    tests = (*QUICK, "test_aot_dispatch_dynamic") if kind == "requires grad" else QUICK
    torch.library.opcheck(getattr(torch.ops.retpop, name), arguments, test_utils=tests)


@pytest.mark.slow
@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize(("case", "kind"), CASES)
def test_aot_dispatch(case: str, kind: str) -> None:
    """opcheck's last part, with dynamic shapes."""
    name, make = ALL[case]
    arguments = make(kind)
    torch.library.opcheck(getattr(torch.ops.retpop, name), arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_kernels_and_plain_pytorch_agree(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In values, and in all that opcheck asks of the latter: layout, and memory that nothing else has."""
    name, make = ALL[case]
    arguments = make(kind)
    before = [x.clone() if isinstance(x, Tensor) else x for x in flat(arguments)]
    kernels = run(name, arguments)
    for given, kept in zip(flat(arguments), before, strict=True):
        assert not isinstance(given, Tensor) or torch.equal(given, kept)
    owned = [x.untyped_storage().data_ptr() for x in (*kernels, *flat(arguments)) if isinstance(x, Tensor)]
    if kind != "empty":
        assert len(set(owned)) == len(owned)
    monkeypatch.setattr(custom, "interpreting", lambda: False)
    for actual, expected in zip(kernels, run(name, arguments), strict=True):
        assert (actual.shape, actual.stride()) == (expected.shape, expected.stride())
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize("case", BACKWARD)
def test_a_derivative_of_a_derivative_is_refused(case: str) -> None:
    name, make = BACKWARD[case]
    arguments = make("requires grad")
    with pytest.raises(RuntimeError, match=rf'retpop::{name}.*derivative of a derivative.*backend="torch"'):
        torch.autograd.grad(sum(x.sum() for x in run(name, arguments)), flat(arguments)[0])


@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize("case", ALL)
def test_vmap_is_refused(case: str) -> None:
    name, make = ALL[case]
    arguments = make("plain")

    def call(state: Tensor) -> object:
        return getattr(torch.ops.retpop, name)(*(state if x is batched else x for x in arguments))

    batched = next(x for x in arguments if isinstance(x, Tensor))
    with pytest.raises(RuntimeError, match=rf'retpop::{name}.*vmap.*backend="torch"'):
        torch.vmap(call)(batched.unsqueeze(0))
