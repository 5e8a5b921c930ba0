"""The `torch.library` ops of the Triton backend: what torch asks of an op, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from op_cases import BACKWARD, FORWARD, KINDS
from torch import Tensor

from retpop.ops import custom

ALL = {**FORWARD, **BACKWARD}

CASES = [(name, kind) for name in ALL for kind in KINDS if not (name in BACKWARD and kind == "requires grad")]
"""A backward has no derivative; `test_a_derivative_of_a_derivative_is_refused` is its sixth kind."""


def run(name: str, arguments: tuple[object, ...]) -> tuple[Tensor, ...]:
    results = getattr(torch.ops.retpop, name)(*arguments)
    return (results,) if isinstance(results, Tensor) else tuple(results)


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_opcheck(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, aliasing, fakes, autograd registration; where gradients are wanted, AOT dispatch as well."""
    monkeypatch.setattr(custom, "interpreting", lambda: False)
    tests = (*QUICK, "test_aot_dispatch_dynamic") if kind == "requires grad" else QUICK
    torch.library.opcheck(getattr(torch.ops.retpop, name), ALL[name](kind), test_utils=tests)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_aot_dispatch(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck's last part, with dynamic shapes."""
    monkeypatch.setattr(custom, "interpreting", lambda: False)
    tests = "test_aot_dispatch_dynamic"
    torch.library.opcheck(getattr(torch.ops.retpop, name), ALL[name](kind), test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORWARD)
def test_kernels_and_plain_pytorch_agree(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In values, and in all that opcheck asks of the latter: layout, and memory that nothing else has."""
    arguments, before = ALL[name](kind), ALL[name](kind)
    kernels = run(name, arguments)
    for given, kept in zip(arguments, before, strict=True):
        assert not isinstance(given, Tensor) or torch.equal(given, kept)
    owned = [x.untyped_storage().data_ptr() for x in (*kernels, *arguments) if isinstance(x, Tensor)]
    if kind != "empty":
        assert len(set(owned)) == len(owned)
    monkeypatch.setattr(custom, "interpreting", lambda: False)
    for actual, expected in zip(kernels, run(name, arguments), strict=True):
        assert (actual.shape, actual.stride()) == (expected.shape, expected.stride())
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", BACKWARD)
def test_a_derivative_of_a_derivative_is_refused(name: str) -> None:
    arguments = ALL[name]("requires grad")
    found = getattr(torch.ops.retpop, name)(*arguments)
    with pytest.raises(RuntimeError, match=rf'retpop::{name}.*derivative of a derivative.*backend="torch"'):
        torch.autograd.grad(sum(x.sum() for x in found), arguments[0])


@pytest.mark.parametrize("name", ALL)
def test_vmap_is_refused(name: str) -> None:
    arguments = ALL[name]("plain")

    def call(first: Tensor) -> object:
        return getattr(torch.ops.retpop, name)(first, *arguments[1:])

    with pytest.raises(RuntimeError, match=rf'retpop::{name}.*vmap.*backend="torch"'):
        torch.vmap(call)(arguments[0].unsqueeze(0))
