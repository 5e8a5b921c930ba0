"""A saved model comes back as it was, from a folder or from the hub's cache, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from retpop import RetNetConfig
from retpop.models import RetNetLM, RetNetLMConfig

DECODER = RetNetConfig(embed_dim=16, num_heads=2, num_layers=2, ffn_dim=16, decay=(-0.1, -0.01))
TOKENS = torch.arange(14).reshape(2, 7) % 13


def saved(folder: Path, *, tied: bool = True, dtype: torch.dtype | None = None) -> RetNetLM:
    torch.manual_seed(0)
    cfg = RetNetLMConfig(vocab_size=13, decoder=DECODER, tie_embeddings=tied, scale_embeddings=True)
    model = RetNetLM(cfg, dtype=dtype)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_gives_the_model_back(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = saved(tmp_path / "new" / "folder", tied=tied, dtype=dtype)
    loaded = RetNetLM.from_pretrained(str(tmp_path / "new" / "folder"))
    assert loaded.cfg == model.cfg
    assert not loaded.training
    assert loaded.head.weight.dtype == dtype
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    saved(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118  # it is no mapping
        assert file.metadata() == {"format": "pt"}


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    saved(tmp_path)
    assert RetNetLM.from_pretrained(tmp_path, dtype=torch.float64).head.weight.dtype == torch.float64


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        RetNetLM.from_pretrained(tmp_path)
    config["decoder"]["num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"decoder\.layers\.2"):
        RetNetLM.from_pretrained(tmp_path)


def test_a_repository_comes_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is laid out as huggingface_hub does, so that its own code finds it while offline."""
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="huggingface-hub is not installed (extra `hub`)"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--someone--toy", "0" * 40
    model = saved(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = RetNetLM.from_pretrained("someone/toy")
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    with pytest.raises(FileNotFoundError):
        RetNetLM.from_pretrained("someone/else")
