"""REM's decoder, the whole of it: a pass, a training step and a step of imagination.

Eager, in a CUDA graph, and compiled; under bfloat16 autocast, weights in float32. The floor is that of the
matrix products: two operations for each weight and token, three times as many in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import retpop
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.ops import Sizes, training_sizes
from benchmarks.gpu.rows import Row

Pop = Callable[..., tuple[Tensor, Tensor, retpop.RetNetState]]


def measure(clock: Clock, *, compiled: bool) -> Iterator[Row]:
    """Every kind of work, each eagerly and in a graph; ``compiled`` or as it is."""
    sizes = training_sizes(clock)
    width = sizes.H * sizes.D
    cfg = retpop.RetNetConfig(
        embed_dim=width,
        num_heads=sizes.H,
        num_layers=5 if clock.on_gpu else 1,
        ffn_dim=4 * width,
        decay="log_spaced",
        dropout=0.0,
    )
    decoder = retpop.RetNetDecoder(cfg, device=clock.device)
    weights = sum(p.numel() for p in decoder.parameters() if p.dim() > 1)
    kinds = {
        "forward": (_forward(decoder, sizes, compiled), 2 * weights * sizes.B * sizes.tokens),
        "training step": (_training(decoder, sizes, compiled), 6 * weights * sizes.B * sizes.tokens),
        "imagination step": (
            _imagination(decoder, sizes, compiled),
            2 * weights * sizes.B * (sizes.L + sizes.M),
        ),
        "one token": (_token(decoder, sizes, compiled), 2 * weights * sizes.B),
    }
    for kind, (run, flops) in kinds.items():
        for mode, time in clock.modes().items():
            yield Row(
                part="compiled decoder" if compiled else "decoder",
                what=f"decoder, {kind}",
                shape=f"rem, {sizes.text}",
                dtype="bfloat16" if clock.on_gpu else "float32",
                way="compiled" if compiled else "",
                mode=mode,
                seconds=time(run),
                floor_flops=flops,
            )


def _autocast(device: torch.device) -> torch.autocast:
    # Without the cache of cast weights: a graph must cast them itself, since an optimiser changes them.
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def _maybe_compiled(function: Pop, compiled: bool, device: torch.device) -> Pop:
    if not compiled:
        return function
    return torch.compile(function, fullgraph=True, backend="inductor" if device.type == "cuda" else "eager")


def _inputs(decoder: retpop.RetNetDecoder, rows: int, blocks: int, s: Sizes) -> tuple[Tensor, Tensor]:
    device, width = decoder.layers[0].retention.log_decay.device, decoder.cfg.embed_dim
    x = torch.randn(rows, blocks * s.L, width, device=device)
    return x, torch.randn(rows, blocks, s.M, width, device=device)


def _forward(decoder: retpop.RetNetDecoder, s: Sizes, compiled: bool) -> Callable[[], object]:
    x, x_pred = _inputs(decoder, s.B, s.N, s)
    pop = _maybe_compiled(partial(decoder.pop, block_size=s.L, backend="triton"), compiled, x.device)

    @torch.no_grad()
    def run() -> object:
        with _autocast(x.device):
            return pop(x, x_pred)

    return run


def _training(decoder: retpop.RetNetDecoder, s: Sizes, compiled: bool) -> Callable[[], object]:
    """Forward, backward and AdamW."""
    x, x_pred = _inputs(decoder, s.B, s.N, s)
    pop = _maybe_compiled(partial(decoder.pop, block_size=s.L, backend="triton"), compiled, x.device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-5, capturable=x.is_cuda, fused=x.is_cuda)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(x.device):
            out, pred, _ = pop(x, x_pred)
            loss = out.float().square().mean() + pred.float().square().mean()
        loss.backward()
        optimizer.step()

    return run


def _imagination(decoder: retpop.RetNetDecoder, s: Sizes, compiled: bool) -> Callable[[], object]:
    x, x_pred = _inputs(decoder, s.B, 1, s)
    state = decoder.init_state(s.B)
    pop = _maybe_compiled(
        partial(decoder.pop, block_size=s.L, offset=1, backend="triton"), compiled, x.device
    )

    @torch.no_grad()
    def run() -> object:
        with _autocast(x.device):
            return pop(x, x_pred, state)

    return run


def _token(decoder: retpop.RetNetDecoder, s: Sizes, compiled: bool) -> Callable[[], object]:
    x = torch.randn(s.B, 1, decoder.cfg.embed_dim, device=decoder.layers[0].retention.log_decay.device)
    state = decoder.init_state(s.B)
    step = _maybe_compiled(partial(decoder, backend="triton"), compiled, x.device)

    @torch.no_grad()
    def run() -> object:
        with _autocast(x.device):
            return step(x, state)

    return run
