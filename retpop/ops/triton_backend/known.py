"""Calls of a public operation that passed its checks: the next one of the same forms goes to kernels at once.

Shapes, strides, dtypes and devices that were right once are right again. Values are not kept: log-decays that
can be read are checked at each call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from retpop._torch import forward_ad_level
from retpop.arguments import autocast_is_on
from retpop.ops.checks import check_decay_values
from retpop.ops.triton_backend.custom import KernelOp, is_observed, kernels, run_kernels

KEPT = 1024
"""Forms that are kept of an operation; with one more, all are forgotten."""


class KnownCalls:
    """The forms of a public operation's arguments, with those of the op that it calls for them."""

    def __init__(self, where: str, op: KernelOp) -> None:
        """Take the public function's name for messages, and the op."""
        self._where, self._op = where, op
        self._known: dict[Hashable, tuple[Any, ...]] = {}

    def run(self, tensors: Sequence[Any], log_decay: Tensor, options: tuple[Any, ...]) -> Any:
        """The results of a call whose forms are known and that kernels may run, or None.

        Args:
            tensors: the op's first arguments: tensors, None, and lists of tensors.
            log_decay: one of them.
            options: all else that the public operation was given.

        Raises:
            ValueError: a log-decay is above 0 or NaN.
        """
        if not self._known or is_observed() or forward_ad_level() >= 0:
            return None
        flat: list[Tensor] = []
        try:
            forms = self._known.get(self._key(tensors, options, flat))
        except TypeError:  # an option that cannot be hashed, for the checks to name
            return None
        if forms is None or not run_kernels(flat):
            return None
        check_decay_values(self._where, log_decay)
        return self._op.run(forms, flat)

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
        forms, *_ = key = self._key(tensors, options, flat)
        if forms is not None and all(x is y for x, y in zip(flat, used, strict=False)):
            if len(self._known) >= KEPT:
                self._known = {}
            self._known[key] = (*forms, *numbers)

    def _key(self, tensors: Sequence[Any], options: tuple[Any, ...], flat: list[Tensor]) -> tuple[Any, ...]:
        forms = kernels("repeat").forms_of(tensors, flat)
        kind = flat[0].device.type if flat else ""
        autocast = torch.get_autocast_dtype(kind) if flat and autocast_is_on(kind) else None
        return forms, options, tuple(map(type, options)), autocast  # 1 and True are equal
