"""REM: a token-based world-model agent for Atari, assembled on :mod:`retpop`.

The agent of "Improving Token-Based World Models with Parallel Observation Prediction" (arXiv 2402.05643):
a VQ-VAE tokenizer, a retention world model that predicts whole observations in parallel (POP), and an
actor-critic trained in imagination. Start with ``rem-atari --help``, or in Python with :func:`load_agent`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rem_atari.inference.agent import LoadedAgent
    from rem_atari.inference.dream import Dream
    from rem_atari.inference.dream_env import DreamEnv, DreamVectorEnv
    from rem_atari.inference.loading import load_agent

__all__ = ["Dream", "DreamEnv", "DreamVectorEnv", "LoadedAgent", "__version__", "load_agent"]

_HOMES = {
    "Dream": "rem_atari.inference.dream",
    "DreamEnv": "rem_atari.inference.dream_env",
    "DreamVectorEnv": "rem_atari.inference.dream_env",
    "LoadedAgent": "rem_atari.inference.agent",
    "load_agent": "rem_atari.inference.loading",
}
"""The modules that define the public names. A module is imported at its first use: torch and gymnasium take
seconds, and `rem-atari --help` needs neither."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("retpop")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
