"""LoRA by PEFT on the projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retpop import RetNetDecoder

peft = pytest.importorskip("peft", reason="peft is not installed (extra `interplay`)")

PROJECTIONS = ["qkvg_proj", "out_proj", "in_proj"]


def test_adapters_act_learn_and_merge(decoder: RetNetDecoder, x: Tensor, x_pred: Tensor) -> None:
    plain = decoder(x)[0].detach()
    config = peft.LoraConfig(target_modules=PROJECTIONS, r=4, init_lora_weights=False)
    model = peft.get_peft_model(decoder, config)
    whole, pred, _ = model(x, x_pred=x_pred, block_size=3)
    last, last_pred, _ = model(x, x_pred=x_pred, block_size=3, main_out="last")
    torch.testing.assert_close(last, whole[:, 2::3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last_pred, pred, rtol=1e-5, atol=1e-5)
    (last.square().sum() + last_pred.square().sum()).backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 4 * decoder.cfg.num_layers  # two matrices for each of four linear layers
    assert all(gradient is not None and gradient.any() for gradient in learning.values())
    out = model(x)[0]
    assert not torch.allclose(out, plain)
    torch.testing.assert_close(model.merge_and_unload()(x)[0], out, rtol=1e-4, atol=1e-5)
