"""Offloading and loading by accelerate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retpop import RetNetDecoder

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra `interplay`)")


def test_weights_offloaded_to_the_cpu(decoder: RetNetDecoder, x: Tensor, x_pred: Tensor) -> None:
    away = accelerate.cpu_offload(copy.deepcopy(decoder), execution_device="cpu")
    assert {parameter.device.type for parameter in away.parameters()} == {"meta"}
    with torch.no_grad():
        state = away.init_state(2, device="cpu")
        assert torch.equal(away(x, state)[0], decoder(x)[0])
        for main_out in ("all", "last"):
            options = {"block_size": 3, "main_out": main_out}
            for a, e in zip(away.pop(x, x_pred, **options), decoder.pop(x, x_pred, **options), strict=True):
                torch.testing.assert_close(getattr(a, "kv", a), getattr(e, "kv", e))


@pytest.mark.parametrize("include_buffers", [False, True])
def test_a_checkpoint_loaded_into_an_empty_model(
    decoder: RetNetDecoder, x: Tensor, tmp_path: Path, include_buffers: bool
) -> None:
    torch.save(decoder.state_dict(), tmp_path / "pytorch_model.bin")
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = RetNetDecoder(decoder.cfg).eval()
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "pytorch_model.bin"), device_map={"": "cpu"}
    )
    assert torch.equal(loaded(x)[0], decoder(x)[0])
