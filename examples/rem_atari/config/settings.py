"""Every setting of a run, in one tree of frozen dataclasses; the command line is made from it.

The defaults are the published agent's (arXiv 2402.05643), except for two fields of the controller whose
defaults are the better ones, `burn_in_actions` and `mask_after_end`: ``presets.PRESETS["paper"]`` sets these
two as published and changes nothing else. The presets for a CPU override sizes, and switch on what the
fields' docstrings call off in the paper.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rem_atari.config.earlier_versions import with_added_fields
from rem_atari.config.reading import from_dict

MINARI = "minari:"
"""Begins a `schedule.recorded` that is the id of a Minari dataset and no folder."""


@dataclass(frozen=True, kw_only=True)
class MinAtarConfig:
    """MinAtar's games (an `env.id` such as MinAtar/Breakout-v1); the defaults are its own."""

    sticky_actions: float = 0.1
    """Probability that a step repeats the previous action instead of the chosen one."""
    difficulty_ramping: bool = True
    """Whether a game grows harder as it goes on, if it has such a mode."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The game and its preprocessing (Atari 100K's protocol)."""

    game: str = "Breakout"
    """ALE game, by its name in ale-py, for example Breakout or MsPacman. Not used with an `id`."""
    id: str | None = None
    """Any gymnasium id with pixels and discrete actions, for example MinAtar/Breakout-v1, or
    my_module:MyGame-v0, which imports my_module first. Pixels are RGB observations, or else rendered
    pictures. `game`, `frame_skip` and `noop_max` are not used. None: the ALE game `game`."""
    kwargs: tuple[str, ...] = ()
    """With an `id`: keyword arguments of the environment, as key=value words (size=8 mode=hard; a value that
    is JSON is read as JSON) or as one JSON object."""
    wrapper: str | None = None
    """With an `id`: module:Name of a wrapper (anything that takes an environment and returns one) to put
    around the environment."""
    render: bool = False
    """With an `id`: use the rendered picture even if the observations are images."""
    action_repeat: int = 1
    """With an `id`: steps of the environment that one action lasts; their rewards are added up, and the last
    frame is shown."""
    frame_size: int = 64
    """Height and width of a frame in pixels."""
    frame_skip: int = 4
    """ALE games: raw frames that one action lasts; the observation is the maximum over the last two."""
    noop_max: int = 30
    """ALE games, training: a game starts with 1 to this many no-ops, each one raw frame."""
    max_raw_frames: int = 20_000
    """Training: raw frames (with an `id`, steps) after which a game is truncated."""
    eval_max_raw_frames: int = 108_000
    """Evaluation: raw frames (with an `id`, steps) after which a game is truncated."""
    num_envs: int = 1
    """Environments stepped side by side while collecting."""
    processes: bool = False
    """Run each environment in a process of its own: one that crashes or hangs is replaced, and several work
    at the same time. Costs about 0.4 ms a step; without it only an environment that raises is replaced."""
    timeout_seconds: float = 5.0
    """With `processes`: an environment that takes longer to answer counts as dead."""
    minatar: MinAtarConfig = field(default_factory=MinAtarConfig)
    """Settings of MinAtar's games."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One component's optimiser (AdamW) and how much it trains."""

    lr: float
    """Learning rate."""
    weight_decay: float
    """AdamW's decoupled weight decay."""
    clip_norm: float
    """Gradients are clipped to this global norm."""
    average: float = 0.0
    """Decay of a running mean of the weights over an epoch's updates. The mean replaces the weights at the
    end of the epoch; it evens out the jumps that rare events cause. 0 (paper): none."""
    batch_size: int
    """Frames (tokenizer), sequences (world model) or segments (controller) in an update."""
    updates_per_epoch: int
    """Updates in an epoch."""
    first_updates: int | None = None
    """Updates in the component's first epoch, where they differ (a warm-up); None: as in any other."""
    start_epoch: int = 0
    """First epoch in which the component trains."""
    max_seconds: float | None = None
    """Bound on a phase's wall time: a slow machine finishes with fewer updates. None: counts alone decide."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer, which turns a frame into a square of tokens."""

    kind: Literal["vq", "patches", "fsq"] = "vq"
    """vq (paper): a VQ-VAE. fsq: the same networks with finite scalar quantisation (arXiv 2309.15505) for the
    codebook. patches: codes are patches of pixels, added as the game shows them and never changed (arXiv
    2502.01591); nothing trains, and tokens are exact where the world is made of cells."""
    channels: tuple[int, ...] = (32, 64, 128, 256)
    """Channels of the encoder: the first convolution's, then after each halving of the frame. With `patches`
    their number alone matters: it gives the side of a patch."""
    codebook_size: int = 512
    """Number of codes; of `patches` the most there can be. Not used by fsq."""
    code_dim: int = 256
    """Dimension of a code. Not used by fsq, whose codes have a number for each of `fsq_levels`."""
    fsq_levels: tuple[int, ...] = (8, 8, 8)
    """With `fsq`: levels of each number of a code, at least 3; their product is the number of codes."""
    patch_threshold: float = 0.0
    """With `patches`: mean squared error (frames in [-1, 1]) up to which a code stands for a patch."""
    patch_means: bool = False
    """With `patches`: the first codes are k-means of the patches of the first epoch's frames, for games whose
    sprites move by single pixels and show more patches than there are codes."""
    groups: int = 8
    """Groups of every GroupNorm."""
    patchwise: bool = False
    """Encode each patch by itself, so that its token changes only where its pixels do. Off in the paper."""
    reconstruction_weight: float = 1.0
    """Weight of the mean squared error of the pixels."""
    codebook_weight: float = 1.0
    """Weight of MSE(z_q, sg z), which moves the codes."""
    commitment_weight: float = 1.0
    """Weight of MSE(z, sg z_q), which moves the encoder."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS, whose own weights `rem-atari weights` fetches once. 0 leaves it out."""
    lpips_weights: str | None = None
    """File with the weights of LPIPS: safetensors or a torch state dict, VGG16 by torchvision's names. None:
    the file that `rem-atari weights` has fetched."""
    foreground_weight: float = 0.0
    """Extra weight in the pixel error of pixels that differ from the median frame. Off in the paper."""
    init_from_data: bool = False
    """With `vq`: start the codes from encoder outputs of the first batch. Off in the paper."""
    restart_dead_codes: bool = False
    """With `vq`: move codes that no frame uses onto encoder outputs. Off in the paper."""
    freeze_epoch: int | None = None
    """From this epoch on the tokenizer is frozen if its foreground error allows it. None (paper): never."""
    freeze_foreground_error: float = 0.02
    """Mean squared error on foreground pixels (frames in [-1, 1]) above which it is not frozen yet."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, weight_decay=0.01, clip_norm=10.0, batch_size=128, updates_per_epoch=200, start_epoch=5
        )
    )
    """Optimiser and amount of training."""


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig:
    """The POP world model: a RetNet decoder over blocks of observation tokens and one action."""

    embed_dim: int = 256
    """Width of the decoder; equals the tokenizer's code_dim unless own_token_embedding is on."""
    num_layers: int = 5
    """Layers of the decoder."""
    num_heads: int = 4
    """Retention heads."""
    ffn_dim: int = 1024
    """Hidden width of the feed-forward layers."""
    dropout: float = 0.1
    """Dropout at the four places of the paper's decoder."""
    sequence_blocks: int = 10
    """Blocks (environment steps) in a training sequence."""
    context_blocks: int = 2
    """First blocks of a sequence that carry no loss."""
    own_token_embedding: bool = False
    """Embed observation tokens with a table of the world model's own, not the codebook. Off in the paper,
    where it is an ablation ("separate embeddings")."""
    code_network: int = 0
    """Units of a small network over the tokenizer's codes, which embeds tokens and is a part of the weights
    that predict them: what is learned about a code then holds for those that look like it. 0 (paper): no
    such network."""
    pop: bool = True
    """Predict all tokens of an observation in one pass. False (an ablation of the paper): one after another,
    each from those before it, at a pass a token."""
    shared_prediction_token: bool = False
    """Share one prediction token among all places of an observation. An ablation of the paper."""
    position_in_block: bool = False
    """Add a learned embedding of a token's place in its block. Off in the paper."""
    local_frames: int = 0
    """With `pop`: predict a next frame's tokens not only from the memory but also, by a short convolution,
    from the surroundings of their places in this number of last frames. They show what moves, and when (5
    suffice in MinAtar's games). 0 (paper): from the memory alone."""
    local_outcomes: bool = False
    """With `pop`, but not with `draw` refine: predict rewards and ends from the action token and from the
    predictions of the next frame, by the maximum over their places. Off in the paper."""
    event_share: float = 0.0
    """Share of a batch's sequences, below 1, that is drawn from those with a reward or an end. Weights make
    the expected loss that of uniform draws, so that learned probabilities stay unbiased. 0 in the paper."""
    priority_share: float = 0.0
    """Share of a batch's sequences that is drawn by the softmax of their last losses, new ones first, as in
    Simulus (arXiv 2502.11537: 0.3). No weights correct for it, on purpose. 0 in the paper."""
    draw: Literal["independent", "coupled", "refine", "groups"] = "independent"
    """How imagination draws the tokens of a frame, with `pop`. independent (paper): each by itself. coupled:
    all with one random number, the unchanged token ordered first, so that things that move at the same times
    move in the same frames. refine: in `refine_passes`, each of which reads the most certain tokens of the
    passes before; the prediction stream is then twice as long. groups: in four groups of places, each of
    which reads its neighbours of the groups before; the decoder runs once (arXiv 1703.03664)."""
    refine_passes: int = 3
    """With `refine`: passes for a frame, at least 2."""
    reward_weight: float = 1.0
    """Weight of the rewards' part of the loss. More than 1 where rewards are rare (10: arXiv 2502.01591)."""
    end_weight: float = 1.0
    """Weight of the ends' part of the loss."""
    reward_bins: int = 0
    """Learn the sizes of rewards, by classification over so many bins spaced evenly in symlog (an odd number;
    255 in DreamerV3, arXiv 2301.04104), and imagine their mean. 0 (paper): learn their signs."""
    disagreement_heads: int = 0
    """With `pop`, but not with `draw` refine: number of further heads, at least 2, that also learn to predict
    the next observation. Where they disagree, the situation is new; see `controller.disagreement_weight`
    (Simulus, arXiv 2502.11537: 4). 0 in the paper."""
    muon: bool = False
    """Train the matrices of the hidden layers with Muon (https://kellerjordan.github.io/posts/muon) and the
    rest with AdamW: fewer updates for the same loss. Off in the paper: AdamW for all."""
    freeze_at_init: bool = False
    """Leave the world model at its random initial weights: a control, in which imagination can teach nothing.
    Its updates have a learning rate of 0, so everything else in the run stays the same."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-4, weight_decay=0.05, clip_norm=100.0, batch_size=64, updates_per_epoch=200, start_epoch=25
        )
    )
    """Optimiser and amount of training; no weight decay on biases, norms and embeddings."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The actor-critic, trained in imagination."""

    space: Literal["tokens", "pixels"] = "tokens"
    """Its input: the codes of an observation's tokens, or the frame that the tokenizer decodes from them (an
    ablation of the paper)."""
    channels: tuple[int, int] = (128, 64)
    """In token space: channels of the two convolutions over the square of codes."""
    hidden_dim: int = 512
    """In token space: width of the linear layer after them."""
    pixel_channels: tuple[int, ...] = (32, 32, 64, 64)
    """In pixel space: channels of the convolutions, each of which halves the frame."""
    cell: Literal["lstm", "gru"] = "lstm"
    """The recurrent cell."""
    lstm_dim: int = 512
    """Width of the recurrent cell."""
    action_input: bool = True
    """Feed the actions taken to the recurrent cell. Without: an ablation of the paper."""
    heads_see_features: bool = False
    """Actor and critic read the features of the observation as well as the cell's memory, and the policy
    starts nearly uniform: it learns in fewer steps. Off in the paper, where they read only the memory."""
    normalize_codes: bool = False
    """Divide the codes by their standard deviation before the first convolution. Off in the paper."""
    burn_in: int = 20
    """Frames of a segment that warm up the cell, without gradient; the segment has one more."""
    min_real_frames: int = 3
    """A segment has at least this many real frames; the rest is padding on the left."""
    context_frames: int = 1
    """Frames before the one that imagination starts from which the world model reads, as far as they are
    real; at most `burn_in`. With more than one it sees what moves, and when (the paper: 1)."""
    reward_start_share: float = 0.0
    """Share of imagination's starts that lie shortly before a known reward; the others, and all in the paper
    (0), lie anywhere."""
    reward_start_steps: int = 10
    """With `reward_start_share`: steps within which the reward comes."""
    burn_in_actions: bool = True
    """Feed the actions of the burn-in to the cell too. The published agent does not."""
    horizon: int = 9
    """Observations of an imagined episode, the one it starts from included: the world model takes horizon - 1
    steps. The loss covers all observations but the last, whose value is the bootstrap."""
    gamma: float = 0.995
    """Discount."""
    td_lambda: float = 0.95
    """λ of the λ-return."""
    entropy_weight: float = 0.001
    """Weight of the policy's entropy."""
    uses: int = 1
    """How often the same imagined steps are learned from; with more than one (the paper: 1) the policy's
    updates are clipped as those of PPO (arXiv 1707.06347)."""
    minibatches: int = 1
    """Random parts of the imagined episodes, with an update on each in every one of `uses`, clipped likewise
    (PPO, algorithm 1); at most `optim.batch_size`. 1 in the paper."""
    clip_ratio: float = 0.2
    """With more than one of `uses` or `minibatches`: how far the probability of an action may move, relative
    to the old one."""
    scale_advantages: bool = False
    """Divide advantages by their standard deviation in the batch, so that small rewards teach as much as
    large ones. Off in the paper."""
    disagreement_weight: float = 0.0
    """Curiosity: bonus of an imagined step for each nat of disagreement, the mean over the next observation's
    tokens, between the world model's `disagreement_heads` (Simulus, arXiv 2502.11537). 0 in the paper."""
    mean_rewards: bool = False
    """An imagined step pays the mean of the reward's distribution, as with `reward_bins` it always does. Off:
    a sign drawn from it, as in the paper; the same in the long run, with noise that hides what one action
    changes."""
    value_bins: int = 0
    """Learn values by classification over so many bins spaced evenly in symlog, as `reward_bins` of the world
    model does rewards. 0 (paper): by their squared error."""
    mask_after_end: bool = True
    """Leave imagined steps after an imagined end out of the loss. The published agent keeps them."""
    epsilon: float = 0.01
    """While collecting: probability that a random action is taken, or a run of repeated ones begins."""
    random_repeat: int = 1
    """A random action, of random play and of `epsilon`, is repeated for 1 to so many steps (paper: 1)."""
    temperature: float = 1.0
    """Temperature of the actions while collecting."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, weight_decay=0.01, clip_norm=3.0, batch_size=128, updates_per_epoch=100, start_epoch=50
        )
    )
    """Optimiser and amount of training."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Epochs, and how much is collected in each."""

    epochs: int = 600
    """Epochs: collect, train the tokenizer, the world model, the controller."""
    collect_epochs: int = 500
    """Only the first so many epochs collect."""
    steps_per_epoch: int = 200
    """Environment steps (all environments together) collected in an epoch."""
    random_steps: int = 0
    """Environment steps with random actions before the first epoch. 0 in the paper."""
    recorded: str | None = None
    """Train on recorded episodes and collect nothing: a folder of .npz files, one an episode, or minari:ID
    for a Minari dataset on this machine. `random_steps` and `steps_per_epoch` are then not used."""
    collect_max_seconds: float | None = None
    """Bound on the wall time of an epoch's collection; None: counts alone decide."""
    checkpoint_every: int = 10
    """Epochs between checkpoints; the last epoch is always saved."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    keep_best: bool = False
    """Keep the checkpoint of the evaluation with the highest mean return too, as checkpoints/best-..."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation while training and at the end."""

    every: int = 10
    """Epochs between evaluations; 0: only at the end."""
    episodes: int = 16
    """Episodes of an evaluation while training."""
    final_episodes: int = 100
    """Episodes of the evaluation at the end."""
    num_envs: int = 8
    """Environments stepped side by side."""
    temperature: float = 0.5
    """Temperature of the actions; 0: always the most likely one."""
    random_episodes: int = 20
    """Episodes of a random agent, played once for comparison; 0: none."""
    max_steps: int | None = None
    """Bound on the agent's steps in an episode, beyond the game's own; None: the game's own alone."""
    max_seconds: float | None = None
    """Bound on an evaluation's wall time; episodes still open then are counted as they stand, and marked."""
    heldout_steps: int = 2_000
    """Steps of the newest evaluation that are kept in heldout/ for the report; never trained on."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    preset: str = "paper"
    """Preset that the settings start from: debug, tiny, catch, minatar, small or paper. Flags override it."""
    seed: int = 0
    """Seed of everything random: weights, environments, replay, actions."""
    device: str = "cpu"
    """torch device: cpu, cuda or mps (which is not tested)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: the networks' training passes run under autocast, weights and losses stay float32. Faster on
    a GPU; on a CPU measure first (`rem-atari benchmark`): at small sizes it is slower."""
    compile: bool = False
    """Compile the networks with torch.compile: the first updates take minutes, those after them less time.
    Off in the presets for a CPU, whose runs are too short for it."""
    cuda_graphs: bool = True
    """On a CUDA device: capture imagination as a CUDA graph and replay it, which is the same to the last bit
    and saves the launching of its many small kernels. Off: launch them one by one."""
    threads: int = 0
    """CPU threads torch uses; 0 leaves torch's own choice."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The game and its preprocessing."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The VQ-VAE."""
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    """The POP world model."""
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    """The actor-critic."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Epochs and collection."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """A configuration from `to_dict`'s data; unknown and missing names raise ValueError.

        Fields that a run folder of an earlier version lacks are filled in, see `earlier_versions`.
        """
        return from_dict(cls, with_added_fields(data))
