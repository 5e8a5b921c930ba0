"""Train a byte-level RetNet language model with FSDP2, and where sequences are long with context parallelism.

    torchrun --nproc-per-node 2 examples/language_model/train_sharded.py
    torchrun --nproc-per-node 4 examples/language_model/train_sharded.py --context-ranks 2

Weights, gradients and the optimizer's moments are sharded over all ranks. With ``--context-ranks 1`` every
rank has rows of its own; with 2, pairs of neighbouring ranks have the same rows, each a half of every
sequence. A stopped run resumes when it is started again, also on another number of ranks, because its batches
depend on the step alone.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train import build, read_bytes


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run, from the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="a text file; none: Python's own documentation")
    parser.add_argument("--folder", type=Path, default=Path("runs/sharded"), help="of the run's checkpoint")
    parser.add_argument("--context-ranks", type=int, default=1, help="ranks that share each sequence")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch, over all ranks")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a sequence")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints and reports")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


class Trainer:
    """One rank of a run."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args, self.text = args, read_bytes(args.text)
        world, shared = dist.get_world_size(), args.context_ranks
        if world % shared or args.rows % (world // shared) or args.length % shared:
            raise ValueError(
                f"--context-ranks is {shared}: it must divide {world} ranks and --length {args.length}, "
                f"and its {world / shared:g} groups of ranks --rows {args.rows}."
            )
        mesh = init_device_mesh(device, (world // shared, shared), mesh_dim_names=("data", "context"))
        self.context = mesh["context"]
        self.place, self.groups = mesh["data"].get_local_rank(), world // shared
        self.device = torch.device(device, dist.get_node_local_rank(0) if device == "cuda" else None)
        self.model = build(args).to(self.device)
        self.model.decoder.checkpoint_activations = True
        all_ranks = init_device_mesh(device, (world,))
        for layer in self.model.decoder.layers:
            fully_shard(layer, mesh=all_ranks)
        fully_shard(self.model, mesh=all_ranks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate)
        self.step = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets: its group's rows, and its own slice of their sequences."""
        generator = torch.Generator().manual_seed(self.args.seed + self.step)
        starts = torch.randint(len(self.text) - self.args.length, (self.args.rows, 1), generator=generator)
        rows = self.text[starts + torch.arange(self.args.length + 1)].chunk(self.groups)[self.place]
        rows = rows.long().to(self.device)
        return tuple(
            x.tensor_split(self.context.size(), dim=1)[self.context.get_local_rank()]
            for x in (rows[:, :-1], rows[:, 1:])
        )

    def train_step(self) -> float:
        """Learn from one batch; returns the mean loss over all ranks, in bits per byte."""
        tokens, targets = self.batch()
        # Slices are equally long, so that the mean of the ranks' losses is the loss of the whole batch.
        loss, _ = self.model(tokens, targets=targets, context_parallel=self.context)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        mean = loss.detach()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size() / math.log(2)

    def run(self) -> float:
        """Train to the end, and return the last step's loss."""
        self.resume()
        bits = math.nan
        while self.step < self.args.steps:
            bits = self.train_step()
            if self.step % self.args.save_every == 0 or self.step == self.args.steps:
                self.save()
                if dist.get_rank() == 0:
                    print(f"step {self.step}: {bits:.3f} bits/byte", flush=True)
        return bits

    def whole(self) -> dict[str, object]:
        """The state that the next step depends on; each rank holds its shards."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"step": self.step, "model": weights, "optimizer": moments}

    def save(self) -> None:
        """Every rank writes its shards; the newest finished checkpoint is the one that counts."""
        dcp.save(self.whole(), checkpoint_id=self.args.folder / f"step-{self.step:08d}")

    def resume(self) -> None:
        """Resume from the newest checkpoint in the folder, if there is one."""
        saved = sorted(self.args.folder.glob("step-*/.metadata"))  # written last
        if saved:
            whole = self.whole()
            dcp.load(whole, checkpoint_id=saved[-1].parent)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=whole["model"],
                optim_state_dict=whole["optimizer"],
            )
            self.step = whole["step"]


def main(words: list[str] | None = None) -> None:
    """Train on the processes that torchrun has started."""
    args = arguments(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    Trainer(args, device).run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
