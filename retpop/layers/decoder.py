"""The RetNet decoder: a residual stack of blocks, each of retention and feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retpop._torch import is_plain
from retpop.arguments import check_tensor
from retpop.config import RetNetConfig
from retpop.layers.call import Call, Carry, run_in_parts, tokens_at_once
from retpop.layers.decay import LearnedDecay
from retpop.layers.dropout import dropout
from retpop.layers.norm import HeadNorm, residual_norm
from retpop.layers.prepare import Constants, Owner, prepare
from retpop.layers.retention import MultiScaleRetention, check_construction, empty_state
from retpop.ops.torch_backend import ACTIVATIONS
from retpop.state import RetNetState


class FeedForward(nn.Module):
    """Linear, activation, linear ("mlp"); or, with a gate, activation(x W_g) times x W_u, linear ("glu").

    Weights start Glorot-uniform and biases at zero (Glorot and Bengio 2010).
    """

    def __init__(
        self,
        cfg: RetNetConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.dropout = cfg.ffn, cfg.dropout
        self.activation_name = cfg.activation
        hidden = cfg.ffn_dim * (2 if cfg.ffn == "glu" else 1)
        self.in_proj = nn.Linear(cfg.embed_dim, hidden, bias=cfg.bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(cfg.ffn_dim, cfg.embed_dim, bias=cfg.bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: Glorot-uniform, separately for the gate's half; biases zero."""
        for weight in (*self.in_proj.weight.chunk(2 if self.kind == "glu" else 1), self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., E) to (..., E)."""
        activation = ACTIVATIONS[self.activation_name]
        hidden = self.in_proj(x)
        if self.kind == "glu":
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        if self.dropout:
            hidden = dropout(hidden, self.dropout, self.training)
        return self.out_proj(hidden)

    def extra_repr(self) -> str:
        """The kind and activation, for ``print(model)``."""
        return f"{self.kind}, {self.activation_name}, dropout={self.dropout}"


class RetNetBlock(nn.Module):
    """x + f(norm(x)) with f the retention, then the feed-forward; x + norm(f(x)) with ``norm_first=False``.

    Source: RetNet, arXiv 2307.08621, section 2.3; norm_first=False as in yet-another-retnet.
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
        self.norm_first, self.dropout = cfg.norm_first, cfg.dropout
        self.retention = MultiScaleRetention(cfg, device, dtype, layer=layer)
        self.retention_norm = residual_norm(cfg, device, dtype)
        self.feed_forward = FeedForward(cfg, device, dtype)
        self.feed_forward_norm = residual_norm(cfg, device, dtype)

    def forward(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Map (B, T, E) and the layer's state to outputs of the call's readers and the new state."""
        readers = carry.call.readers
        if self.norm_first:
            mixed, carry = self.retention(self.retention_norm(x), carry)
            x = readers(x) + self._drop(mixed)
            return x + self._drop(self.feed_forward(self.feed_forward_norm(x))), carry
        mixed, carry = self.retention(x, carry)
        x = readers(x) + self.retention_norm(self._drop(mixed))
        return x + self.feed_forward_norm(self._drop(self.feed_forward(x))), carry

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training) if self.dropout else x


PLAIN_PARTS = {
    *(RetNetBlock, MultiScaleRetention, LearnedDecay, HeadNorm, FeedForward),
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.ModuleList),
}


class RetNetDecoder(nn.Module):
    """``cfg.num_layers`` layers over a residual stream of width E, without embeddings and heads.

    Every layer draws its own initial weights, see `MultiScaleRetention` and `FeedForward`. Layers may be
    removed later (``decoder.layers = decoder.layers[:2]``); states then have the remaining number of layers.

    Args:
        cfg: the configuration.
        device, dtype: of the weights.
        checkpoint_activations: keep only the input of each layer for backward and recompute the rest. This
            costs one more forward pass, and memory hardly grows with the number of layers. Results are the
            same. The attribute can also be set later.

    Example:
        >>> cfg = RetNetConfig(embed_dim=64, num_heads=4, num_layers=2)
        >>> decoder = RetNetDecoder(cfg)
        >>> out, state = decoder(torch.randn(1, 100, 64))            # a prompt, in chunks
        >>> out, state = decoder(torch.randn(1, 1, 64), state)       # one token more

    Source: RetNet, arXiv 2307.08621, section 2.
    """

    def __init__(
        self,
        cfg: RetNetConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        check_construction("RetNetDecoder", cfg, dtype)
        if not isinstance(checkpoint_activations, bool):
            raise TypeError(
                f"RetNetDecoder: checkpoint_activations is {checkpoint_activations!r}; it must be a bool."
            )
        self.cfg = cfg
        self.checkpoint_activations = checkpoint_activations
        self.layers = nn.ModuleList(RetNetBlock(cfg, device, dtype, layer=n) for n in range(cfg.num_layers))
        self.final_norm = residual_norm(cfg, device, dtype) if cfg.final_norm else nn.Identity()
        self._constants = Constants(cfg)
        self._log_decays = cfg.log_decays()

    def forward(
        self,
        x: Tensor,
        state: RetNetState | None = None,
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
            state: carried from what came before; None for the start of a sequence.
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
        where = "RetNetDecoder()" if x_pred is None else "RetNetDecoder.pop()"
        if not len(self.layers):
            raise ValueError(f"{where}: layers is empty; a decoder needs at least one.")
        tokens, call, position = prepare(
            Owner(where, cast(Sequence[nn.Module], self.layers), self._log_decays, self._constants),
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
        out, kv = self._run(tokens, None if state is None else state.kv, call)
        return *call.outputs(out), RetNetState(kv, position)

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
            state: carried from what came before; None for the start of a sequence.
            block_size, offset, reset, context_parallel, backend: as in `retpop.pop_retention`. Positions
                start over at 0 where ``reset`` does.
            main_out: which tokens of the sequence to return: "all", or "last" for the last of each block.
                The last layer then computes queries, gate, output and feed-forward for these and for the
                predictions only.

        Returns:
            out (B, T, E), or (B, N, E) with ``main_out="last"``; pred (B, P, M, E); and the state after the
            last block.

        Raises:
            TypeError, ValueError, RuntimeError: as `retpop.pop_retention`.

        Source: REM, arXiv 2402.05643, section 3.2.
        """
        check_tensor("RetNetDecoder.pop()", "x_pred", x_pred)
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

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RetNetState:
        """The state before any token: zeros, at position 0.

        Args:
            batch_size: rows B; with packed sequences, their number S.
            device: None: that of the decoder's weights. Pass it if the weights are offloaded.
            dtype: None or the dtype of the decoder's states: float64 in a float64 decoder, else float32.

        Raises:
            TypeError, ValueError: batch_size is not a count, or dtype is not that of the decoder's states.
        """
        where = "RetNetDecoder.init_state()"
        return empty_state(where, self.cfg, self, len(self.layers), batch_size, device, dtype)

    def extra_repr(self) -> str:
        """The configuration, for ``print(model)``."""
        return self.cfg.describe()

    def _run(self, x: Tensor, kv: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        most = tokens_at_once(self.cfg, x)
        if most is None or call.slices is not None or not self._parts_are_plain():
            return self._run_layers(x, kv, call)
        return run_in_parts(self._run_layers, x, kv, call, most)

    def _parts_are_plain(self) -> bool:
        """Whether no hook, dropout or replaced module would notice that tokens come in several calls."""
        inside = (part for child in self.children() for part in child.modules())
        dropping = self.training and self.cfg.dropout
        return not dropping and all(
            type(part) in PLAIN_PARTS and is_plain(part, type(part)) for part in inside
        )

    def _run_layers(self, x: Tensor, kv: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        calls = [*[call.for_inner_layers()] * (len(self.layers) - 1), call]
        for index, (layer, own_call) in enumerate(zip(self.layers, calls, strict=True)):
            carry = Carry.of(own_call, None if kv is None else kv[index])
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, carry = checkpoint(layer, x, carry, use_reentrant=False)
            else:
                x, carry = layer(x, carry)
            states.append(cast(Tensor, carry.kv))
        return self.final_norm(x), torch.stack(states)
