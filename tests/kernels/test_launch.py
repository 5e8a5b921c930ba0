"""What launchers are made of: a launch names its kernel's arguments, and strides are told once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retpop.kernels.launch import Launch, launched, token_strides

KERNEL = SimpleNamespace(__name__="some_kernel", arg_names=["p_x", "SCALE_V"])


def test_a_launch_names_every_argument_of_its_kernel_and_no_other() -> None:
    options = {"kernel": KERNEL, "grid": (1,), "num_warps": 4, "num_stages": 2}
    Launch(arguments={"p_x": None, "SCALE_V": True}, **options)
    for arguments, named in (
        ({"p_x": None, "SCALE_V": True, "SCALE_K": True}, "SCALE_K"),
        ({"p_x": None}, "SCALE_V"),
        ({"p_x": None, "SCAEL_V": True}, "SCAEL_V, SCALE_V"),
    ):
        with pytest.raises(TypeError, match=f"some_kernel: missing or unknown arguments: {named}$"):
            Launch(arguments=arguments, **options)


def test_equal_token_strides_are_told_once() -> None:
    row = torch.empty(2, 5, 3, 4, 24)
    tokens = {"q": row[:, :, 0], "k": row[:, :, 1], "g": torch.empty(2, 5, 4, 24), "dk": None}
    strides = token_strides(tokens)
    assert strides["UNIT"] == 8
    assert (strides["stride_q_t"], strides["stride_q_h"]) == (36, 3)
    assert (strides["stride_k_t"], strides["stride_k_b"]) == (None, 180)
    assert (strides["stride_g_t"], strides["stride_dk_t"]) == (12, None)
    assert token_strides(tokens, shared=False)["stride_k_t"] == 36


def test_predictions_share_the_strides_of_their_counterparts() -> None:
    main, pred = torch.empty(2, 6, 4, 16), torch.empty(2, 3, 2, 4, 16)
    strides = token_strides({"q": main, "q_pred": pred})
    assert (strides["stride_q_t"], strides["stride_q_pred_t"], strides["stride_q_pred_p"]) == (64, None, 128)


Change = Callable[[torch.Tensor], torch.Tensor]


def same(x: torch.Tensor) -> torch.Tensor:
    return x


class Plans:
    """A plan of one launch, and its kernel: notes how often it is made and what the kernel is given."""

    def __init__(self) -> None:
        self.made = 0
        self.taken: list[dict[str, Any]] = []
        self.__name__, self.arg_names = "some_kernel", ["p_x", "p_out", "stride"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.taken.append(arguments)

    def __call__(
        self, x: torch.Tensor, views: tuple[torch.Tensor | None, ...], *, change: Change = same
    ) -> tuple[list[Launch], list[torch.Tensor | None]]:
        self.made += 1
        out = torch.empty((3, x.shape[0]), dtype=torch.float64, device=x.device)
        x = change(x.mT)
        arguments = {"p_x": x, "p_out": out.mT, "stride": x.stride(1)}
        launch = Launch(kernel=self, grid=(2,), arguments=arguments, num_warps=4, num_stages=1)
        return [launch], [out.unsqueeze(0), None, views[0]]


def test_a_plan_is_made_once_for_tensors_of_the_same_form() -> None:
    plan = Plans()
    results = []
    for _ in range(3):
        x, view = torch.ones(4, 5), torch.ones(2, 6)[:, 1]
        out, nothing, returned = launched(plan, x, (view, None))
        results.append(out)
        taken = plan.taken[-1]
        assert (out.shape, out.dtype, nothing) == ((1, 3, 4), torch.float64, None)
        assert returned is view
        assert taken["p_x"].data_ptr() == x.data_ptr()
        assert taken["p_out"].data_ptr() == out.data_ptr()
        assert taken["stride"] == 5
    assert plan.made == 1
    assert len({out.data_ptr() for out in results}) == 3
    launched(plan, torch.ones(5, 4).mT, (view, None))
    assert (plan.made, plan.taken[-1]["stride"]) == (2, 1)


def test_a_copy_is_made_of_each_call_s_tensor() -> None:
    plan = Plans()
    for value in (1.0, 2.0):
        x = torch.arange(60.0).reshape(3, 4, 5)[1] * value
        launched(plan, x, (None,), change=torch.Tensor.contiguous)
        assert torch.equal(plan.taken[-1]["p_x"], x.mT)
        assert plan.taken[-1]["stride"] == 1
    assert plan.made == 1


@pytest.mark.parametrize("change", [torch.Tensor.clone, torch.Tensor.zero_, lambda x: x[1:]])
def test_a_plan_that_does_more_is_made_for_each_call(change: Change) -> None:
    plan = Plans()
    for value in (1.0, 2.0):
        x = torch.full((4, 5), value)
        launched(plan, x, (None,), change=change)
        assert torch.equal(plan.taken[-1]["p_x"], change(x.mT))
    assert plan.made == 3  # once to find out


def test_a_compiled_kernel_is_launched_again_where_triton_would_find_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for a tensor that starts at no multiple of 16 bytes, for which Triton compiles another."""
    found: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *values: found.append((grid, *values))

    class Compiling(Plans):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            return lambda **arguments: self.taken.append(arguments) or Compiled()

    monkeypatch.setattr("retpop.kernels.launch.CompiledKernel", Compiled)
    plan, memory = Compiling(), torch.ones(64)
    for start, asked, launches in ((1, 1, 0), (4, 2, 0), (8, 2, 1), (2, 3, 1), (0, 3, 2)):
        x = memory[start : start + 20].view(4, 5)
        out, *_ = launched(plan, x, (None,))
        assert (len(plan.taken), len(found)) == (asked, launches)
    grid, given, filled, stride = found[-1]
    assert (grid, given.data_ptr(), filled.data_ptr(), stride) == ((2, 1, 1), x.data_ptr(), out.data_ptr(), 5)
    assert plan.made == 1
