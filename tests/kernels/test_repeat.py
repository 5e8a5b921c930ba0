"""A call of launchers is planned once for tensors of the same forms, and then repeated."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from retpop.kernels.launch import Launch, launched, multiprocessors_of, target_of
from retpop.kernels.repeat import filled, forms_of, recorded_call, tensor_forms

Change = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


class Calls:
    """A call of one launch, and its kernel: how often it is planned, and what the kernel is given."""

    def __init__(self, change: Change = same) -> None:
        self.made, self.change = 0, change
        self.taken: list[dict[str, Any]] = []
        self.__name__, self.arg_names = "some_kernel", ["p_x", "p_out", "stride"]
        self.recorded = lru_cache(partial(recorded_call, self.call))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.taken.append(arguments)

    def plan(self, x: Tensor) -> tuple[list[Launch], Tensor]:
        torch.empty(1000, device=x.device)  # not used
        out = torch.empty((3, x.shape[0]), dtype=torch.float64, device=x.device)
        x = self.change(x.mT)
        arguments = {"p_x": x, "p_out": out[1:].mT, "stride": x.stride(1)}
        launch = Launch(kernel=self, grid=(2,), arguments=arguments, num_warps=4, num_stages=1)
        return [launch], out.unsqueeze(0)

    def call(self, x: Tensor, views: list[Tensor | None]) -> list[Tensor | None]:
        self.made += 1
        assert target_of(x.device).multiprocessors == multiprocessors_of(torch.device("cpu"))
        return [launched(self.plan, x), None, views[0]]

    def __call__(self, *arguments: Any) -> Any:
        tensors: list[Tensor] = []
        forms = forms_of(arguments, tensors)
        assert forms is not None
        return self.recorded(forms)(tensors)


def test_forms_stand_for_their_arguments() -> None:
    x, y = torch.ones(2, 3), torch.nn.Parameter(torch.ones(4, 2).mT)
    cpu = torch.device("cpu")
    arguments = (x, [y, None], 3, (1, 2), "name")
    tensors: list[Tensor] = []
    forms = forms_of(arguments, tensors)
    assert tensors == [x, y]
    assert forms[:2] == (
        (torch.float32, (2, 3), (3, 1), cpu, False),
        ((torch.float32, (2, 4), (1, 2), cpu, True), None),
    )
    assert filled(forms, iter("ab")) == ["a", ["b", None], 3, [1, 2], "name"]
    assert [form[-1] for form in tensor_forms(forms)] == [False, True]


def test_what_is_no_ordinary_tensor_has_no_form() -> None:
    class Special(torch.Tensor):
        pass

    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    for x in (torch.ones(2).as_subclass(Special), object(), [object()], negated):
        assert forms_of([x], []) is None


def test_a_call_is_planned_once_for_tensors_of_the_same_form() -> None:
    call = Calls()
    results = []
    for _ in range(3):
        x, view = torch.ones(4, 5), torch.ones(2, 6)[:, 1]
        out, nothing, returned = call(x, [view, None])
        results.append(out)
        taken = call.taken[-1]
        assert (out.shape, out.dtype, nothing) == ((1, 3, 4), torch.float64, None)
        assert returned is view
        assert taken["p_x"].data_ptr() == x.data_ptr()
        assert taken["p_out"].data_ptr() == out[0, 1:].data_ptr()
        assert (taken["p_out"].shape, taken["p_out"].stride()) == ((4, 2), (1, 4))
        assert taken["stride"] == 5
    assert call.made == 1
    assert len({out.data_ptr() for out in results}) == 3
    call(torch.ones(5, 4).mT, [view, None])
    assert (call.made, call.taken[-1]["stride"]) == (2, 1)


def test_a_copy_is_made_of_each_call_s_tensor() -> None:
    call = Calls(torch.Tensor.contiguous)
    for value in (1.0, 2.0):
        x = torch.arange(60.0).reshape(3, 4, 5)[1] * value
        call(x, [None])
        assert torch.equal(call.taken[-1]["p_x"], x.mT)
        assert call.taken[-1]["stride"] == 1
    assert call.made == 1


def read(x: Tensor) -> Tensor:
    assert x.tolist()
    return x


@pytest.mark.parametrize("change", [torch.Tensor.clone, torch.Tensor.zero_, lambda x: x + 1, read])
def test_a_call_that_computes_is_made_each_time(change: Change) -> None:
    call = Calls(change)
    for value in (1.0, 2.0):
        x = torch.full((4, 5), value)
        call(x, [None])
        assert torch.equal(call.taken[-1]["p_x"], change(x.mT))
    assert call.made == 3  # once to find out


def test_a_compiled_kernel_is_launched_again_where_triton_would_find_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With addresses. Not for a tensor that starts at no multiple of 16 bytes: Triton compiles another."""
    found: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *values: found.append((grid, *values))

    class Compiling(Calls):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            return lambda **arguments: self.taken.append(arguments) or Compiled()

    monkeypatch.setattr("retpop.kernels.repeat.CompiledKernel", Compiled)
    call, memory = Compiling(), torch.ones(64)
    for start, asked, launches in ((1, 1, 0), (4, 2, 0), (8, 2, 1), (2, 3, 1), (0, 3, 2)):
        x = memory[start : start + 20].view(4, 5)
        out, *_ = call(x, [None])
        assert (len(call.taken), len(found)) == (asked, launches)
    assert found[-1] == ((2, 1, 1), x.data_ptr(), out[0, 1:].data_ptr(), 5)
    assert call.made == 1
