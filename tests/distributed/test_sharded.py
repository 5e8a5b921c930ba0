"""FSDP and DDP in their usual forms, POP included: what one process with the whole batch gives."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ranks, ranks_of
from torch import Tensor, nn

from retpop import RetNetConfig, RetNetDecoder, RetNetState
from retpop.models import RetNetLM, RetNetLMConfig

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

ROWS = 2  # of each rank

EXAMPLES = Path(__file__).parents[2] / "examples" / "language_model"
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


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks_of(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks_of(1, tmp_path_factory.mktemp("rank")) as ranks:
        yield ranks


def check_gradients(cases: list[tuple[str, MixedPrecisionPolicy, float]]) -> None:
    world, own = dist.get_world_size(), slice(ROWS * dist.get_rank(), ROWS * dist.get_rank() + ROWS)
    decoder = make_decoder()
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


def test_gradients_are_those_of_one_model(two_ranks: Ranks) -> None:
    """Each rank has its own rows."""
    exact = MixedPrecisionPolicy()
    cases = [("layers, root", exact, 1e-4), ("root", exact, 1e-4), ("retention, root", BFLOAT16, 0.1)]
    two_ranks.run(check_gradients, [*cases, ("ddp", exact, 1e-4)])


def test_mixed_precision_casts_no_state(one_rank: Ranks) -> None:
    """On one rank, where the layers alone may be sharded: all parameters of a decoder are in them."""
    one_rank.run(
        check_gradients,
        [("layers, root", BFLOAT16_OUT, 0.1), ("root", FLOAT32_OUT, 0.1), ("layers", BFLOAT16, 0.1)],
    )


def make_language_model() -> RetNetLM:
    torch.manual_seed(0)
    decoder = RetNetConfig(embed_dim=16, num_heads=2, num_layers=2)
    model = RetNetLM(RetNetLMConfig(vocab_size=11, decoder=decoder, tie_embeddings=True)).double()
    model.decoder.checkpoint_activations = True
    return model


def text(batch: int) -> Tensor:
    return torch.randint(11, (4, 21), generator=torch.Generator().manual_seed(batch))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor, **options: object
) -> None:
    model(tokens, targets=targets, **options)[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def trained_alone(steps: int) -> RetNetLM:
    """A model that one process has trained on whole batches."""
    model = make_language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in range(steps):
        train_step(model, optimizer, text(batch)[:, :-1], text(batch)[:, 1:])
    return model


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    wanted = dict(expected.named_parameters())
    for name, weight in model.named_parameters():
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        torch.testing.assert_close(whole, wanted[name.removeprefix("module.")], rtol=1e-9, atol=1e-9)


def check_steps(folder: str) -> None:
    """Two steps: each rank with its own rows, then each with its own slice of all sequences."""
    rank, expected = dist.get_rank(), [trained_alone(1), trained_alone(2)]
    rows, tokens = slice(2 * rank, 2 * rank + 2), slice(10 * rank, 10 * rank + 10)
    for how in ("ddp", "fsdp"):
        model: nn.Module = make_language_model()
        if how == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.decoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        train_step(model, optimizer, text(0)[rows, :-1], text(0)[rows, 1:])
        assert_same_weights(model, expected[0])
        if how == "fsdp":
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        inputs, targets = text(1)[:, :-1], text(1)[:, 1:]
        group = {"context_parallel": dist.group.WORLD}
        train_step(model, optimizer, inputs[:, tokens], targets[:, tokens], **group)
        assert_same_weights(model, expected[1])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_steps_and_a_checkpoint_for_another_number_of_ranks(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    two_ranks.run(check_steps, str(tmp_path))
    model = make_language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert_same_weights(model, trained_alone(1))
    train_step(model, optimizer, text(1)[:, :-1], text(1)[:, 1:])
    assert_same_weights(model, trained_alone(2))


def run_example(folder: str, *words: str) -> float:
    """The last loss of examples/language_model/train_sharded.py, run on the ranks that there are."""
    sys.path.insert(0, str(EXAMPLES))
    import train_sharded

    sizes = ["--rows", "2", "--length", "32", "--width", "16", "--layers", "1", "--save-every", "2"]
    return train_sharded.Trainer(train_sharded.arguments([*sizes, "--folder", folder, *words]), "cpu").run()


def go_on_alone(folder: str) -> None:
    resumed = run_example(folder, "--steps", "5")
    assert resumed == pytest.approx(run_example(folder + "-alone", "--steps", "5"), abs=1e-4)


def test_the_example_goes_on_with_another_number_of_ranks(
    two_ranks: Ranks, one_rank: Ranks, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    two_ranks.run(run_example, folder, "--steps", "2", "--context-ranks", "2")
    two_ranks.run(run_example, folder, "--steps", "4")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000002", "step-00000004"]
    one_rank.run(go_on_alone, folder)
