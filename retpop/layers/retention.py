"""Multi-scale retention as a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retpop.config import RetNetConfig
from retpop.decay import resolve_decay
from retpop.layers.calls import Call
from retpop.layers.dropout import dropout
from retpop.layers.norm import HeadNorm
from retpop.layers.prepare import Owner, check_construction, prepare_pop, prepare_sequence
from retpop.ops.dtypes import state_dtype
from retpop.ops.rows import join_row, split_row
from retpop.position import rotary_frequencies
from retpop.state import RetNetState


class MultiScaleRetention(nn.Module):
    """Retention with projections, rotary positions, a norm per head, and a gate.

        out = (gate_activation(x W_g) ⊙ head_norm(retention(x W_q, x W_k, x W_v))) W_o

    Every layer draws its own initial weights: queries, keys, values and gate Glorot-uniform with gain
    2^-2.5, the output projection with gain 2^-1, biases zero, as RetNet's released code (torchscale) does.

    Args:
        cfg: the configuration; a layer reads all of it but ``num_layers`` and what shapes the feed-forward
            and the residual stream.
        device, dtype: of the weights. The decay stays in float32 (float64 in a float64 model) whatever the
            module is cast to.

    Source: RetNet, arXiv 2307.08621, section 2.2, equation 8.
    """

    log_decay: Tensor
    frequencies: Tensor | None

    def __init__(
        self,
        cfg: RetNetConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_construction("MultiScaleRetention", cfg, dtype)
        self.cfg = cfg
        key_dim, value_dim = cfg.num_heads * cfg.head_key_dim, cfg.num_heads * cfg.head_value_dim
        self.widths = (key_dim, key_dim, value_dim, value_dim)
        self.qkvg_proj = nn.Linear(cfg.embed_dim, sum(self.widths), bias=cfg.bias, device=device, dtype=dtype)
        self.head_norm = HeadNorm(cfg, device, dtype)
        self.out_proj = nn.Linear(value_dim, cfg.embed_dim, bias=cfg.bias, device=device, dtype=dtype)
        self.register_buffer("log_decay", None, persistent=False)
        self.register_buffer("frequencies", None, persistent=False)
        self._set_constants()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights (see the class)."""
        for weight in self.qkvg_proj.weight.split(self.widths):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)
        for linear in (self.qkvg_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.head_norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: RetNetState | None = None,
        *,
        mode: str = "chunkwise",
        chunk_size: int | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, RetNetState]:
        """Run a sequence.

        Args:
            x: (B, T, E); T may be 0.
            state: carried from what came before, with layers = 1; None for the start of a sequence.
            mode, backend: as in `retpop.retention`.
            chunk_size: as there; None: ``cfg.chunk_size``.
            cu_seqlens: (S + 1,), boundaries of S packed sequences; B is then 1 and the state has S rows.

        Returns:
            out (B, T, E) and the state after the last token.

        Raises:
            TypeError, ValueError, RuntimeError: as `retpop.retention`.
        """
        call, position = prepare_sequence(
            self._owner("MultiScaleRetention()"),
            x,
            state,
            mode=mode,
            chunk_size=chunk_size,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        out, kv = self.mix(x, None if state is None else state.kv[0], call)
        return out, RetNetState(kv.unsqueeze(0), position)

    def pop(
        self,
        x: Tensor,
        x_pred: Tensor,
        state: RetNetState | None = None,
        *,
        block_size: int,
        offset: int = 0,
        reset: Tensor | None = None,
        main_out: str = "all",
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, RetNetState]:
        """Run a sequence of blocks, and prediction blocks that branch off at their boundaries.

        Args:
            x: (B, T, E), N = T / block_size blocks.
            x_pred: (B, P, M, E).
            state: carried from what came before, with layers = 1; None for the start of a sequence.
            block_size, offset, reset, backend: as in `retpop.pop_retention`. Positions start over at 0
                where ``reset`` does.
            main_out: the tokens of the sequence that come out, see `RetNetDecoder.pop`.

        Returns:
            out (B, T, E), or (B, N, E) with ``main_out="last"``; pred (B, P, M, E); and the state after the
            last block.

        Raises:
            TypeError, ValueError, RuntimeError: as `retpop.pop_retention`.

        Source: REM, arXiv 2402.05643, section 3.2.
        """
        call, position = prepare_pop(
            self._owner("MultiScaleRetention.pop()"),
            x,
            x_pred,
            state,
            block_size=block_size,
            offset=offset,
            reset=reset,
            main_out=main_out,
            backend=backend,
        )
        row, kv = self.mix(join_row(x, x_pred), None if state is None else state.kv[0], call)
        return *split_row(row, call.spec.predictions), RetNetState(kv.unsqueeze(0), position)

    def mix(self, x: Tensor, kv: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """The layer itself, of a call that has been prepared: (B, T, E) and a state to the same two.

        What comes out is of the call's readers.
        """
        q, k, v, gate = (y.unflatten(-1, (self.cfg.num_heads, -1)) for y in self._project(x, call.readers(x)))
        q, k = call.rotate(q, k, self.cfg.position)
        out, kv = call.retain(q, k, v, kv)
        out = dropout(out, self.cfg.dropout, self.training)
        out = self.head_norm.gated(out, gate, self.cfg.gate_activation, call.backend)
        return self.out_proj(out.flatten(-2)), kv

    def _project(self, x: Tensor, readers: Tensor) -> tuple[Tensor, ...]:
        """Queries of the tokens that read, keys and values of all, and a gate for those that read."""
        if readers is x:
            return self.qkvg_proj(x).split(self.widths, dim=-1)
        weights = self.qkvg_proj.weight.split(self.widths)
        biases = [None] * 4 if self.qkvg_proj.bias is None else self.qkvg_proj.bias.split(self.widths)
        tokens = (readers, x, x, readers)
        return tuple(F.linear(*part) for part in zip(tokens, weights, biases, strict=True))

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RetNetState:
        """The state before any token, layers = 1; see `RetNetDecoder.init_state`."""
        return empty_state(self._owner("MultiScaleRetention.init_state()"), batch_size, device, dtype)

    def extra_repr(self) -> str:
        """The configuration, for ``print(model)``."""
        return self.cfg.describe()

    def _owner(self, where: str) -> Owner:
        return Owner(where, self.cfg, 1, self.out_proj.weight, self.log_decay, self.frequencies)

    def _set_constants(self) -> None:
        weight, cfg = self.out_proj.weight, self.cfg
        decay = resolve_decay(cfg.decay, cfg.num_heads, state_dtype(weight.dtype))
        self.log_decay = decay.to(weight.device)
        if cfg.position is not None:
            self.frequencies = rotary_frequencies(cfg.position, cfg.head_key_dim).to(weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiScaleRetention:
        # Whatever casts or moves a module goes through here. Constants follow the device but not the dtype:
        # in bfloat16 a decay of 1 - 1/512 would be 1, and positions above 256 would not exist.
        super()._apply(fn, recurse)
        self._set_constants()
        return self


def empty_state(
    owner: Owner, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> RetNetState:
    """A state of zeros for ``owner``'s layers and heads."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"{owner.where}: batch_size is {type(batch_size).__name__}; it must be an int.")
    if batch_size < 0:
        raise ValueError(f"{owner.where}: batch_size is {batch_size}; it must be at least 0.")
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(
            f"{owner.where}: dtype is {dtype}; a state is float32, or float64 in a float64 model."
        )
    cfg = owner.cfg
    device = owner.weight.device if device is None else device
    shape = (owner.num_layers, batch_size, cfg.num_heads, cfg.head_key_dim, cfg.head_value_dim)
    kv = torch.zeros(shape, device=device, dtype=dtype or state_dtype(owner.weight.dtype))
    return RetNetState(kv, torch.zeros(batch_size, dtype=torch.int64, device=device))
