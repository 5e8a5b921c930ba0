"""Named configurations: what ``rem-atari train --preset NAME`` starts from; flags override them.

=======  ==================  ==============================================================================
name     time, 2 CPU cores   what for
=======  ==================  ==============================================================================
debug    seconds             runs every phase on Catch at toy sizes; learns nothing
tiny     at most 4 minutes   the whole agent on a real Atari game at a size a CPU bears; learns little
catch    about 4 minutes     learns Catch, a small game of this package, from random play to nearly perfect
minatar  under an hour       learns MinAtar's games (extra: minatar); what each gave: docs, Results
small    about an hour       learns Krull, a real Atari game, on one core; of other games: docs, Results
paper    days; wants a GPU   the published agent
=======  ==================  ==============================================================================
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rem_atari.config import (
    Config,
    ControllerConfig,
    EnvConfig,
    EvaluationConfig,
    OptimConfig,
    ScheduleConfig,
    TokenizerConfig,
    WorldModelConfig,
)

CATCH_ID = "rem_atari/Catch-v0"
CATCH8_ID = "rem_atari/Catch8-v0"
MINATAR_ID = "MinAtar/Breakout-v1"

PAPER = Config(
    preset="paper",
    # As published; the defaults of these two settings are better (docs: known differences).
    controller=ControllerConfig(burn_in_actions=False, mask_after_end=False),
)

# Shared by the presets for a CPU: small networks, and settings that let them learn in few updates.
_SMALL_TOKENIZER = TokenizerConfig(
    channels=(8, 16, 32, 64),
    code_dim=32,
    groups=4,
    reconstruction_weight=5.0,
    perceptual_weight=0.0,
    foreground_weight=20.0,
    init_from_data=True,
    restart_dead_codes=True,
)
_SMALL_WORLD_MODEL = WorldModelConfig(
    embed_dim=64,
    num_layers=2,
    num_heads=4,
    ffn_dim=256,
    dropout=0.0,
    context_blocks=1,
    own_token_embedding=True,
    position_in_block=True,
)
_SMALL_CONTROLLER = ControllerConfig(hidden_dim=128, lstm_dim=128, normalize_codes=True)

_tokenizer_optim = partial(OptimConfig, weight_decay=0.01, clip_norm=10.0)
_world_model_optim = partial(OptimConfig, weight_decay=0.05, clip_norm=100.0)
_controller_optim = partial(OptimConfig, weight_decay=0.01, clip_norm=3.0)

CATCH = Config(
    preset="catch",
    threads=1,
    env=EnvConfig(id=CATCH_ID, frame_size=24, num_envs=8),
    tokenizer=replace(
        _SMALL_TOKENIZER,
        codebook_size=32,
        freeze_epoch=4,
        optim=_tokenizer_optim(lr=1e-3, batch_size=32, updates_per_epoch=15, first_updates=300),
    ),
    world_model=replace(
        _SMALL_WORLD_MODEL,
        sequence_blocks=5,
        optim=_world_model_optim(
            lr=2e-3,
            batch_size=16,
            # These updates are cheap beside the controller's. With few of them the policy settles before the
            # model is right.
            updates_per_epoch=100,
            first_updates=400,
        ),
    ),
    controller=replace(
        _SMALL_CONTROLLER,
        channels=(32, 32),
        burn_in=3,
        # To catch a ball five cells away the paddle must move at the first frame, so imagination may start
        # there.
        min_real_frames=1,
        horizon=6,
        gamma=0.95,
        entropy_weight=0.03,
        optim=_controller_optim(lr=1e-3, batch_size=128, updates_per_epoch=60, start_epoch=3),
    ),
    schedule=ScheduleConfig(
        epochs=16, collect_epochs=16, steps_per_epoch=192, random_steps=2_400, checkpoint_every=4
    ),
    evaluation=EvaluationConfig(every=4, episodes=40, final_episodes=200, random_episodes=200),
)

MINATAR = Config(
    preset="minatar",
    threads=1,
    # A token is two by two cells. A well-played game never ends by itself.
    env=EnvConfig(id=MINATAR_ID, frame_size=40, max_raw_frames=2_500, eval_max_raw_frames=2_500, num_envs=8),
    # Patches need no training. A game shows a few hundred kinds of patches, Seaquest over a thousand.
    tokenizer=replace(_SMALL_TOKENIZER, kind="patches", codebook_size=2_048),
    world_model=replace(
        _SMALL_WORLD_MODEL,
        # Two heads as wide as there are places, so that a head can tell them apart.
        num_heads=2,
        sequence_blocks=13,
        # A table would learn the player on each ground, and at each place of a patch, by itself.
        own_token_embedding=False,
        code_network=64,
        draw="groups",
        local_frames=5,
        local_outcomes=True,
        reward_weight=3.0,
        end_weight=3.0,
        event_share=0.3,
        muon=True,
        optim=_world_model_optim(
            lr=2e-3,
            average=0.98,
            batch_size=8,
            # A thing that the model loses in one of fifty frames is gone from a third of dreams of 20 steps.
            updates_per_epoch=250,
            first_updates=2_500,
        ),
    ),
    controller=replace(
        _SMALL_CONTROLLER,
        channels=(32, 32),
        heads_see_features=True,
        burn_in=6,
        context_frames=5,
        reward_start_share=0.5,
        # Large batches of long imagined episodes: rewards are rare, and a gradient from few of them is mostly
        # noise.
        horizon=21,
        gamma=0.97,
        # With 0.02 or less, policies became deterministic before they were good; Breakout's does with this.
        entropy_weight=0.03,
        uses=2,
        minibatches=4,
        scale_advantages=True,
        random_repeat=16,
        optim=_controller_optim(lr=1e-3, batch_size=128, updates_per_epoch=30),
    ),
    # Steps are almost free here, and the world model lacks examples of rewards.
    schedule=ScheduleConfig(
        epochs=16, collect_epochs=16, steps_per_epoch=5_000, random_steps=30_000, checkpoint_every=5
    ),
    evaluation=EvaluationConfig(every=5, episodes=20, final_episodes=100, random_episodes=100),
)

SMALL = Config(
    preset="small",
    threads=1,
    # With the same number of codes, small patches of a small frame show movement better than large ones of a
    # large frame.
    env=EnvConfig(game="Krull", frame_size=32, num_envs=8),
    # Sprites move by single pixels. Means of patches are found in a second; a network needs minutes.
    tokenizer=replace(
        _SMALL_TOKENIZER,
        kind="patches",
        channels=(8, 16, 32),
        codebook_size=256,
        code_dim=64,
        patch_means=True,
    ),
    world_model=replace(
        MINATAR.world_model,
        sequence_blocks=21,
        local_frames=4,
        optim=replace(MINATAR.world_model.optim, updates_per_epoch=60, first_updates=1_500),
    ),
    controller=replace(
        MINATAR.controller,
        horizon=16,
        gamma=0.98,
        # A hit in Boxing is never certain: drawn rewards would be four fifths of the noise in its advantages.
        mean_rewards=True,
        uses=4,
        random_repeat=8,
    ),
    # With only a few hundred rewards, the model memorises them and does not generalise; steps are cheap.
    schedule=ScheduleConfig(
        epochs=14, collect_epochs=14, steps_per_epoch=5_000, random_steps=100_000, checkpoint_every=5
    ),
    # Eight whole games are held out: Krull's first three hundred steps pay nothing.
    evaluation=EvaluationConfig(
        every=5, episodes=16, final_episodes=100, random_episodes=100, heldout_steps=12_000
    ),
)

TINY = Config(
    preset="tiny",
    # On a machine that does other work too, two threads spend more time waiting for each other than
    # computing.
    threads=1,
    env=EnvConfig(game="Breakout", frame_size=64, num_envs=4),
    tokenizer=replace(
        _SMALL_TOKENIZER,
        codebook_size=128,
        # In the last two epochs the world model's tokens keep their meaning.
        freeze_epoch=3,
        freeze_foreground_error=0.04,
        optim=_tokenizer_optim(
            lr=2e-3,
            # Small batches: in so little time, many noisy updates teach more than few exact ones.
            batch_size=8,
            updates_per_epoch=500,
            max_seconds=20.0,
        ),
    ),
    world_model=replace(
        _SMALL_WORLD_MODEL,
        sequence_blocks=8,
        optim=_world_model_optim(
            lr=2e-3,
            batch_size=8,
            updates_per_epoch=120,
            max_seconds=13.0,
        ),
    ),
    controller=replace(
        _SMALL_CONTROLLER,
        channels=(32, 16),
        burn_in=6,
        horizon=7,
        gamma=0.97,
        entropy_weight=0.01,
        optim=_controller_optim(
            lr=1e-3,
            batch_size=32,
            updates_per_epoch=20,
            start_epoch=1,
            max_seconds=9.0,
        ),
    ),
    schedule=ScheduleConfig(
        epochs=5,
        collect_epochs=5,
        steps_per_epoch=400,
        random_steps=1_000,
        collect_max_seconds=5.0,
        checkpoint_every=5,
    ),
    evaluation=EvaluationConfig(
        every=0,
        final_episodes=8,
        num_envs=4,
        temperature=1.0,
        random_episodes=8,
        max_steps=500,
        max_seconds=10.0,
    ),
)

DEBUG = Config(
    preset="debug",
    threads=1,
    env=EnvConfig(id=CATCH_ID, frame_size=24, num_envs=2),
    tokenizer=TokenizerConfig(
        channels=(4, 8, 8, 8),
        codebook_size=16,
        code_dim=8,
        groups=2,
        perceptual_weight=0.0,
        foreground_weight=1.0,
        init_from_data=True,
        restart_dead_codes=True,
        freeze_epoch=1,
        optim=_tokenizer_optim(lr=1e-3, batch_size=8, updates_per_epoch=2, first_updates=4),
    ),
    world_model=WorldModelConfig(
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        ffn_dim=32,
        sequence_blocks=4,
        context_blocks=1,
        own_token_embedding=True,
        position_in_block=True,
        optim=_world_model_optim(lr=1e-3, batch_size=4, updates_per_epoch=2),
    ),
    controller=ControllerConfig(
        channels=(8, 8),
        hidden_dim=16,
        lstm_dim=16,
        burn_in=3,
        min_real_frames=2,
        horizon=3,
        optim=_controller_optim(lr=1e-3, batch_size=4, updates_per_epoch=2),
    ),
    schedule=ScheduleConfig(
        epochs=2,
        collect_epochs=2,
        steps_per_epoch=32,
        random_steps=64,
        checkpoint_every=1,
        keep_checkpoints=2,
    ),
    evaluation=EvaluationConfig(every=1, episodes=3, final_episodes=5, num_envs=2, random_episodes=4),
)

PRESETS: dict[str, Config] = {preset.preset: preset for preset in (DEBUG, TINY, CATCH, MINATAR, SMALL, PAPER)}
"""The presets by name."""
