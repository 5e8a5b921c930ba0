"""A sequence cut over ranks gives what one process gives: outputs, states, positions and every gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import Ranks, ranks_of
from retention_cases import MODES, log_decays, mode_options, normal
from torch import Tensor

import retpop
from retpop import RetNetConfig, RetNetDecoder, RetNetState
from retpop.distributed import context_parallel
from retpop.layers import call as calls
from retpop.models import RetNetLM, RetNetLMConfig

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist

WORLDS = (2, 4)

CUTS = {2: [0, 30, 37], 4: [0, 7, 7, 30, 37]}
"""Where 37 tokens are cut; one rank of four has none."""

PACKED = torch.tensor([0, 5, 5, 7, 31, 37])
"""Sequences packed into 37 tokens: one is empty, one ends at a cut, one crosses two."""

BLOCK_CUTS = {2: [0, 1, 6], 4: [0, 0, 3, 5, 6]}
"""Where 6 blocks are cut."""

Results = list[Tensor]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks_of(request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def own_slice(cuts: dict[int, list[int]], unit: int = 1) -> slice:
    """This rank's part of what is cut."""
    start, end = list(pairwise(cuts[dist.get_world_size()]))[dist.get_rank()]
    return slice(start * unit, end * unit)


def assert_same(found: Results, wanted: Results, names: str) -> None:
    for name, x, y in zip(names.split(), found, wanted, strict=True):
        torch.testing.assert_close(
            x, y, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def weighted_sum(results: Results, weights: Results) -> Tensor:
    return sum((x * w).sum() for x, w in zip(results, weights, strict=True))


def check_cut(
    run: Callable[..., Results],
    inputs: list[Tensor],
    shared: list[Tensor],
    owns: list[slice],
    result_owns: list[slice],
) -> None:
    """Compare ``run`` of this rank's slices with that of whole inputs.

    Args:
        run: takes sliced and shared inputs and a group; returns sliced results, then shared ones.
        inputs: are sliced along dim 1 by ``owns``.
        shared: are the same on every rank, and their gradient is the sum of the ranks'.
        owns, result_owns: one slice for each sliced input and result.
    """
    leaves = [x.detach().requires_grad_() for x in (*inputs, *shared)]
    whole = run(*leaves, None)
    weights = [normal(*x.shape, seed=90 + i, dtype=x.dtype) for i, x in enumerate(whole)]
    wanted = torch.autograd.grad(weighted_sum(whole, weights), leaves)

    sliced = [x[:, own] for x, own in zip(leaves, owns, strict=False)]
    results = run(*sliced, *leaves[len(inputs) :], dist.group.WORLD)
    number = len(result_owns)
    own_weights = [w[:, own] for w, own in zip(weights, result_owns, strict=False)] + [
        w / dist.get_world_size() for w in weights[number:]
    ]
    found = torch.autograd.grad(weighted_sum(results, own_weights), leaves, materialize_grads=True)
    for gradient in found:  # a sliced input's is zero outside of this rank's slice
        dist.all_reduce(gradient)
    expected = [x[:, own] for x, own in zip(whole, result_owns, strict=False)] + whole[number:]
    assert_same(results, expected, " ".join(f"result_{i}" for i in range(len(results))))
    assert_same(list(found), list(wanted), " ".join(f"gradient_{i}" for i in range(len(found))))


def check_retention(mode: str, given: str) -> None:
    own, packed = own_slice(CUTS), "packed" in given
    rows, states = (1, len(PACKED) - 1) if packed else (2, 2)
    reset = torch.zeros(rows, 37, dtype=torch.bool)
    reset[0, 7] = reset[0, 20] = reset[-1, 33] = True

    def run(q: Tensor, k: Tensor, v: Tensor, decays: Tensor, *rest: object) -> Results:
        *state, group = rest
        options = {"state": state[0] if state else None, "context_parallel": group, **mode_options(mode)}
        if "reset" in given:
            options["reset"] = reset if group is None else reset[:, own]
        if packed:
            options["cu_seqlens"] = PACKED
        return list(retpop.retention(q, k, v, decays, **options))

    tokens = [normal(rows, 37, 4, D, seed=seed) for seed, D in enumerate((4, 4, 6))]
    state = [normal(states, 4, 4, 6, seed=3)] if "state" in given else []
    decays = log_decays(4).clamp(min=-9)  # -inf has no gradient
    check_cut(run, tokens, [decays, *state], [own] * 3, [own])


@pytest.mark.parametrize("given", ["nothing", "state", "state, reset", "packed", "packed, state, reset"])
@pytest.mark.parametrize("mode", MODES)
def test_retention(ranks: Ranks, mode: str, given: str) -> None:
    ranks.run(check_retention, mode, given)


def check_pop(offset: int) -> None:
    reset = torch.zeros(2, 6, dtype=torch.bool)
    if offset == 0:  # at offset 1 a prediction reads the state after its block, before a reset drops it
        reset[0, 2] = reset[1, 3] = reset[1, 5] = True

    def run(*args: object) -> Results:
        *tensors, state, group = args
        return list(
            retpop.pop_retention(
                *tensors,
                log_decays(4),
                block_size=3,
                offset=min(offset, tensors[3].shape[1]),  # a rank without blocks predicts nothing
                state=state,
                reset=reset if group is None else reset[:, blocks],
                context_parallel=group,
            )
        )

    blocks, tokens = own_slice(BLOCK_CUTS), own_slice(BLOCK_CUTS, 3)
    main = [normal(2, 18, 4, D, seed=i) for i, D in enumerate((4, 4, 6))]
    pred = [normal(2, 6, 2, 4, D, seed=5 + i) for i, D in enumerate((4, 4, 6))]
    state = normal(2, 4, 4, 6, seed=9)
    check_cut(run, [*main, *pred], [state], [tokens] * 3 + [blocks] * 3, [tokens, blocks])


@pytest.mark.parametrize("offset", [0, 1])
def test_pop_with_resets(ranks: Ranks, offset: int) -> None:
    ranks.run(check_pop, offset)


def small_decoder(**fields: object) -> RetNetDecoder:
    torch.manual_seed(0)
    fields = {"embed_dim": 8, "num_heads": 2, "num_layers": 2, "ffn_dim": 8, **fields}
    return RetNetDecoder(RetNetConfig(**fields)).double()


def check_module(kind: str) -> None:
    """Two windows of a sequence, the second from the first one's state; weights are shared inputs."""
    module = small_decoder(position="rope", decay="log_spaced", final_norm=True, learn_decay=True)
    module.checkpoint_activations = kind == "pop, checkpointed"
    if kind == "layer":
        module = module.layers[1].retention
    rows, states = (1, len(PACKED) - 1) if kind == "packed" else (2, 2)
    start = module.init_state(states)
    position = torch.tensor([3, 70, 5, 0, 8][:states])
    names = [name for name, _ in module.named_parameters()]
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 2] = reset[1, 5] = True
    resets = torch.zeros(2, 18, dtype=torch.bool)
    resets[0, 2] = resets[0, 9] = True

    def run(x: Tensor, more: Tensor, x_pred: Tensor, kv: Tensor, *rest: object) -> Results:
        *weights, group = rest
        weights, options = dict(zip(names, weights, strict=True)), {"context_parallel": group}
        call = torch.func.functional_call
        if kind.startswith("pop"):
            own_reset = reset if group is None else reset[:, blocks]
            pop = {"x_pred": x_pred, "block_size": 3, "main_out": "last", "reset": own_reset}
            out, pred, state = call(module, weights, (x, RetNetState(kv, position)), pop | options)
        else:
            if kind == "packed":
                options["cu_seqlens"] = PACKED
                own_resets = {"cu_seqlens": PACKED.clamp(max=18)}
            else:
                own_resets = {"reset": resets if group is None else resets[:, tokens]}
            out, state = call(module, weights, (x, RetNetState(kv, position)), options | own_resets)
            pred = x_pred.sin()
        out_2, end = call(module, weights, (more, state), options)
        return [out, out_2, pred, end.kv, state.position.double(), end.position.double()]

    blocks, tokens = own_slice(BLOCK_CUTS), own_slice(BLOCK_CUTS, 3)
    inputs = [normal(rows, T, 8, seed=T) for T in (18, 37)] + [normal(2, 6, 2, 8, seed=4)]
    shared = [normal(*start.kv.shape, seed=6), *(x.detach() for x in module.parameters())]
    owns = [tokens, own_slice(CUTS), blocks]
    check_cut(run, inputs, shared, owns, [blocks if kind.startswith("pop") else tokens, *owns[1:]])


