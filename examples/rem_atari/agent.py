"""The agent: a tokenizer, a world model over its tokens, and a controller that learns inside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rem_atari.config import Config
from rem_atari.models.base_tokenizer import BaseTokenizer
from rem_atari.models.base_world_model import BaseWorldModel
from rem_atari.models.controller import Controller
from rem_atari.models.fsq import FsqTokenizer
from rem_atari.models.grouped import GroupedWorldModel
from rem_atari.models.patches import PatchTokenizer
from rem_atari.models.refining import RefiningWorldModel
from rem_atari.models.token_by_token import TokenByTokenWorldModel
from rem_atari.models.tokenizer import Tokenizer
from rem_atari.models.world_model import WorldModel

TOKENIZERS = {"vq": Tokenizer, "fsq": FsqTokenizer, "patches": PatchTokenizer}
"""The tokenizers by `tokenizer.kind`."""


class Agent(nn.Module):
    """The three networks in one module, so that they are saved, moved and counted together.

    Each is trained with its own loss and called by name; the agent has no forward.
    """

    def __init__(self, tokenizer: BaseTokenizer, world_model: BaseWorldModel, controller: Controller) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.world_model = world_model
        self.controller = controller

    @classmethod
    def from_config(cls, cfg: Config, num_actions: int) -> Agent:
        """An agent with fresh weights, drawn from torch's global generator, on the CPU.

        Args:
            cfg: a run's configuration.
            num_actions: actions of the game.

        Raises:
            ValueError: sizes that do not fit each other.
        """
        tokenizer = TOKENIZERS[cfg.tokenizer.kind](cfg.tokenizer, cfg.env.frame_size)
        kind: type[BaseWorldModel] = TokenByTokenWorldModel
        if cfg.world_model.pop:
            kind = {"refine": RefiningWorldModel, "groups": GroupedWorldModel}.get(
                cfg.world_model.draw, WorldModel
            )
        world_model = kind(
            cfg.world_model,
            num_tokens=tokenizer.num_tokens,
            code_dim=tokenizer.code_dim,
            code_parts=tokenizer.code_parts,
            codebook_size=tokenizer.codebook_size,
            num_actions=num_actions,
        )
        controller = Controller(
            cfg.controller,
            grid=tokenizer.grid,
            code_dim=tokenizer.code_dim,
            frame_size=cfg.env.frame_size,
            num_actions=num_actions,
        )
        # Images and squares of codes have their channels last; convolutions are faster with weights in that
        # layout.
        return cls(tokenizer, world_model, controller).to(memory_format=torch.channels_last)

    def compile_networks(self) -> None:
        """Compile the parts that compute most; each shape compiles at its first use."""
        self.tokenizer.compile_networks()
        self.world_model.decoder.compile()
        self.controller.cnn.compile()

    def show(self, tokens: Tensor) -> Tensor:
        """The controller's view of tokens (..., K): their codes, or the images that they decode to.

        Returns:
            Codes (..., K, E); for a controller in pixel space images (..., 3, S, S) about [-1, 1].
        """
        if self.controller.sees_pixels:
            return self.tokenizer.images(tokens)
        return self.tokenizer.embed(tokens)
