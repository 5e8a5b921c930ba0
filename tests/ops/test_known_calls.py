"""A call of the Triton backend whose forms passed the checks goes to kernels at once."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

import retpop

ops = inspect.getmodule(retpop.retention)


class Counted:
    """A check that counts its calls."""

    def __init__(self, check: Any) -> None:
        self.check, self.calls = check, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.check(*arguments, **options)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(ops.check_retention)
    monkeypatch.setattr(ops, "check_retention", counted)
    return counted


def tokens(T: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and log-decays, of a length that no other test has."""
    generator = torch.Generator().manual_seed(T)
    made = [torch.randn(1, T, 2, 8, generator=generator).to(dtype) for _ in range(3)]
    return [*made, torch.tensor([-0.5, -0.1])]


def run(inputs: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return retpop.retention(*inputs, **{"backend": "triton", **options})


def test_forms_are_checked_once(checks: Counted) -> None:
    first = run(tokens(3))
    inputs = tokens(3)
    again = run(inputs)
    assert checks.calls == 1
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other = run([inputs[0] * 2, *inputs[1:]], scale=0.5)
    assert checks.calls == 2
    expected = retpop.retention(inputs[0] * 2, *inputs[1:], scale=0.5, backend="reference")
    assert torch.allclose(other[0], expected[0], atol=1e-5)
    run([inputs[0].transpose(1, 2).contiguous().transpose(1, 2), *inputs[1:]])
    assert checks.calls == 3 + 1  # the reference has one too


def test_values_and_options_are_checked_each_time() -> None:
    inputs = tokens(4)
    run(inputs, scale=1)
    with pytest.raises(ValueError, match="log_decay holds"):
        run([*inputs[:3], torch.tensor([-0.5, 0.25])], scale=1)
    with pytest.raises(TypeError, match="scale is bool"):
        run(inputs, scale=True)
    with pytest.raises(TypeError, match="scale is list"):
        run(inputs, scale=[1])
    with pytest.raises(ValueError, match="k is on meta but q is on cpu"):
        run([inputs[0], inputs[1].to("meta"), *inputs[2:]], scale=1)
    with pytest.raises(ValueError, match="v has H=1"):
        run([*inputs[:2], inputs[2][:, :, :1], inputs[3]], scale=1)


def test_autocast_and_transforms_go_the_long_way() -> None:
    inputs = tokens(5)
    run(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(inputs)[0].dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"transform of torch\.func"):
        torch.func.grad(lambda q: run([q, *inputs[1:]])[0].sum())(inputs[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], inputs[1])
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            run([dual, *inputs[1:]])


def test_without_the_interpreter_a_known_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tokens(6)
    run(inputs)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        run(inputs)


@pytest.mark.parametrize("with_state", [False, True])
def test_gradients_of_known_calls(with_state: bool) -> None:
    *inputs, log_decay = tokens(7)
    state = torch.ones(1, 2, 8, 8) if with_state else None
    leaves = [x.requires_grad_() for x in (*inputs, *([state] if with_state else []))]
    found = []
    for backend in ("triton", "triton", "reference"):
        out, final = retpop.retention(*inputs, log_decay, state=state, backend=backend)
        total = (out * 0.5).sum() + (final.sum() if with_state else 0.0)
        found.append(torch.autograd.grad(total, leaves))
    for first, again, expected in zip(*found, strict=True):
        assert torch.equal(first, again)
        assert torch.allclose(again, expected, atol=1e-4)


def test_gradients_of_tensors_that_were_saved_with_other_strides() -> None:
    """As hooks that keep them elsewhere return them."""
    *inputs, log_decay = tokens(9)
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    found = []
    for hooks in (nullcontext(), save_on_cpu()):
        with hooks:
            out, _ = run([*inputs, log_decay])
        found.append(torch.autograd.grad(out.square().sum(), inputs))
    for grad, expected in zip(*found, strict=True):
        assert torch.equal(grad, expected)


def test_a_known_call_of_pop() -> None:
    q, k, v, log_decay = tokens(8)
    rows = (q, k, v, *(x[:, None, :3] for x in (k, v, q)))
    rows = tuple(x.detach().requires_grad_() for x in rows)
    found = []
    for backend in ("triton", "triton", "reference"):
        out, pred, final = retpop.pop_retention(*rows, log_decay, block_size=4, offset=1, backend=backend)
        grads = torch.autograd.grad(out.sum() + pred.square().sum(), rows)
        found.append((out, pred, final, *grads))
    for first, again, expected in zip(*found, strict=True):
        assert torch.equal(first, again)
        assert torch.allclose(again, expected, atol=1e-4)
    with pytest.raises(ValueError, match="offset is 3"):
        retpop.pop_retention(*rows, log_decay, block_size=4, offset=3, backend="triton")
