"""Multi-scale retention as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retpop._torch import is_plain
from retpop.arguments import INPUT_DTYPES, as_int, check_tensor, state_dtype
from retpop.config import RetNetConfig
from retpop.decay import check_log_decays
from retpop.layers.call import Call, Carry
from retpop.layers.decay import LearnedDecay
from retpop.layers.dropout import dropout
from retpop.layers.norm import HeadNorm
from retpop.layers.prepare import Constants, Owner, prepare, with_log_decays
from retpop.ops.torch_backend import ACTIVATIONS
from retpop.state import RetNetState


class MultiScaleRetention(nn.Module):
    """Retention with projections, rotary positions, a norm per head, and a gate.

        out = (gate_activation(x W_g) ⊙ head_norm(retention(x W_q, x W_k, x W_v))) W_o

    Every layer draws its own initial weights: queries, keys, values and gate Glorot-uniform with gain
    2^-2.5, the output projection with gain 2^-1, biases zero, as RetNet's released code (torchscale) does.

    Args:
        cfg: the configuration; a layer ignores ``num_layers`` and the fields of the feed-forward and the
            residual stream.
        device, dtype: of the weights. The decay keeps double precision when the module is cast; a learned one
            is a float32 parameter, or a float64 one in a float64 layer.
        layer: index of the layer, if ``cfg.decay`` has one entry per layer.

    Source: RetNet, arXiv 2307.08621, section 2.2, equation 8.
    """

    def __init__(
        self,
        cfg: RetNetConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layer: int = 0,
    ) -> None:
        super().__init__()
        check_construction("MultiScaleRetention", cfg, dtype)
        self.cfg = cfg
        key_dim, value_dim = cfg.num_heads * cfg.head_key_dim, cfg.num_heads * cfg.head_value_dim
        self.widths = (key_dim, key_dim, value_dim, value_dim)
        self.qkvg_proj = nn.Linear(cfg.embed_dim, sum(self.widths), bias=cfg.bias, device=device, dtype=dtype)
        self.head_norm = HeadNorm(cfg, device, dtype)
        self.out_proj = nn.Linear(value_dim, cfg.embed_dim, bias=cfg.bias, device=device, dtype=dtype)
        self._constants = Constants(cfg)
        self._log_decays = cfg.log_decays(layer)
        self.decay = LearnedDecay(self._log_decays, device, dtype) if cfg.learn_decay else None
        self._shown: Tensor | None = None  # the tensor that `log_decay` returned, which its reader may change
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
        if self.decay is not None:
            self.decay.reset_parameters()

    @property
    def log_decay(self) -> Tensor:
        """ln γ of each head, (H,), on the CPU; float64 in a float64 layer, else float32.

        Assign a tensor to it, or write into it, to give the layer its own decay: each at most 0, -inf
        allowed. A learned decay is returned as a copy and can be assigned: finite and below 0.
        """
        dtype = parameter_kind(self)[1]
        if self.decay is not None:
            return self.decay().detach().to("cpu", dtype)
        if self._shown is None or self._shown.dtype != dtype:
            self._shown = torch.tensor(self._current_log_decays(), dtype=dtype, device="cpu")
        return self._shown

    @log_decay.setter
    def log_decay(self, value: Tensor) -> None:
        check_tensor("MultiScaleRetention", "log_decay", value)
        if value.requires_grad:
            raise ValueError(
                "MultiScaleRetention: log_decay requires a gradient; assign numbers (learn_decay=True of "
                "RetNetConfig makes a decay that learns)."
            )
        log_decays = self._checked(value.tolist())
        if self.decay is not None:
            self.decay.start(log_decays)
            return
        self._log_decays = log_decays
        self._shown = None

    def forward(
        self,
        x: Tensor,
        state: RetNetState | Carry | None = None,
        *,
        x_pred: Tensor | None = None,
        block_size: int | None = None,
        offset: int = 0,
        reset: Tensor | None = None,
        main_out: str = "all",
        mode: str = "chunkwise",
        chunk_size: int | None = None,
        cu_seqlens: Tensor | None = None,
        context_parallel: object = None,
        backend: str = "auto",
    ) -> tuple[Any, ...]:
        """Run a sequence, or with ``x_pred`` the same as `pop`.

        Args:
            x: (B, T, E); T may be 0.
            state: carried from what came before, with layers = 1; None for the start of a sequence. (Inside a
                decoder: the layer's state with the prepared call; the result has the same form.)
            x_pred, block_size, offset, main_out: see `pop`; without x_pred none of them is allowed.
            reset: (B, T), bool: where reset[:, t], state and position are 0 before token t, see
                `retpop.retention`; with x_pred (B, N), see `pop`.
            mode, context_parallel, backend: as in `retpop.retention`.
            chunk_size: as there; None: ``cfg.chunk_size``.
            cu_seqlens: (S + 1,), boundaries of S packed sequences; B is then 1 and the state has S rows.

        Returns:
            out (B, T, E) and the state after the last token; with ``x_pred`` as `pop`.

        Raises:
            TypeError, ValueError, RuntimeError: as `retpop.retention`.
        """
        if isinstance(state, Carry):
            out, kv = self._run(x, state.kv, state.call)
            return out, Carry.of(state.call, kv)
        where = "MultiScaleRetention()" if x_pred is None else "MultiScaleRetention.pop()"
        tokens, call, position = prepare(
            Owner(where, [self], self._log_decays, self._constants),
            x,
            x_pred,
            state,
            block_size=block_size,
            offset=offset,
            reset=reset,
            main_out=main_out,
            mode=mode,
            chunk_size=chunk_size,
            cu_seqlens=cu_seqlens,
            context_parallel=context_parallel,
            backend=backend,
        )
        out, kv = self._run(tokens, None if state is None else state.kv[0], call)
        return *call.outputs(out), RetNetState(kv.unsqueeze(0), position)

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
        context_parallel: object = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, RetNetState]:
        """Run a sequence of blocks, and prediction blocks that branch off at their boundaries.

        Args:
            x: (B, T, E), N = T / block_size blocks.
            x_pred: (B, P, M, E).
            state: carried from what came before, with layers = 1; None for the start of a sequence.
            block_size, offset, reset, context_parallel, backend: as in `retpop.pop_retention`. Positions
                start over at 0 where ``reset`` does.
            main_out: which tokens of the sequence to return, see `RetNetDecoder.pop`.

        Returns:
            out (B, T, E), or (B, N, E) with ``main_out="last"``; pred (B, P, M, E); and the state after the
            last block.

        Raises:
            TypeError, ValueError, RuntimeError: as `retpop.pop_retention`.

        Source: REM, arXiv 2402.05643, section 3.2.
        """
        check_tensor("MultiScaleRetention.pop()", "x_pred", x_pred)
        return self(  # so that hooks, wrappers and compilers see it
            x,
            state,
            x_pred=x_pred,
            block_size=block_size,
            offset=offset,
            reset=reset,
            main_out=main_out,
            context_parallel=context_parallel,
            backend=backend,
        )

    def _run(self, x: Tensor, kv: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """The layer itself: (B, T, E) to outputs of the call's readers, and the state."""
        call = with_log_decays(call, self._current_log_decays(), self._constants, x)
        q, k, v, gate = (y.unflatten(-1, (self.cfg.num_heads, -1)) for y in self._project(x, call))
        q, k = call.rotate(q, k, self.cfg.position)
        out, kv = call.retention(q, k, v, kv)
        if self.cfg.dropout:
            out = dropout(out, self.cfg.dropout, self.training)
        return self.out_proj(self._gated(out, gate, call).flatten(-2)), kv

    def _project(self, x: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Queries and gate of the readers, keys and values of all tokens."""
        readers = call.readers(x)
        if readers is x:
            return self.qkvg_proj(x).split(self.widths, dim=-1)
        if not is_plain(self.qkvg_proj, nn.Linear):
            q, k, v, gate = self.qkvg_proj(x).split(self.widths, dim=-1)
            return call.readers(q), k, v, call.readers(gate)
        weights = self.qkvg_proj.weight.split(self.widths)
        biases = [None] * 4 if self.qkvg_proj.bias is None else self.qkvg_proj.bias.split(self.widths)
        tokens = (readers, x, x, readers)
        return tuple(F.linear(*part) for part in zip(tokens, weights, biases, strict=True))

    def _gated(self, x: Tensor, gate: Tensor, call: Call) -> Tensor:
        """The gate's activation times each head's output (..., H, Dv) normalised, in gate's dtype."""
        norm, activation = self.head_norm, self.cfg.gate_activation
        if not is_plain(norm, HeadNorm):
            return (ACTIVATIONS[activation](gate) * norm(x)).to(gate.dtype)
        return call.backend.gated_norm(
            x, gate, norm.weight, norm.bias, kind=norm.kind, eps=norm.eps, activation=activation
        )

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RetNetState:
        """The state before any token, layers = 1; see `RetNetDecoder.init_state`."""
        return empty_state("MultiScaleRetention.init_state()", self.cfg, self, 1, batch_size, device, dtype)

    def extra_repr(self) -> str:
        """The configuration, for ``print(model)``."""
        return self.cfg.describe()

    def _current_log_decays(self) -> tuple[float, ...] | Tensor:
        """The layer's log-decays with changes written into `log_decay`; a tensor if learned or compiled."""
        if self.decay is not None:
            return self.decay()
        if self._shown is None:
            return self._log_decays
        if torch.compiler.is_compiling():
            return self._shown
        shown = self._shown.tolist()
        if shown != torch.tensor(self._log_decays, dtype=self._shown.dtype, device="cpu").tolist():
            self._log_decays = self._checked(shown)
        return self._log_decays

    def _checked(self, log_decays: object) -> tuple[float, ...]:
        return check_log_decays("MultiScaleRetention", "log_decay", log_decays, self.cfg.num_heads)


def check_construction(where: str, cfg: RetNetConfig, dtype: torch.dtype | None) -> None:
    """Check the arguments of a layer or a decoder."""
    if not isinstance(cfg, RetNetConfig):
        raise TypeError(f"{where}: cfg is {type(cfg).__name__}; it must be a retpop.RetNetConfig.")
    if dtype is not None and dtype not in INPUT_DTYPES:
        raise TypeError(f"{where}: dtype is {dtype!r}; it must be float64, float32, float16 or bfloat16.")


def parameter_kind(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device of a module's parameters, "meta" if all are there, and the dtype of its states."""
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    for parameter in sorted(parameters, key=lambda parameter: parameter.is_meta):
        return parameter.device, state_dtype(parameter.dtype)
    return torch.device("cpu"), torch.float32


def empty_state(
    where: str,
    cfg: RetNetConfig,
    module: nn.Module,
    num_layers: int,
    batch_size: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> RetNetState:
    """A state of zeros for a module's layers and heads."""
    rows = as_int(where, "batch_size", batch_size)
    if rows < 0:
        raise ValueError(f"{where}: batch_size is {rows}; it must be at least 0.")
    own_device, own_dtype = parameter_kind(module)
    if dtype not in (None, own_dtype):
        raise TypeError(
            f"{where}: dtype is {dtype!r}; it must be {own_dtype} "
            "(states are float64 where weights are, else float32)."
        )
    device = own_device if device is None else device
    shape = (num_layers, rows, cfg.num_heads, cfg.head_key_dim, cfg.head_value_dim)
    kv = torch.zeros(shape, device=device, dtype=own_dtype)
    return RetNetState(kv, torch.zeros(rows, dtype=torch.int64, device=device))
