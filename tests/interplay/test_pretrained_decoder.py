"""A decoder inside a model of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import retpop
from retpop import RetNetDecoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `interplay`)")


class Config(transformers.PretrainedConfig):
    model_type = "retpop_test"

    def __init__(self, decoder: dict | None = None, **options: object) -> None:
        super().__init__(**options)
        self.decoder = decoder


class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.decoder = RetNetDecoder(retpop.RetNetConfig.from_dict(config.decoder))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The decoder draws its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_gives_the_model_that_was_saved(
    decoder: RetNetDecoder, x: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = Model(Config(decoder=decoder.cfg.to_dict())).eval()
    model.decoder.load_state_dict(decoder.state_dict())
    model.to(dtype).save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.decoder.cfg == decoder.cfg
    assert torch.equal(loaded(x.to(dtype)), model(x.to(dtype)))
    assert torch.equal(loaded.decoder.layers[1].retention.log_decay, retpop.retnet_decay(2))
