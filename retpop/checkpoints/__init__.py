"""Other implementations' weights, as modules of this library."""

from __future__ import annotations

from retpop.checkpoints.flash_linear_attention import load_fla, to_fla
from retpop.checkpoints.torchscale import load_torchscale
from retpop.checkpoints.yet_another_retnet import load_yet_another_retnet

__all__ = ["load_fla", "load_torchscale", "load_yet_another_retnet", "to_fla"]
