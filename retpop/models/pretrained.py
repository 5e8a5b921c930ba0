"""Language models as folders and on the Hugging Face hub: config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retpop.models.config import RetNetLMConfig

if TYPE_CHECKING:
    from retpop.models.language_model import RetNetLM

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(model: RetNetLM, folder: str | Path) -> None:
    """Write config.json and model.safetensors into ``folder``, which is made if missing.

    ``hf upload NAME FOLDER`` publishes it. A tied weight is stored once. Needs the extra ``hub``.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if model.cfg.tie_embeddings:
        del weights["head.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(model.cfg.to_dict(), indent=2) + "\n", encoding="utf-8")


def from_pretrained(
    cls: type[RetNetLM],
    source: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RetNetLM:
    """The model that `save_pretrained` wrote. Needs the extra ``hub``.

    Args:
        cls: the class.
        source: a folder, or a repository of the Hugging Face hub ("owner/name").
        revision: of the repository: a branch, tag or commit; None: its main branch.
        device: where the weights go; None: torch's default.
        dtype: of the weights; None: as stored.

    Returns:
        the model, in evaluation mode.

    Raises:
        ValueError: the configuration is not that of a `RetNetLM`.
        RuntimeError: weights are missing or do not fit; the message lists them.
    """
    from safetensors.torch import load_file

    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    cfg = RetNetLMConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    if cfg.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    model = cls(cfg, device, dtype or weights["embedding.weight"].dtype)
    model.load_state_dict(weights)
    return model.eval()