@pytest.mark.parametrize("kind", ["sequence", "pop", "pop, checkpointed", "layer", "packed"])
def test_layer_and_decoder(ranks: Ranks, kind: str) -> None:
    ranks.run(check_module, kind)


def check_nan() -> None:
    """A NaN reaches no earlier rank, and no rank behind a reset."""
    world, rank = dist.get_world_size(), dist.get_rank()
    q, k, v = (normal(1, 3, 2, 4, seed=10 * rank + i) for i in range(3))
    if rank == 1:
        v[0, 1, 0, 0] = torch.nan
    out, state = retpop.retention(q, k, v, log_decays(2), context_parallel=dist.group.WORLD)
    assert out.isnan().any() == (rank > 0)
    assert state.isnan().any()
    reset = torch.tensor([[False, rank == world - 1, False]])
    no_pred = (x.new_empty(1, 0, 0, 2, 4) for x in (q, k, v))
    options = {"block_size": 1, "reset": reset, "context_parallel": dist.group.WORLD}
    out, _, state = retpop.pop_retention(q, k, v, *no_pred, log_decays(2), **options)
    assert state.isnan().any() == (world == 2)  # there the NaN itself comes after the reset
    assert out.isnan().any() == (rank > 0)


def test_nan_stays_where_it_belongs(ranks: Ranks) -> None:
    ranks.run(check_nan)


