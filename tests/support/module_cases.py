"""Small decoders and layers with inputs, and what their tests compare."""

from __future__ import annotations

import torch
from retention_cases import normal
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retpop import MultiScaleRetention, RetNetConfig, RetNetDecoder, RetNetState

SMALL = {"embed_dim": 12, "num_heads": 2, "num_layers": 2, "ffn_dim": 16, "key_dim": 8, "value_dim": 20}


def small_config(**changes: object) -> RetNetConfig:
    """E = 12, H = 2, Dk = 4, Dv = 10, two layers; chunks of 16, so that short sequences have several."""
    return RetNetConfig(**{**SMALL, "chunk_size": 16, **changes})


def make_module(
    kind: type[nn.Module], cfg: RetNetConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> MultiScaleRetention | RetNetDecoder:
    """A layer or decoder in eval mode, its weights, biases and norms all random and of order one."""
    module = kind(cfg, dtype=torch.float64)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(module.named_parameters()):
            noise = normal(*parameter.shape, seed=1000 * seed + index)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 and "norm" not in name else 0.3
            parameter.copy_(scale * noise + (1.0 if name.endswith("norm.weight") else 0.0))
    return module.to(dtype).eval()


def make_decoder(dtype: torch.dtype = torch.float64, **changes: object) -> RetNetDecoder:
    """A small decoder whose configuration differs in `changes`."""
    return make_module(RetNetDecoder, small_config(**changes), dtype=dtype)


def random_state(module: nn.Module, rows: int, *, seed: int = 0, start: int = 5) -> RetNetState:
    """A state in the middle of something: random kv, a different position in each row."""
    empty = module.init_state(rows)
    kv = normal(*empty.kv.shape, seed=seed + 77, dtype=empty.kv.dtype)
    return RetNetState(kv, start + 7 * torch.arange(rows))


def assert_same_state(actual: RetNetState, expected: RetNetState, tolerance: float) -> None:
    """Positions are equal and kv agrees."""
    assert torch.equal(actual.position, expected.position)
    torch.testing.assert_close(actual.kv, expected.kv, rtol=tolerance, atol=tolerance)


def pop_block_by_block(
    module: MultiScaleRetention | RetNetDecoder,
    x: Tensor,
    x_pred: Tensor,
    state: RetNetState | None,
    *,
    block_size: int,
    offset: int,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, RetNetState]:
    """The meaning of `pop`: one plain pass a block; one a prediction, from a copy of the state before it."""
    num_blocks = x.shape[1] // block_size
    state = module.init_state(x.shape[0]) if state is None else state
    outs, preds = [x[:, :0]], [x_pred[:, :0]]
    for n in range(num_blocks + 1):
        if reset is not None and n < num_blocks:
            state = state.reset(reset[:, n])
        if 0 <= n - offset < x_pred.shape[1]:
            own = pytree.tree_map(torch.clone, state)
            pred, _ = module(x_pred[:, n - offset], own, mode="recurrent")
            preds.append(pred.unsqueeze(1))
        if n < num_blocks:
            out, state = module(x[:, n * block_size : (n + 1) * block_size], state, mode="recurrent")
            outs.append(out)
    return torch.cat(outs, dim=1), torch.cat(preds, dim=1), state
