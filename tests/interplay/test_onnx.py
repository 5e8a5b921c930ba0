"""One step of a decoder as an ONNX graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from retpop import RetNetDecoder, RetNetState

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra `interplay`)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra `interplay`)")


class Step(nn.Module):
    """Tensors in, tensors out, as a graph has them."""

    def __init__(self, decoder: RetNetDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, kv: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, state = self.decoder(x, RetNetState(kv, position))
        return out, state.kv, state.position


@pytest.mark.filterwarnings("ignore")
def test_a_step_runs_outside_of_torch(decoder: RetNetDecoder, x: Tensor) -> None:
    step, before = Step(decoder), decoder(x[:, :5])[1].detach()
    inputs = (x[:, 5:], before.kv, before.position)
    graph = torch.onnx.export(step, inputs, dynamo=True, verbose=False).model_proto
    names = [entry.name for entry in graph.graph.input]
    from onnx.reference import ReferenceEvaluator

    arrays = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    for actual, expected in zip(ReferenceEvaluator(graph).run(None, arrays), step(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-5, atol=1e-5)
