"""Where LPIPS's weights lie on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rem_atari.config import TokenizerConfig
from rem_atari.errors import UsageError
from rem_atari.models.lpips import Lpips
from rem_atari.weights.files import read_weights

FILE_NAME = "lpips-vgg16-v0.1.safetensors"

MISSING = (
    "the perceptual loss (LPIPS) needs its weights, which are not here yet: `rem-atari weights` fetches them"
    " once, --tokenizer.lpips-weights PATH names a file that has them, and --tokenizer.perceptual-weight 0"
    " trains without it"
)


def cached_weights() -> Path:
    """Where `rem-atari weights` keeps its file: ``retpop`` in XDG_CACHE_HOME, or in ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # The standard has it that relative paths are ignored.
    base = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    return base / "retpop" / FILE_NAME


def find_weights(config: TokenizerConfig) -> Path | None:
    """The file with the weights that a run needs: the one it names, or the fetched one; None: it needs none.

    Raises:
        UsageError: there is no such file; the message says how to come by one.
    """
    if config.perceptual_weight == 0:
        return None
    if config.lpips_weights is None:
        path = cached_weights()
        if not path.is_file():
            raise UsageError(MISSING)
        return path
    path = Path(config.lpips_weights).expanduser()
    if not path.is_file():
        raise UsageError(f"tokenizer.lpips_weights is {config.lpips_weights}, and there is no such file")
    return path


def load_perceptual(config: TokenizerConfig, device: torch.device | str) -> Lpips | None:
    """The network of the perceptual loss on a device; None where the configuration does without.

    Raises:
        UsageError: its weights are missing, or the file does not hold them.
    """
    path = find_weights(config)
    if path is None:
        return None
    try:
        return Lpips(read_weights([path])).to(device, memory_format=torch.channels_last)
    except (ValueError, OSError) as error:
        raise UsageError(f"the weights of the perceptual loss cannot be used ({path}): {error}") from error
