"""The configurations that `kernels/configs.py` chooses, without a GPU, and what is known of GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from retention_cases import float32_products

from retpop.kernels.configs import PopConfig, padded, pop_config, pop_tiles, tail_rows
from retpop.kernels.gpus import FAULTS, SHARED_MEMORY, why_wrong
from retpop.kernels.launch import (
    LARGEST_IN_THREE_PRODUCTS,
    architecture_of,
    dot_precision,
    multiprocessors_of,
)

REM: dict[str, Any] = {
    "pairs": 64 * 4,
    "num_blocks": 10,
    "lengths": (65, 64),
    "head_dims": (64, 64),
    "dtype": torch.bfloat16,
    "precision": "ieee",
    "architecture": "sm_90",
    "multiprocessors": 132,
}


def test_without_a_gpu_the_configs_are_those_of_an_h200() -> None:
    assert architecture_of(torch.device("cpu")) == architecture_of(torch.device("meta")) == "sm_90"
    assert multiprocessors_of(torch.device("cpu")) == 132


def test_float32_products_are_those_that_torch_allows() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert dot_precision(torch.float32, "sm_90", (64, 64)) == expected
            assert dot_precision(torch.float32, "gfx942", (64, 64)) == "ieee"
            assert dot_precision(torch.bfloat16, "sm_90", (64, 64)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_float32_products_are_those_of_torch_s_newer_setting() -> None:
    for setting, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
        with float32_products(setting):
            assert dot_precision(torch.float32, "sm_90", (64, 64)) == expected


@pytest.mark.parametrize(
    ("head_dim", "columns"),
    [(1, 16), (8, 16), (16, 16), (24, 32), (60, 64), (64, 64), (100, 128), (256, 256)],
)
def test_head_dims_are_padded_to_powers_of_two(head_dim: int, columns: int) -> None:
    assert padded(head_dim) == columns


@pytest.mark.parametrize(("length", "rows"), [(64, 0), (65, 16), (80, 16), (81, 32), (97, 64), (0, 0)])
def test_a_tail_is_a_small_tile(length: int, rows: int) -> None:
    assert tail_rows(length, 64) == rows


def test_rem_trains_in_one_pass_with_a_line_of_tiles() -> None:
    """Two programs of 4 warps an SM, each of which reads its inputs once: no slices, no split."""
    assert pop_config(**REM) == PopConfig(tile=64, cols_v=64, num_warps=4, num_stages=2)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, False),
        ({"lengths": (80, 80)}, False),
        ({"lengths": (81, 80)}, True),
        ({"lengths": (300, 1)}, True),
        ({"head_dims": (64, 128)}, True),
        ({"head_dims": (128, 64)}, True),
        ({"head_dims": (24, 40)}, False),
        ({"head_dims": (24, 60)}, True),
        ({"head_dims": (60, 24)}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float32, "precision": "tf32"}, True),
    ],
)
def test_which_form_the_walk_takes(changes: dict[str, Any], steps: bool) -> None:
    assert pop_config(**{**REM, **changes}).steps is steps


@pytest.mark.parametrize(
    ("pairs", "num_blocks", "cols_v", "split"),
    [
        (132, 10, 64, False),
        (131, 10, 32, False),  # 262 programs
        (34, 10, 32, False),  # 68: more than half of the SMs have one
        (33, 10, 32, True),
        (33, 4, 32, True),
        (33, 3, 32, False),
        (1, 0, 32, False),
    ],
)
def test_when_slices_narrow_and_when_blocks_are_split(
    pairs: int, num_blocks: int, cols_v: int, split: bool
) -> None:
    config = pop_config(**{**REM, "pairs": pairs, "num_blocks": num_blocks})
    assert (config.cols_v, config.split) == (cols_v, split)
    assert replace(config, cols_v=64, split=False) == pop_config(**REM)


def test_slices_are_not_wider_than_the_values() -> None:
    assert pop_config(**{**REM, "head_dims": (64, 8)}).cols_v == 16
    assert pop_config(**{**REM, "pairs": 1, "head_dims": (64, 8)}).cols_v == 16


def test_float32_without_tf32_has_tiles_for_plain_products() -> None:
    for key_dim in (8, 64, 128, 256):
        for architecture in SHARED_MEMORY:
            config = pop_tiles((65, 64), (key_dim, 64), torch.float32, "ieee", architecture)
            assert config.tile == 16
            assert not config.scale_v


def test_a_step_is_no_longer_than_what_it_goes_over() -> None:
    tiles = [pop_tiles((L, 3), (128, 128), torch.bfloat16, "ieee", "sm_90").tile for L in (1, 17, 60, 500)]
    assert tiles == [16, 32, 64, 64]


@pytest.mark.parametrize("architecture", [*SHARED_MEMORY, "sm_87", "sm_103", "gfx950"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_architecture_has_tiles_for_every_head_dim(dtype: torch.dtype, architecture: str) -> None:
    """Also one that no table names. In shared memory: an estimate, the audit compiles."""
    for key_dim in (1, 8, 24, 60, 64, 100, 128, 200, 256):
        for lengths in ((1, 1), (65, 64), (1000, 0)):
            precisions = ["ieee"]
            if dtype is torch.float32:
                precisions += ["tf32", *(["tf32x3"] if key_dim <= LARGEST_IN_THREE_PRODUCTS else [])]
            for precision in precisions:
                config = pop_tiles(lengths, (key_dim, key_dim), dtype, precision, architecture)
                rows = config.tile if config.steps else sum(n // 64 * 64 + tail_rows(n, 64) for n in lengths)
                columns = 2 * padded(key_dim) + config.cols_v
                stages = max(1, config.num_stages - 1)
                assert rows * columns * dtype.itemsize * stages <= 1024 * SHARED_MEMORY.get(architecture, 64)


def test_key_dims_beyond_registers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pop_fwd\(\): Dk is 257; the kernel takes at most 256\."):
        pop_tiles((65, 64), (257, 8), torch.bfloat16, "ieee", "sm_90")
    for M, cols_v in ((64, 64), (65, 32)):  # more than two tiles need a second state
        assert pop_tiles((65, M), (256, 1000), torch.bfloat16, "ieee", "sm_90").cols_v == cols_v


@pytest.mark.parametrize(
    ("architecture", "version", "refused"),
    [
        ("sm_100", "3.5.1", False),
        ("sm_100", "3.6.0", True),
        ("sm_103", "3.7.1+git0a1b2c3", True),
        ("sm_103", "3.8.0.post1", True),
        ("sm_100", "3.10", False),
        ("sm_100", "3.9.0", False),
        ("sm_90", "3.6.0", False),
        ("gfx942", "3.7.0", False),
    ],
)
def test_reported_pairs_are_refused(architecture: str, version: str, refused: bool) -> None:
    reason = why_wrong(architecture, version)
    assert (reason is not None) == refused
    if reason is not None:
        assert all(word in reason for word in (architecture, version, "https://", "Triton 3.9.0"))


def test_every_fault_names_its_report() -> None:
    for fault in FAULTS:
        assert fault.report.startswith("https://github.com/")
        assert all(why_wrong(architecture, fault.first) for architecture in fault.architectures)
