"""Cells of README's table that other packages decide: a next version is noticed.

`test_torchscale` has torchscale's, which needs its stand-ins.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest

import retpop


def arguments(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_ours() -> None:
    assert {"state", "cu_seqlens", "reset", "log_decay"} <= arguments(retpop.retention)


def test_flash_linear_attention() -> None:
    retention = pytest.importorskip(
        "fla.ops.retention", reason="flash-linear-attention is not installed (extra `interplay`)"
    )
    assert version("flash-linear-attention") == "0.6.0"
    for name in ("chunk_retention", "fused_recurrent_retention"):
        own = arguments(inspect.unwrap(getattr(retention, name)))
        assert {"initial_state", "output_final_state", "cu_seqlens"} <= own
        assert not own & {"reset", "g", "g_gamma", "log_decay"}
    assert "@torch.compiler.disable" in inspect.getsource(inspect.getmodule(retention.chunk_retention))


def test_yet_another_retnet() -> None:
    from yet_another_retnet import retention, retnet

    assert version("yet-another-retnet") == "0.5.1"
    wanted = {"query", "key", "value", "prev_state", "scale"}
    assert arguments(retention.retention_chunkwise) == wanted
    assert not hasattr(retnet.RetNet, "generate")
