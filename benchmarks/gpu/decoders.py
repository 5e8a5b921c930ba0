"""REM's decoder, the whole of it: a pass, a training step and a step of imagination.

Eager, in a CUDA graph, and compiled; under bfloat16 autocast, weights in float32. The floor is that of the
matrix products: two operations for each weight and token, three times as many in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks import decoder, step
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.ops import training_sizes
from benchmarks.gpu.rows import Row
from benchmarks.work import Problem


def measure(clock: Clock, *, compiled: bool) -> Iterator[Row]:
    """Every kind of work, each eagerly and in a graph; ``compiled`` or as it is."""
    s = training_sizes(clock)
    width = s.H * s.D
    sizes = decoder.Sizes(
        B=s.B,
        N=s.N,
        L=s.L,
        M=s.M,
        embed_dim=width,
        num_heads=s.H,
        num_layers=5 if clock.on_gpu else 1,
        ffn_dim=4 * width,
    )
    dtype = torch.bfloat16 if clock.on_gpu else torch.float32
    # Without a GPU the compiler of torch would be compiling interpreted kernels.
    compiler = "" if not compiled else "inductor" if clock.on_gpu else "eager"
    for kind, (run, flops) in _kinds(sizes, dtype, clock.device, compiler).items():
        for mode, time in clock.modes().items():
            yield Row(
                part="compiled decoder" if compiled else "decoder",
                what=f"decoder, {kind}",
                shape=f"rem, {s.text}",
                dtype=str(dtype).removeprefix("torch."),
                way="compiled" if compiled else "",
                mode=mode,
                seconds=time(run),
                floor_flops=flops,
            )


def _kinds(
    sizes: decoder.Sizes, dtype: torch.dtype, device: torch.device, compiler: str
) -> dict[str, tuple[Callable[[], object], int]]:
    """What is done, and the products that it takes, by name."""
    trained = decoder.problem(sizes, dtype, device)
    forward = decoder.ours(trained, mode="pop", backend="triton", compiler=compiler)
    imagined = replace(sizes, N=1, offset=1, past=sizes.L)
    imagining = decoder.ours(
        decoder.problem(imagined, dtype, device),
        mode="pop",
        backend="triton",
        compiler=compiler,
        main_out="last",
    )
    one = replace(sizes, N=1, L=1, M=0, past=sizes.L)
    token = step.ours(step.problem(one, dtype, device), backend="triton", compiler=compiler)
    return {
        "forward": (forward.forward, forward.flops),
        "training step": (_training(trained, compiler), 3 * forward.flops),
        "imagination step": (imagining.forward, imagining.flops),
        "one token": (token.forward, token.flops),
    }


def _training(problem: Problem, compiler: str) -> Callable[[], object]:
    """Forward, backward and AdamW."""
    work = decoder.ours(problem, mode="pop", backend="triton", compiler=compiler)
    on_gpu = problem.device.type == "cuda"
    optimizer = torch.optim.AdamW(work.weights, lr=1e-5, capturable=on_gpu, fused=on_gpu)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        out, pred, _ = work.run()
        loss = out.float().square().mean() + pred.float().square().mean()
        loss.backward()
        optimizer.step()

    return run
