"""The RetNet decoder: a residual stack of retention and feed-forward layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retpop.config import RetNetConfig
from retpop.layers.block import RetNetBlock
from retpop.layers.calls import Call
from retpop.layers.norm import residual_norm
from retpop.layers.parts import run_in_parts, tokens_at_once
from retpop.layers.prepare import Owner, check_construction, prepare_pop, prepare_sequence
from retpop.layers.retention import empty_state
from retpop.ops.rows import join_row, split_row
from retpop.state import RetNetState


class RetNetDecoder(nn.Module):
    """``cfg.num_layers`` blocks over a residual stream of width E; embeddings and heads are the caller's.

    Every layer draws its own initial weights (`MultiScaleRetention`, `FeedForward` say how).

    Args:
        cfg: the configuration.
        device, dtype: of the weights.
        checkpoint_activations: keep for backward only what goes into each layer, and compute the rest again:
            a forward pass more, for memory that hardly grows with the number of layers. An attribute that can
            be set later, too; the results are the same.

    Example:
        >>> cfg = RetNetConfig(embed_dim=64, num_heads=4, num_layers=2, ffn_dim=256)
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
        self.layers = nn.ModuleList(RetNetBlock(cfg, device, dtype) for _ in range(cfg.num_layers))
        self.final_norm = residual_norm(cfg, device, dtype) if cfg.final_norm else nn.Identity()

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
            state: carried from what came before; None for the start of a sequence.
            mode, backend: as in `retpop.retention`.
            chunk_size: as there; None: ``cfg.chunk_size``.
            cu_seqlens: (S + 1,), boundaries of S packed sequences; B is then 1 and the state has S rows.

        Returns:
            out (B, T, E) and the state after the last token.

        Raises:
            TypeError, ValueError, RuntimeError: as `retpop.retention`.
        """
        call, position = prepare_sequence(
            self._owner("RetNetDecoder()"),
            x,
            state,
            mode=mode,
            chunk_size=chunk_size,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        out, kv = self._run(x, state, call)
        return out, RetNetState(kv, position)

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
            state: carried from what came before; None for the start of a sequence.
            block_size, offset, reset, backend: as in `retpop.pop_retention`. Positions start over at 0
                where ``reset`` does.
            main_out: the tokens of the sequence that come out: "all", or "last", the last one of each block.
                The last layer then computes queries, gate, output and feed-forward for these and for the
                predictions only.

        Returns:
            out (B, T, E), or (B, N, E) with ``main_out="last"``; pred (B, P, M, E); and the state after the
            last block.

        Raises:
            TypeError, ValueError, RuntimeError: as `retpop.pop_retention`.

        Source: REM, arXiv 2402.05643, section 3.2.
        """
        call, position = prepare_pop(
            self._owner("RetNetDecoder.pop()"),
            x,
            x_pred,
            state,
            block_size=block_size,
            offset=offset,
            reset=reset,
            main_out=main_out,
            backend=backend,
        )
        row, kv = self._run(join_row(x, x_pred), state, call)
        return *split_row(row, call.spec.predictions), RetNetState(kv, position)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RetNetState:
        """The state before any token: zeros, at position 0.

        Args:
            batch_size: rows B; with packed sequences, their number S.
            device: None: the decoder's.
            dtype: float32 or float64; None: what the decoder takes, float64 in a float64 one, else float32.

        Raises:
            TypeError, ValueError: batch_size is no count, or no state has that dtype.
        """
        return empty_state(self._owner("RetNetDecoder.init_state()"), batch_size, device, dtype)

    def extra_repr(self) -> str:
        """The configuration, for ``print(model)``."""
        return self.cfg.describe()

    def _run(self, x: Tensor, state: RetNetState | None, call: Call) -> tuple[Tensor, Tensor]:
        kv = None if state is None else state.kv
        most = tokens_at_once(self, self.cfg, x)
        if most is None:
            return self._run_layers(x, kv, call)
        return run_in_parts(self._run_layers, x, kv, call, most)

    def _run_layers(self, x: Tensor, kv: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        calls = [*[call.for_inner_layers()] * (self.cfg.num_layers - 1), call]
        for index, (layer, own_call) in enumerate(zip(self.layers, calls, strict=True)):
            own_kv = None if kv is None else kv[index]
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, own_kv = checkpoint(layer, x, own_kv, own_call, use_reentrant=False)
            else:
                x, own_kv = layer(x, own_kv, own_call)
            states.append(own_kv)
        return self.final_norm(x), torch.stack(states)

    def _owner(self, where: str) -> Owner:
        first = cast(RetNetBlock, self.layers[0]).retention
        return Owner(
            where, self.cfg, self.cfg.num_layers, first.out_proj.weight, first.log_decay, first.frequencies
        )