def check_bfloat16() -> None:
    own = own_slice(CUTS)
    q, k, v = (normal(2, 37, 4, 8, seed=i, dtype=torch.bfloat16) for i in range(3))
    decays = log_decays(4, torch.float32)
    whole, last = retpop.retention(q, k, v, decays)
    sliced = (x[:, own] for x in (q, k, v))
    out, state = retpop.retention(*sliced, decays, context_parallel=dist.group.WORLD)
    torch.testing.assert_close(out, whole[:, own])
    torch.testing.assert_close(state, last)  # in float32: what the ranks exchange is not rounded


def check_without_gradient() -> None:
    """A large pass without gradient, which otherwise goes through the layers in microbatches."""
    calls.ELEMENTS_AT_ONCE = 64
    decoder, own, x = small_decoder(), own_slice(CUTS), normal(2, 37, 8, seed=1)
    with torch.no_grad():
        whole, last = decoder(x)
        out, state = decoder(x[:, own], context_parallel=dist.group.WORLD)
    assert_same([out, state.kv], [whole[:, own], last.kv], "out kv")


def test_bfloat16(ranks: Ranks) -> None:
    ranks.run(check_bfloat16)


def test_without_gradient(ranks: Ranks) -> None:
    ranks.run(check_without_gradient)


def check_traffic() -> None:
    """One state per row and layer is gathered forward, and a gradient for each rank's comes back."""
    sent: dict[str, list[int]] = {"_all_gather": [], "_reduce_scatter": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in sent.items():
            real = getattr(context_parallel, name)

            def counted(
                into: Tensor, x: Tensor, group: object, real: Callable = real, sizes: list = sizes
            ) -> None:
                if x.is_floating_point():
                    sizes.append(x.numel() * x.element_size())
                real(into, x, group=group)

            patch.setattr(context_parallel, name, counted)
        x = normal(2, 5 if dist.get_rank() else 0, 8, seed=1)  # one without tokens calls backward, too
        out, _ = small_decoder(num_layers=3)(x, context_parallel=dist.group.WORLD)
        assert sent == {"_all_gather": [2 * 2 * 4 * 4 * 8] * 3, "_reduce_scatter": []}
        out.sum().backward()
        assert sent["_reduce_scatter"] == [dist.get_world_size() * 2 * 2 * 4 * 4 * 8] * 3


def test_bytes_that_move(ranks: Ranks) -> None:
    ranks.run(check_traffic)


def saved_bytes(group: object) -> int:
    """What backward keeps of a decoder's call."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        small_decoder()(normal(2, 16, 8, seed=1), context_parallel=group)
    return sum(sizes)


def check_memory() -> None:
    """With twice the ranks, and so twice the tokens, a rank keeps only powers of γ more, two per head."""
    world = dist.get_world_size()
    halves = [dist.new_group(list(range(start, start + world // 2))) for start in (0, world // 2)]
    own_half = halves[dist.get_rank() * 2 // world]
    more = saved_bytes(dist.group.WORLD) - saved_bytes(own_half)
    assert more <= 2 * 2 * 2 * 8 * world  # 2 layers, 2 heads, float64


def test_memory_of_a_rank_does_not_grow(ranks: Ranks) -> None:
    ranks.run(check_memory)


def check_bad_use() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    q = normal(1, 4, 2 + (rank == 1), 4, seed=1)
    decoder, x = small_decoder(), normal(1, 4, 8, seed=1)

    def call(group: object, **options: object) -> None:
        decoder(x, context_parallel=group, **options)

    with pytest.raises(ValueError, match=r"retention\(\): .*all ranks must agree in H; .* have 2, 3"):
        retpop.retention(q, q, q, log_decays(q.shape[2]), context_parallel=dist.group.WORLD)
    with pytest.raises(ValueError, match="all ranks must agree in state"):
        call(dist.group.WORLD, state=decoder.init_state(1) if rank else None)
    with pytest.raises(ValueError, match=r"RetNetDecoder\(\): cu_seqlens ends at 4 but there are T="):
        call(dist.group.WORLD, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"agree in cu_seqlens\[1\]; .* have 3, 4"):
        call(dist.group.WORLD, cu_seqlens=torch.tensor([0, 3 + (rank == 1), 4 * world]))
    with pytest.raises(ValueError, match="agree in number of sequences"):
        call(dist.group.WORLD, cu_seqlens=torch.tensor([0, *[2] * rank, 4 * world]))
    with pytest.raises(ValueError, match="agree in grad mode"), torch.set_grad_enabled(rank == 0):
        call(dist.group.WORLD)
    model = RetNetLM(RetNetLMConfig(vocab_size=4, decoder=decoder.cfg))
    cut = {"cu_seqlens": torch.tensor([0, 4 * world]), "context_parallel": dist.group.WORLD}
    with pytest.raises(ValueError, match=r'logits is "last" with cu_seqlens and context_parallel'):
        model(torch.zeros(1, 4, dtype=torch.int64), logits="last", **cut)
    with pytest.raises(TypeError, match="context_parallel is 'gloo'"):
        call("gloo")
    first = dist.new_group([0])
    if rank == 0:
        call(first)
    else:
        with pytest.raises(TypeError, match="a process group that this process is a member of"):
            call(first)
    mesh = dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "sequence"))
    with pytest.raises(ValueError, match="mesh of 2 dimensions"):
        call(mesh)
    call(mesh["sequence"])


def test_bad_use_raises_on_every_rank(ranks: Ranks) -> None:
    ranks.run(check_bad_use)


def die_on_one_rank() -> None:
    if dist.get_rank() == 1:
        os._exit(1)
    q = normal(1, 4, 2, 4, seed=1)
    retpop.retention(q, q, q, log_decays(2), context_parallel=dist.group.WORLD)


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    with ranks_of(2, tmp_path) as ranks:
        first, second = ranks.errors(die_on_one_rank)
    assert second == "the process died"
    assert first is not None
    assert "RuntimeError" in first.splitlines()[-1]


def check_compiled() -> None:
    decoder, own, x = small_decoder(num_layers=1), own_slice(CUTS), normal(2, 37, 8, seed=1)
    results = []
    for call in (decoder, torch.compile(decoder, backend="aot_eager", fullgraph=True)):
        out, state = call(x[:, own], context_parallel=dist.group.WORLD)
        gradient = torch.autograd.grad(out.sin().sum() + state.kv.sum(), decoder.layers[0].parameters())
        results.append([out, state.kv, *gradient])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_in_one_graph(ranks: Ranks) -> None:
    ranks.run(check_compiled)
