"""FSDP and DDP in their usual forms, POP included: the gradients of one model that sees the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from retpop import RetNetConfig, RetNetDecoder, RetNetState

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

ROWS = 2  # of each rank
WEIGHTS = torch.linspace(-1, 1, 16)  # makes the loss depend on every output

Run = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, RetNetState]]


def loss_of(*outs: Tensor) -> Tensor:
    return sum(((out.float() * WEIGHTS) ** 2).mean() for out in outs)


def sequence(model: nn.Module, x: Tensor, x_pred: Tensor) -> tuple[Tensor, RetNetState]:
    out, state = model(x)
    return loss_of(out), state


def with_a_state(model: nn.Module, x: Tensor, x_pred: Tensor) -> tuple[Tensor, RetNetState]:
    """The gradient of the first half comes through the state alone."""
    _, state = model(x[:, :10])
    out, state = model(x[:, 10:], state)
    return loss_of(out), state


def state_alone(model: nn.Module, x: Tensor, x_pred: Tensor) -> tuple[Tensor, RetNetState]:
    _, state = model(x)
    return state.kv.square().mean(), state


def pop(model: nn.Module, x: Tensor, x_pred: Tensor) -> tuple[Tensor, RetNetState]:
    options = {"block_size": 5, "main_out": "last"}
    if isinstance(model, RetNetDecoder):
        out, pred, state = model.pop(x, x_pred, **options)
    else:
        out, pred, state = model(x, x_pred=x_pred, **options)
    return loss_of(out, pred), state


RUNS: list[Run] = [sequence, with_a_state, state_alone, pop]
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
BFLOAT16_OUT = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
FLOAT32_OUT = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)


def make_decoder() -> RetNetDecoder:
    torch.manual_seed(0)
    cfg = RetNetConfig(embed_dim=16, num_heads=2, num_layers=2, head_norm_affine=True, learn_decay=True)
    return RetNetDecoder(cfg)


def sharded(decoder: RetNetDecoder, how: str, policy: MixedPrecisionPolicy) -> nn.Module:
    decoder = copy.deepcopy(decoder)
    if how == "ddp":
        return DistributedDataParallel(decoder)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in decoder.layers if how != "root" else ():
        fully_shard(layer.retention if how == "retention, root" else layer, mesh=mesh, mp_policy=policy)
    return decoder if how == "layers" else fully_shard(decoder, mesh=mesh, mp_policy=policy)


def gradients_beside(model: nn.Module, single: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each parameter's gradient, its shards put together, and the one that the single model has."""
    expected = {name: parameter.grad for name, parameter in single.named_parameters()}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if expected[name] is None or not expected[name].any():
            continue
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        yield name, gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient, expected[name]


def check(rank: int, world: int, file: str, cases: list[tuple[str, MixedPrecisionPolicy, float]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    decoder, own = make_decoder(), slice(ROWS * rank, ROWS * rank + ROWS)
    x, x_pred = torch.randn(ROWS * world, 20, 16), torch.randn(ROWS * world, 4, 3, 16)
    for run in RUNS:
        single = copy.deepcopy(decoder)
        run(single, x, x_pred)[0].backward()
        for how, policy, tolerance in cases:
            if how == "ddp" and run in (with_a_state, state_alone):
                continue  # DDP wants one forward pass before a backward, and a loss of every parameter
            model = sharded(decoder, how, policy)
            loss, state = run(model, x[own], x_pred[own])
            loss.backward()
            assert state.kv.dtype is torch.float32
            for name, gradient, expected in gradients_beside(model, single):
                error = (gradient - expected).norm() / expected.norm()
                assert error < tolerance, f"{run.__name__}, {how}, {policy}: {name} is off by {error:.2g}"
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, [("layers, root", BFLOAT16_OUT, 0.1), ("root", FLOAT32_OUT, 0.1), ("layers", BFLOAT16, 0.1)]),
        (
            2,
            [
                ("layers, root", MixedPrecisionPolicy(), 1e-4),
                ("root", MixedPrecisionPolicy(), 1e-4),
                ("retention, root", BFLOAT16, 0.1),
                ("ddp", MixedPrecisionPolicy(), 1e-4),
            ],
        ),
    ],
)
def test_gradients_are_those_of_one_model(world: int, cases: list, tmp_path: Path) -> None:
    """Each rank has its own rows; where the layers alone are sharded, that is all of a decoder."""
    multiprocessing.spawn(check, (world, str(tmp_path / "meeting"), cases), nprocs=world)
