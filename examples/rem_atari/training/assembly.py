"""Assembles a run: the parts that it trains, their data, and its sources of random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from rem_atari.config import Config
from rem_atari.models.conv_tokenizer import ConvTokenizer
from rem_atari.models.parameter_groups import parameter_groups
from rem_atari.models.patches import PatchTokenizer
from rem_atari.play.real_env import RealEnv
from rem_atari.replay.buffer import Replay
from rem_atari.training.component import Component
from rem_atari.training.controller_phase import ControllerPhase
from rem_atari.training.patch_phase import PatchPhase
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.run_state import RunState
from rem_atari.training.seeding import RandomSources, derive_seed
from rem_atari.training.setup import TrainingParts
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.tokenizer_phase import TokenizerPhase
from rem_atari.training.world_model_phase import WorldModelPhase


def assemble(config: Config, parts: TrainingParts, replay: Replay, warn: Callable[[str], None]) -> RunState:
    """A run at its beginning, with environments that have not been started.

    Args:
        config: the run's configuration, checked.
        parts: environments and agent, which is put in eval mode.
        replay: the replay for its experience.
        warn: told, in a sentence, what the user should know.
    """
    agent = parts.agent.eval()
    generators = {purpose: _generator(config, purpose) for purpose in ("actions", "codes", "imagination")}
    # Random play needs no network, and no device.
    generators["random steps"] = torch.Generator().manual_seed(derive_seed(config.seed, "random steps"))
    env = RealEnv(parts.envs, agent.tokenizer, replay, device=config.device, show=agent.show)
    tokens = TokenCache(replay, agent.tokenizer)
    phases = _make_phases(config, parts, replay, tokens, generators, warn)
    return RunState(agent, phases, replay, env, tokens, RandomSources(config.device, generators, replay))


def _make_phases(
    config: Config,
    parts: TrainingParts,
    replay: Replay,
    tokens: TokenCache,
    generators: Mapping[str, torch.Generator],
    warn: Callable[[str], None],
) -> dict[str, TrainingPhase]:
    """The components' phases, by name."""
    agent, precision = parts.agent, config.precision
    orthogonal = agent.world_model.hidden_layers() if config.world_model.muon else ()
    groups = parameter_groups(agent.world_model, config.world_model.optim.weight_decay, orthogonal)
    # With a learning rate of 0 AdamW changes no bit, weight decay included.
    optim = config.world_model.optim
    optim = replace(optim, lr=0.0) if config.world_model.freeze_at_init else optim
    world_model = Component("world_model", agent.world_model, optim, groups, precision)
    controller = Component("controller", agent.controller, config.controller.optim, precision=precision)
    imagination = generators["imagination"]
    cuda_graph = config.cuda_graphs and torch.device(config.device).type == "cuda"
    phases = (
        _make_tokenizer_phase(config, parts, replay, tokens, generators["codes"], warn),
        WorldModelPhase(agent.world_model, world_model, replay, tokens, config.world_model, warn),
        ControllerPhase(
            agent, controller, replay, tokens, config.controller, imagination, warn, cuda_graph=cuda_graph
        ),
    )
    return {phase.component.name: phase for phase in phases}


def _make_tokenizer_phase(
    config: Config,
    parts: TrainingParts,
    replay: Replay,
    tokens: TokenCache,
    generator: torch.Generator,
    warn: Callable[[str], None],
) -> TrainingPhase:
    """The tokenizer's phase: it trains, or adds patches in every epoch."""
    tokenizer, optim = parts.agent.tokenizer, config.tokenizer.optim
    if isinstance(tokenizer, PatchTokenizer):
        every = replace(optim, start_epoch=0, first_updates=None, updates_per_epoch=1)
        component = Component("tokenizer", tokenizer, every, parameter_groups(tokenizer, 0.0))
        return PatchPhase(tokenizer, component, replay, generator, warn)
    assert isinstance(tokenizer, ConvTokenizer)
    component = Component("tokenizer", tokenizer, optim, precision=config.precision)
    return TokenizerPhase(
        tokenizer, component, replay, tokens, config.tokenizer, generator, warn, parts.perceptual
    )


def _generator(config: Config, purpose: str) -> torch.Generator:
    """A generator of its own for one purpose, on the run's device."""
    return torch.Generator(config.device).manual_seed(derive_seed(config.seed, purpose))
