"""Train a byte-level RetNet language model on a text file, on one process or, with torchrun, on several.

    python examples/language_model/train.py                        # Python's own documentation
    python examples/language_model/train.py novel.txt --folder runs/novel --steps 4000
    torchrun --nproc-per-node 2 examples/language_model/train.py novel.txt

Every row of a batch reads its own part of the text, one window per step, and carries its state from step to
step: gradients reach back one window, the memory as far as the decay allows. A stopped run resumes, bit for
bit as if it had not stopped, when it is started again with the same settings.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from retpop import RetNetConfig, RetNetState
from retpop.models import RetNetLM, RetNetLMConfig


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run, from the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="a text file; none: Python's own documentation")
    parser.add_argument("--folder", type=Path, default=Path("runs/language_model"), help="of the run")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch, over all processes")
    parser.add_argument("--window", type=int, default=128, help="bytes of a row in a step")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints and reports")
    parser.add_argument("--sample", type=int, default=200, help="bytes of each sample at the end")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def read_bytes(path: Path | None) -> Tensor:
    """The text as tokens 0 to 255, (T,), uint8."""
    if path is not None:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    from pydoc_data.topics import topics

    return torch.frombuffer(bytearray("\n\n".join(topics.values()), "utf-8"), dtype=torch.uint8)


class Streams:
    """Rows that read a text side by side, each from its own place, repeatedly."""

    def __init__(self, text: Tensor, rows: int, window: int, rank: int = 0, world: int = 1) -> None:
        length = (len(text) - 1) // rows
        self.steps = length // window
        if self.steps == 0:
            raise ValueError(f"The text has {len(text)} bytes; {rows} rows of {window} need more.")
        starts = torch.arange(rank, rows, world)[:, None] * length
        self.rows = text[starts + torch.arange(self.steps * window + 1)]
        self.window = window

    def at(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Tokens and targets (B, window) of a step, and whether the rows start over at it."""
        start = step % self.steps * self.window
        window = self.rows[:, start : start + self.window + 1].long()
        return window[:, :-1], window[:, 1:], start == 0


def build(args: argparse.Namespace) -> RetNetLM:
    """The model, the same in every process."""
    torch.manual_seed(args.seed)
    decoder = RetNetConfig(
        embed_dim=args.width,
        num_heads=4,
        num_layers=args.layers,
        ffn_dim=2 * args.width,
        ffn="glu",
        norm="rmsnorm",
        bias=False,
        final_norm=True,
    )
    return RetNetLM(RetNetLMConfig(vocab_size=256, decoder=decoder, tie_embeddings=True))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """A warm-up over the first twentieth, then half a cosine down to a tenth."""
    warm_up = max(1, args.steps // 20)
    progress = min(1.0, max(0, step - warm_up) / max(1, args.steps - warm_up))
    return args.learning_rate * min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def bits_per_byte(model: RetNetLM, text: Tensor, window: int = 4096) -> float:
    """Bits per byte of a text read once from its start, with the state carried from window to window."""
    nats, state = 0.0, None
    for start in range(0, len(text) - 1, window):
        piece = text[None, start : start + window + 1].long()
        loss, state = model(piece[:, :-1], state, targets=piece[:, 1:])
        nats += loss.item() * (piece.shape[1] - 1)
    return nats / (len(text) - 1) / math.log(2)


def sample(model: RetNetLM, prompts: list[str], length: int) -> None:
    """Print how the model continues some prompts."""
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate(
        [prompt.encode() for prompt in prompts], length, temperature=0.7, generator=generator
    )
    for row in tokens:
        print("  |", bytes(row.tolist()).decode(errors="replace").replace("\n", "\n  | "))


class Trainer:
    """One process of a run: the model, its optimizer, its rows of the text, and its progress."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if args.rows % self.world:
            raise ValueError(f"--rows is {args.rows}; {self.world} processes must divide it.")
        text = read_bytes(args.text)
        held_out = len(text) // 20
        self.valid = text[-held_out:]
        self.streams = Streams(text[:-held_out], args.rows, args.window, self.rank, self.world)
        self.model = build(args)
        self.parallel: nn.Module = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        self.state: RetNetState | None = None
        self.step = 0
        self.file = args.folder / f"resume-{self.rank}-of-{self.world}.pt"

    def run(self) -> float:
        """Train to the end, and return the bits a byte of the held-out text."""
        self.resume()
        began = time.perf_counter()
        while self.step < self.args.steps:
            loss = self.train_step()
            if self.step % self.args.save_every == 0 or self.step == self.args.steps:
                self.save()
                if self.rank == 0:
                    bits, seconds = loss.item() / math.log(2), time.perf_counter() - began
                    print(f"step {self.step}: {bits:.3f} bits/byte, {seconds:.0f} s", flush=True)
        return bits_per_byte(self.model, self.valid)

    def train_step(self) -> Tensor:
        """Learn from the next window of every row, and return the loss in nats a byte."""
        tokens, targets, start_over = self.streams.at(self.step)
        if start_over:
            self.state = None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.args)
        loss, state = self.parallel(tokens, self.state, targets=targets)
        self.state = state.detach()
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write all that the next step depends on; no process replaces its file before all have written."""
        self.args.folder.mkdir(parents=True, exist_ok=True)
        whole = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
        }
        unfinished = self.file.with_suffix(".unfinished")
        torch.save(whole, unfinished)
        if self.world > 1:
            dist.barrier()
        os.replace(unfinished, self.file)

    def resume(self) -> None:
        """Resume the run saved in the same folder, if there is one."""
        if self.file.exists():
            whole = torch.load(self.file, weights_only=True)
            self.step, self.state = whole["step"], whole["state"]
            self.model.load_state_dict(whole["model"])
            self.optimizer.load_state_dict(whole["optimizer"])


def main(words: list[str] | None = None) -> None:
    """Train, judge the model on held-out text, print samples, and save it."""
    args = arguments(words)
    if "LOCAL_RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")
    trainer = Trainer(args)
    bits = trainer.run()
    if trainer.rank == 0:
        print(f"held-out text: {bits:.3f} bits/byte")
        sample(trainer.model, ["The ", "A class is "], args.sample)
        trainer.model.save_pretrained(args.folder / "model")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
