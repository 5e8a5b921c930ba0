"""Calls of a public operation that passed its checks: the next one of the same forms goes to kernels at once.

Shapes, strides, dtypes and devices that were right once are right again. Values are not kept: log-decays that
can be read are looked at in each call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from retpop._torch import forward_ad_level
from retpop.ops.triton_backend.custom import (
    KEPT,
    KernelOp,
    Planned,
    is_observed,
    kernels,
    run_kernels,
    setting,
)


class KnownCalls:
    """Planned calls of the op that a public operation calls, by the forms of the operation's arguments."""

    def __init__(self, op: KernelOp) -> None:
        self._op = op
        self._calls: dict[Hashable, Planned] = {}

    def run(self, tensors: Sequence[Any], log_decay: Tensor, options: tuple[Any, ...]) -> Any:
        """The results of a call whose forms are known and that kernels may run, or None.

        Args:
            tensors: the op's first arguments: tensors, None, and lists of tensors.
            log_decay: one of them.
            options: all else that the public operation was given.
        """
        if not self._calls or is_observed() or forward_ad_level() >= 0:
            return None
        flat: list[Tensor] = []
        try:
            call = self._calls.get(self._key(tensors, options, flat))
        except TypeError:  # an option that cannot be hashed, for the checks to name
            return None
        if call is None or not run_kernels(flat[0]):
            return None
        if log_decay.is_cpu and not all(value <= 0 for value in log_decay.tolist()):
            return None  # for the checks to name
        return call(flat)

    def keep(
        self,
        tensors: Sequence[Any],
        options: tuple[Any, ...],
        used: Sequence[Tensor],
        numbers: tuple[Any, ...],
    ) -> None:
        """Remember a call that passed its checks, if the op takes its tensors as they are.

        Args:
            tensors, options: as in `run`.
            used: what the op takes in place of the first of the tensors.
            numbers: the op's arguments after them.
        """
        if is_observed():
            return
        flat: list[Tensor] = []
        key = self._key(tensors, options, flat)
        if not all(x is y for x, y in zip(flat, used, strict=False)):
            return
        call = self._op.planned((*tensors, *numbers), [])
        if call is not None:
            if len(self._calls) >= KEPT:
                self._calls = {}
            self._calls[key] = call

    def _key(self, tensors: Sequence[Any], options: tuple[Any, ...], flat: list[Tensor]) -> Hashable:
        forms = kernels("repeat").forms_of(tensors, flat)
        device = "cuda" if flat and flat[0].is_cuda else "cpu"  # no others run kernels
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return forms, *options, *map(type, options), autocast, *setting()  # 1 and True are equal
