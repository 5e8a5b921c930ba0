"""int8 weights by torchao."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from retpop import RetNetDecoder

quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed (extra `interplay`)"
)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_weights_are_off_by_a_few_per_cent(
    decoder: RetNetDecoder, x: Tensor, x_pred: Tensor, kind: str
) -> None:
    small = copy.deepcopy(decoder)
    quantization.quantize_(small, getattr(quantization, kind)())
    with torch.no_grad():
        for main_out in ("all", "last"):
            options = {"block_size": 3, "main_out": main_out}
            actual, pred, _ = small.pop(x, x_pred, small.init_state(2), **options)
            expected, expected_pred, _ = decoder.pop(x, x_pred, **options)
            for a, e in ((actual, expected), (pred, expected_pred)):
                assert 0 < (a - e).norm() / e.norm() < 0.03
