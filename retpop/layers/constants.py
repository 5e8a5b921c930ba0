"""What a config fixes in numbers, as tensors on the devices where calls run."""

from __future__ import annotations

import torch
from torch import Tensor

from retpop.arguments import is_eager
from retpop.config import RetNetConfig
from retpop.ops.decay_powers import DecayPowers, default_scale
from retpop.ops.dtypes import state_dtype
from retpop.position import Rotation, rotary_frequencies, rotary_turns, rotation_at

Numbers = tuple[float, ...] | tuple[int, ...]


class Constants:
    """Decays and rotary frequencies: tensors made of plain numbers where a call needs them.

    They are no buffers, so whatever empties, casts, moves or loads a module leaves them right. A tensor is
    kept for the next call, because a copy from the host makes a GPU wait and cannot be captured in a graph.
    A copy or a pickle of a module starts without any.
    """

    def __init__(self, cfg: RetNetConfig) -> None:
        self.cfg = cfg
        self._scale = default_scale(cfg.scale, cfg.head_key_dim)
        self._kept: dict[tuple[Numbers, torch.device, torch.dtype], Tensor] = {}
        self._frequencies: tuple[float, ...] = ()
        if cfg.position is not None:
            self._frequencies = tuple(rotary_frequencies(cfg.position, cfg.head_key_dim).tolist())

    def powers(self, log_decays: tuple[float, ...] | Tensor, x: Tensor) -> DecayPowers:
        """The powers of γ for a call with tokens ``x``."""
        dtype = state_dtype(x.dtype)
        if isinstance(log_decays, Tensor):
            return DecayPowers(log_decays.to(x.device), self._scale, dtype)
        return DecayPowers(self._tensor(log_decays, x, dtype), self._scale, dtype, log_decays)

    def rotation(self, positions: Tensor) -> Rotation | None:
        """The rotation of tokens at ``positions`` (B or 1, T); None without rotary positions."""
        cfg = self.cfg
        if cfg.position is None:
            return None
        if positions.device.type == "mps":  # it has no float64
            turns = rotary_turns(cfg.position, cfg.head_key_dim)
            return rotation_at(positions, self._tensor(turns, positions, torch.int64), cfg.position)
        frequencies = self._tensor(self._frequencies, positions, torch.float64)
        return rotation_at(positions, frequencies, cfg.position)

    def _tensor(self, numbers: Numbers, like: Tensor, dtype: torch.dtype) -> Tensor:
        """``numbers`` (N,) on the device of ``like``."""
        if not is_eager(like):  # a compiler takes them as literals, and a transform's tensors end with it
            return torch.tensor(numbers, dtype=dtype, device=like.device)
        key = (numbers, like.device, dtype)
        kept = self._kept.get(key)
        if kept is None:
            with torch.inference_mode(False):  # so that a later call may train
                kept = self._kept[key] = torch.tensor(numbers, dtype=dtype, device=like.device)
        return kept

    def __reduce__(self) -> tuple[type[Constants], tuple[RetNetConfig]]:
        return Constants, (self.cfg,)
