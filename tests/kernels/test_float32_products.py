"""float32 tokens on tensor cores, emulated in the interpreter, and the setting that chooses how."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from retention_cases import PopCase, RetentionCase, float32_products, gradients, largest_error
from triton.runtime import interpreter

from retpop.kernels.launch import dot_precision


def tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to the 10 bits after the point that tensor cores read."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(np.float32)


def product(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    """a b as Triton compiles it for NVIDIA's GPUs; sums are rounded as NumPy's, not as tensor cores'."""
    if precision == "IEEE":
        return np.matmul(a, b)
    upper_a, upper_b = tf32(a), tf32(b)
    found = np.matmul(upper_a, upper_b)
    if precision == "TF32x3":
        found += np.matmul(tf32(a - upper_a), upper_b) + np.matmul(upper_a, tf32(b - upper_b))
    return found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The precisions of the interpreter's products, which are those of tensor cores."""
    used: set[str] = set()

    def create_dot(a, b, sums, precision, max_num_imprecise_acc):
        used.add(precision.name)
        found = product(a.data, b.data, precision.name) + sums.data
        return interpreter.TensorHandle(found, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_dot", create_dot)
    return used


@pytest.mark.parametrize(
    "case",
    [
        RetentionCase.make(1, 40, 3, 32, 32, dtype=torch.float32),
        PopCase.make(1, 2, 17, 2, 20, 2, 32, 32, dtype=torch.float32),
    ],
    ids=["retention", "pop"],
)
def test_three_products_are_nearly_as_exact_as_float32(
    case: RetentionCase | PopCase, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of results and gradients, each call of the same forms by the settings of its own time."""
    exact = case.double().for_gradients()
    results = exact.run(backend="torch")
    expected = [*results, *gradients(results, exact.leaves())]
    errors = {}
    for setting in ("ieee", "tf32", "tf32x3"):
        monkeypatch.setenv("TRITON_F32_DEFAULT", setting)
        used.clear()
        with float32_products("tf32") if setting == "tf32" else nullcontext():
            single = case.for_gradients()
            results = single.run(backend="triton")
            found = [*results, *gradients(results, single.leaves())]
        assert {word.lower() for word in used} == {setting}
        errors[setting] = max(map(largest_error, found, expected))
    assert errors["ieee"] < 1e-6
    assert errors["tf32"] > 2e-4
    assert errors["tf32x3"] < 2e-6


def test_three_products_are_chosen_by_triton_s_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """For float32 on NVIDIA's GPUs and head dims up to 64, unless torch allows TF32."""

    def chosen(dtype: torch.dtype = torch.float32, architecture: str = "sm_90", largest: int = 64) -> str:
        return dot_precision(dtype, architecture, (16, largest))

    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")
    assert chosen() == chosen(architecture="sm_80") == "tf32x3"
    assert chosen(architecture="gfx942") == chosen(torch.bfloat16) == chosen(largest=65) == "ieee"
    with float32_products("tf32"):
        assert chosen() == chosen(largest=65) == "tf32"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "bf16x6")
    assert chosen() == "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x4")
    with pytest.raises(ValueError, match="TRITON_F32_DEFAULT is 'tf32x4'"):
        chosen()
