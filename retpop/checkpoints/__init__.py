"""Other implementations' weights, as modules of this library."""

from __future__ import annotations

from retpop.checkpoints.yet_another_retnet import load_yet_another_retnet

__all__ = ["load_yet_another_retnet"]
