"""Whole models, ready to train, sample from and share."""

from __future__ import annotations

from retpop.models.generation import GenerationStep
from retpop.models.language_model import RetNetLM, RetNetLMConfig

__all__ = ["GenerationStep", "RetNetLM", "RetNetLMConfig"]
