"""Training end to end at toy size: what a run leaves behind, and how it ends when something goes wrong."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import Point, run_part
from sides_env import SIDES_ID, Sides
from torch import nn

from rem_atari.agent import Agent
from rem_atari.cli import main
from rem_atari.config import Config, OptimConfig
from rem_atari.config.presets import PRESETS
from rem_atari.envs.vector import GameReturn
from rem_atari.errors import StoppedError
from rem_atari.evaluation import EvaluationResult
from rem_atari.models.tokenizer import Tokenizer
from rem_atari.replay.buffer import Replay
from rem_atari.report.contents import load_run, measure_quality
from rem_atari.runs import folder as run_folder
from rem_atari.runs.checkpoint import find_best, list_checkpoints, load_checkpoint, read_checkpoint
from rem_atari.runs.folder import create_run_folder
from rem_atari.runs.metrics import read_metrics
from rem_atari.runs.progress import make_progress
from rem_atari.training import trainer as trainer_module
from rem_atari.training import updates as updates_module
from rem_atari.training.component import Component
from rem_atari.training.schedule import plan_run, replay_capacity, updates_in_epoch
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import prepare_training
from rem_atari.training.signals import StopRequest
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.tokenizer_phase import TokenizerPhase
from rem_atari.training.trainer import Trainer
from rem_atari.training.updates import Metrics, Updates, run_updates

DEBUG = PRESETS["debug"]
OPTIM = OptimConfig(lr=0.1, weight_decay=0.5, clip_norm=1.0, batch_size=1, updates_per_epoch=1)


def train(config: Config, folder: Path) -> tuple[Agent, str]:
    """Train without the command line; the agent at the end, and what was shown."""
    shown = io.StringIO()
    run = create_run_folder(folder, config)
    with prepare_training(config) as parts:
        progress = make_progress(plan_run(config), config.schedule.epochs, shown)
        Trainer(config, run, parts, progress, StopRequest()).run()
        return parts.agent, shown.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Agent, str]:
    """A finished debug run: its folder, its agent, and what was shown."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    agent, shown = train(DEBUG, folder)
    return folder, agent, shown


def test_the_command_trains_reports_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--preset", "debug", "--run", str(run)]) == 0
    output = capsys.readouterr()
    assert "mean return: agent " in output.out
    assert "random play " in output.out
    assert f"report: {run / 'report.html'}" in output.out
    assert "\x1b" not in output.err, "a pipe gets no control characters"
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "replay", "heldout"} <= names
    assert "report.html" in names


def test_a_run_leaves_its_configuration_replay_and_heldout_games(trained: tuple[Path, Agent, str]) -> None:
    folder, _, _ = trained
    assert run_folder.open_run_folder(folder).load_config() == DEBUG
    steps = DEBUG.schedule.random_steps + 2 * DEBUG.schedule.steps_per_epoch
    assert Replay.load(folder / "replay").num_steps == steps == replay_capacity(DEBUG)
    heldout = Replay.load(folder / "heldout")
    assert 0 < heldout.num_steps <= DEBUG.evaluation.heldout_steps
    assert list((folder / "tensorboard").iterdir())


def test_a_run_that_was_stopped_has_held_out_games_of_its_last_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_part(folder, until=Point(0, "evaluate", 1)).stopped
    assert not list((folder / "heldout").glob("*"))
    assert run_part(folder, until=Point(1, "collect", 10), resume=True).stopped
    # Three games of five steps.
    assert Replay.load(folder / "heldout").num_steps >= 3 * 5
    quality = measure_quality(load_run(folder))
    assert quality.frames is not None
    assert quality.predictions is not None
    assert quality.horizon is not None


@pytest.mark.parametrize(("brightest", "is_told"), [(0, False), (10, True), (200, False)])
def test_symbols_in_the_shape_of_a_picture_are_doubted(
    brightest: int, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = np.full((24, 24, 3), brightest, np.uint8)

    def reset(self: Sides, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict]:
        self._side, self._step = 1, 0
        return frame, {}

    monkeypatch.setattr(Sides, "reset", reset)
    config = replace(DEBUG, env=replace(DEBUG.env, id=SIDES_ID))
    outcome = run_part(tmp_path / "run", config, until=Point(0, "random", 0))
    assert ("no pixel of the first frames is above 10 of 255" in outcome.shown) == is_told


def test_each_phase_of_each_epoch_has_a_line_of_metrics(trained: tuple[Path, Agent, str]) -> None:
    lines = read_metrics(trained[0] / "metrics.jsonl")
    phases = ["collect", "tokenizer", "world_model", "controller", "evaluate"]
    assert [(line["epoch"], line["phase"]) for line in lines] == [
        (0, "random"),
        (0, "collect_random"),
        *((0, phase) for phase in phases),
        *((1, phase) for phase in phases),
    ]
    wanted = {
        "collect_random": {"episodes", "steps", "entropy", "rate"},
        "collect": {"episodes", "steps", "entropy", "rate"},
        "tokenizer": {"loss", "reconstruction", "foreground_error", "codes_used", "grad_norm", "frozen"},
        "world_model": {"loss", "tokens", "reward", "end", "token_accuracy", "grad_norm", "updates"},
        "controller": {"loss", "policy", "value", "entropy", "imagined_return", "imagined_per_env_step"},
        "evaluate": {"mean_return", "median_return", "episodes", "unfinished", "final", "returns"},
        "random": {"mean_return", "episodes", "returns"},
    }
    for line in lines:
        assert wanted[line["phase"]] | {"seconds", "env_steps", "phase_seconds"} <= line.keys()
    assert [line["updates"] for line in lines if line["phase"] == "tokenizer"] == [4, 2]
    # Two updates on 4 episodes of 2 imagined steps in each epoch, for 64 + 32 real steps and 32 more.
    imagined = [line["imagined_per_env_step"] for line in lines if line["phase"] == "controller"]
    assert imagined == pytest.approx([16 / 96, 32 / 128])
    evaluations = [line for line in lines if line["phase"] == "evaluate"]
    assert [(line["episodes"], line["final"]) for line in evaluations] == [(3, 0), (5, 1)]
    collections = [line for line in lines if line["phase"].startswith("collect")]
    assert [line["env_steps"] for line in collections] == [64, 96, 128]
    assert [line["steps"] for line in collections] == [64, 32, 32]


def test_progress_has_a_line_for_each_phase(trained: tuple[Path, Agent, str]) -> None:
    lines = [line for line in trained[2].splitlines() if line.startswith("epoch ")]
    assert len(lines) == 12
    assert lines[1].startswith("epoch 1/2  collect random: 64 steps in ")
    assert lines[2].startswith("epoch 1/2  collect: 32 steps in ")
    assert lines[-1].startswith("epoch 2/2  evaluate: 5 episodes in ")
    assert lines[-1].endswith(" about 0:00 left")


def test_the_checkpoint_holds_the_agent_as_it_ended(trained: tuple[Path, Agent, str]) -> None:
    folder, agent, _ = trained
    checkpoint = load_checkpoint(folder / "checkpoints")
    loaded = Agent.from_config(DEBUG, checkpoint.state["num_actions"]).eval()
    loaded.load_state_dict(checkpoint.model)
    frames = Replay.load(folder / "heldout").sample_frames(5)
    tokens = agent.tokenizer.encode(frames)
    assert torch.equal(loaded.tokenizer.encode(frames), tokens)
    actions = torch.zeros(1, 5, dtype=torch.int64)
    with torch.no_grad():
        ours, theirs = (
            each.world_model(tokens[None], actions, agent.tokenizer.codes) for each in (agent, loaded)
        )
        assert all(torch.equal(mine, other) for mine, other in zip(ours[:3], theirs[:3], strict=True))
        codes = agent.tokenizer.embed(tokens)
        decisions = [each.controller(codes, each.controller.initial_carry(5)) for each in (agent, loaded)]
    assert torch.equal(decisions[0].logits, decisions[1].logits)
    assert checkpoint.state["epoch"] == 2
    assert checkpoint.state["updates"] == {"tokenizer": 6, "world_model": 4, "controller": 4}
    assert checkpoint.state["action_names"] == ["left", "stay", "right"]
    played = 20 + 20 + 30  # at random, and in two evaluations
    assert checkpoint.step == 2 + 128 + 6 + 4 + 4 + played
    assert len(list_checkpoints(folder / "checkpoints")) == 2


def test_every_component_has_learned(trained: tuple[Path, Agent, str]) -> None:
    with prepare_training(DEBUG) as parts:
        fresh = dict(parts.agent.named_parameters())
    for name, parameter in trained[1].named_parameters():
        assert not torch.equal(parameter, fresh[name]), f"{name} did not move"


def test_the_control_leaves_the_world_model_as_it_was_drawn_and_all_else_the_same(
    trained: tuple[Path, Agent, str], tmp_path: Path
) -> None:
    config = replace(DEBUG, world_model=replace(DEBUG.world_model, freeze_at_init=True))
    with prepare_training(config) as parts:
        drawn = {name: weight.clone() for name, weight in parts.agent.state_dict().items()}
    agent, _ = train(config, tmp_path / "control")
    moved = {name for name, weight in agent.state_dict().items() if not torch.equal(weight, drawn[name])}
    assert {name.split(".")[0] for name in moved} == {"tokenizer", "controller"}
    assert {name for name, _ in agent.controller.named_parameters(prefix="controller")} <= moved
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "control", trained[0]))
    assert [line["env_steps"] for line in ours] == [line["env_steps"] for line in theirs]
    for phase, names in (("tokenizer", ("loss", "grad_norm")), ("world_model", ("updates",))):
        first, other = (next(line for line in lines if line["phase"] == phase) for lines in (ours, theirs))
        assert [first[name] for name in names] == [other[name] for name in names]
    assert all(line["loss"] > 0 for line in ours if line["phase"] == "world_model")


def test_the_same_seed_gives_the_same_weights_and_another_one_others(
    trained: tuple[Path, Agent, str], tmp_path: Path
) -> None:
    folder, agent, _ = trained
    torch.rand(7)  # whatever was drawn before a run does not matter to it
    again, _ = train(DEBUG, tmp_path / "again")
    other, _ = train(replace(DEBUG, seed=1), tmp_path / "other")
    weights, others = agent.state_dict(), other.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())
    assert not all(torch.equal(weights[name], tensor) for name, tensor in others.items())

    def measured(run: Path) -> list[dict]:
        timing = ("seconds", "cpu_seconds", "phase_seconds", "rate", "frames_per_second")
        lines = read_metrics(run / "metrics.jsonl")
        return [{name: value for name, value in line.items() if name not in timing} for line in lines]

    assert measured(folder) == measured(tmp_path / "again")


def test_the_checkpoint_of_the_best_evaluation_is_kept_apart(tmp_path: Path) -> None:
    """The first of three is the best; there are checkpoints only at the end, but for the best."""
    returns = iter([0.5, 0.25, 0.5])
    schedule = replace(DEBUG.schedule, epochs=3, keep_best=True, checkpoint_every=9, keep_checkpoints=1)

    def fixed_return(*arguments: object, **options: object) -> EvaluationResult:
        return EvaluationResult((GameReturn(0, next(returns), 5),), 0, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "evaluate", fixed_return)
        train(replace(DEBUG, schedule=schedule), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    found = find_best(folder)
    assert found is not None
    assert read_checkpoint(found[1], found[0]).state["epoch"] == 1
    state = load_checkpoint(folder).state
    assert (state["epoch"], state["best_return"]) == (3, 0.5)
    assert len(list_checkpoints(folder)) == 1


def test_an_epoch_that_only_evaluates_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    idle = {
        name: replace(part, optim=replace(part.optim, updates_per_epoch=0, first_updates=None))
        for name, part in (
            ("tokenizer", DEBUG.tokenizer),
            ("world_model", DEBUG.world_model),
            ("controller", DEBUG.controller),
        )
    }
    train(replace(DEBUG, schedule=replace(DEBUG.schedule, collect_epochs=1), **idle), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert load_checkpoint(folder).state["epoch"] == 2
    assert len(list_checkpoints(folder)) == 2


def make_component(optim: OptimConfig = OPTIM) -> Component:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    return Component("layer", layer, optim)


def test_gradients_are_clipped_to_the_norm_and_weights_decayed() -> None:
    component = make_component()
    weight = component.module.weight
    metrics = component.apply((30 * weight[:, 0] + 40 * weight[:, 1]).sum(), {"share": 0.5})
    assert metrics["grad_norm"].item() == pytest.approx(50.0)
    assert metrics["share"] == 0.5
    assert component.module.weight.grad.norm().item() == pytest.approx(1.0)
    # AdamW's first step is lr in each direction; the decay takes lr * weight_decay of the weight.
    assert torch.allclose(component.module.weight, torch.full((1, 2), 1 - 0.1 * 0.5 - 0.1), atol=1e-5)


def test_an_optimiser_goes_on_from_its_tensors() -> None:
    first, second = make_component(), make_component()
    for _ in range(3):
        first.apply(first.module.weight.square().sum(), {})
    second.module.load_state_dict(first.module.state_dict())
    second.load_optimizer_tensors(first.optimizer_tensors() | {"other.0.step": torch.tensor(9.0)})
    for component in (first, second):
        component.apply(component.module.weight.square().sum(), {})
    assert torch.equal(first.module.weight, second.module.weight)


def test_only_the_world_model_spares_biases_norms_and_embeddings_the_decay(tmp_path: Path) -> None:
    with prepare_training(DEBUG) as parts:
        progress = make_progress([], 1, io.StringIO())
        trainer = Trainer(DEBUG, create_run_folder(tmp_path / "run", DEBUG), parts, progress, StopRequest())
    decays = {
        name: {
            id(parameter): group["weight_decay"]
            for group in phase.component.optimizer.param_groups
            for parameter in group["params"]
        }
        for name, phase in trainer.phases.items()
    }
    world_model = parts.agent.world_model
    assert decays["world_model"].keys() == {id(parameter) for parameter in world_model.parameters()}
    assert decays["world_model"][id(world_model.action_embedding.weight)] == 0
    assert decays["world_model"][id(world_model.reward_head[0].bias)] == 0
    assert decays["world_model"][id(world_model.reward_head[0].weight)] == 0.05
    assert set(decays["tokenizer"].values()) == set(decays["controller"].values()) == {0.01}


def make_tokenizer_phase(warnings: list[str], *, shade: int = 30, **changes: object) -> TokenizerPhase:
    """A phase on eight frames, each `shade` brighter than the one before."""
    config = replace(DEBUG.tokenizer, **changes)
    tokenizer = Tokenizer(config, DEBUG.env.frame_size)
    replay = Replay((24, 24, 3), 8, seed=0)
    for step in range(8):
        replay.append(
            0, torch.full((24, 24, 3), shade * step, dtype=torch.uint8).numpy(), 0, 0.0, False, False
        )
    component = Component("tokenizer", tokenizer, config.optim)
    tokens = TokenCache(replay, tokenizer)
    return TokenizerPhase(
        tokenizer, component, replay, tokens, config, torch.Generator().manual_seed(0), warnings.append
    )


def test_a_freeze_waits_for_the_foreground_error() -> None:
    torch.manual_seed(0)
    warnings: list[str] = []
    phase = make_tokenizer_phase(warnings, freeze_epoch=2, freeze_foreground_error=1e-9)
    assert phase.prepare(0)
    phase.update()
    assert phase.prepare(1)
    assert warnings == []
    assert phase.prepare(2), "the error is too high: it goes on training"
    assert not phase.is_over
    assert "above tokenizer.freeze_foreground_error" in warnings[0]
    again = make_tokenizer_phase(warnings, freeze_epoch=2, freeze_foreground_error=1e-9)
    again.load_state(phase.state())
    again.component.updates = 1
    assert again.prepare(3), "it is said once, in a run that was resumed too"
    phase.foreground_error = 0.0
    assert not phase.prepare(3)
    assert phase.is_over
    phase.foreground_error = 1.0
    assert not phase.prepare(4), "once frozen, always frozen"
    assert phase.more_metrics({}) == {"frozen": 1.0}
    assert len(warnings) == 1


def test_a_tokenizer_that_never_trained_does_not_freeze() -> None:
    phase = make_tokenizer_phase([], freeze_epoch=0, freeze_foreground_error=100.0)
    assert phase.prepare(0)


def test_a_tokenizer_that_saw_no_foreground_does_not_freeze_but_warns() -> None:
    torch.manual_seed(0)
    warnings: list[str] = []
    phase = make_tokenizer_phase(warnings, shade=0, freeze_epoch=1, freeze_foreground_error=100.0)
    assert phase.prepare(0)
    assert math.isnan(phase.update()["foreground_error"])
    assert phase.prepare(1), "an error that nothing was measured on is not a low one"
    assert not phase.is_over
    assert "none of the pixels that it trained on differed from the median frame" in warnings[0]


def test_updates_without_foreground_leave_the_running_error_as_it_is() -> None:
    torch.manual_seed(0)
    phase = make_tokenizer_phase([], freeze_epoch=1)
    assert phase.prepare(0)
    phase.update()
    before = phase.foreground_error
    assert before is not None
    phase._track(math.nan)
    assert phase.foreground_error == before


def test_without_a_freeze_the_foreground_error_is_not_waited_for() -> None:
    torch.manual_seed(0)
    phase = make_tokenizer_phase([], freeze_epoch=None)
    assert phase.prepare(0)
    phase.update()
    assert phase.foreground_error is None


def test_codes_start_from_data_once() -> None:
    torch.manual_seed(0)
    phase = make_tokenizer_phase([], init_from_data=True)
    assert phase.prepare(0)
    before = phase.component.module.codes.clone()
    phase.update()
    after = phase.component.module.codes.clone()
    phase.update()
    last = phase.component.module.codes
    # An update moves a code by about its learning rate, 1e-3; the start from data moves it anywhere.
    assert (after - before).abs().max() > 0.05
    assert (last - after).abs().max() < 0.01


def test_too_little_experience_makes_a_phase_wait_with_a_warning(tmp_path: Path) -> None:
    """Games of Catch have five steps; the context alone has eight."""
    config = replace(
        DEBUG,
        world_model=replace(DEBUG.world_model, context_blocks=8, sequence_blocks=10),
        schedule=replace(DEBUG.schedule, epochs=1),
    )
    _, shown = train(config, tmp_path / "run")
    assert "no episode collected so far has 9 steps; the world model does not train yet" in shown
    line = next(
        line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["phase"] == "world_model"
    )
    assert line["updates"] == 0


def make_updates(update: Callable[[], Metrics], *, count: int, max_seconds: float | None = None) -> Updates:
    updates = Updates()
    run_updates(update, updates, count=count, max_seconds=max_seconds, after_update=lambda: None)
    return updates


def test_updates_are_averaged_and_counted() -> None:
    losses = iter([1.0, 2.0, 6.0])
    means = make_updates(lambda: {"loss": torch.tensor(next(losses)), "share": 0.5}, count=3).means()
    assert (means["loss"], means["share"], means["updates"]) == (3.0, 0.5, 3)


def test_updates_that_were_stopped_go_on_as_if_they_had_not_been() -> None:
    """Stopped after each, and taken over into a checkpoint's tensors and back."""
    losses = iter([0.1, 0.2, math.nan, 0.4])

    def stop() -> None:
        raise StoppedError("enough")

    updates = Updates()
    for done in range(1, 5):
        with pytest.raises(StoppedError):
            run_updates(
                lambda: {"loss": torch.tensor(next(losses))},
                updates,
                count=4,
                max_seconds=None,
                after_update=stop,
            )
        assert updates.done == done
        again = Updates(updates.done, updates.seconds)
        again.load_tensors(updates.tensors())
        updates = again
    run_updates(lambda: {}, updates, count=4, max_seconds=None, after_update=stop)
    assert updates.means()["loss"] == torch.tensor([0.1, 0.2, 0.4]).mean().item()


def test_what_an_update_could_not_measure_is_left_out_of_the_mean() -> None:
    errors = iter([1.0, math.nan, 3.0])
    means = make_updates(lambda: {"error": torch.tensor(next(errors)), "never": math.nan}, count=3).means()
    assert means["error"] == 2.0
    assert math.isnan(means["never"])


def test_updates_end_when_the_time_is_up_but_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}

    def update() -> dict[str, float]:
        clock["now"] += 2.0
        return {}

    monkeypatch.setattr(updates_module.time, "monotonic", lambda: clock["now"])
    bounded = make_updates(update, count=100, max_seconds=5.0).means()
    assert (bounded["updates"], bounded["phase_seconds"], bounded["rate"]) == (3, 6.0, 0.5)
    assert make_updates(update, count=100, max_seconds=0.0).done == 1
    # Time that was spent before the run was resumed counts.
    updates = Updates(done=1, seconds=4.0)
    run_updates(update, updates, count=100, max_seconds=5.0, after_update=lambda: None)
    assert (updates.done, updates.seconds) == (2, 6.0)


def test_the_schedule_of_a_component() -> None:
    optim = replace(OPTIM, updates_per_epoch=10, first_updates=300, start_epoch=3)
    assert updates_in_epoch(optim, 2, first=True) == 0
    assert updates_in_epoch(optim, 3, first=True) == 300
    assert updates_in_epoch(optim, 4, first=False) == 10
    assert updates_in_epoch(replace(optim, first_updates=None), 3, first=True) == 10


def test_the_plan_of_the_published_run() -> None:
    plan = plan_run(PRESETS["paper"])
    units = {
        phase: sum(work.units for work in plan if work.phase == phase)
        for phase in ("collect", "tokenizer", "world_model", "controller", "evaluate")
    }
    assert units == {
        "collect": 100_000,
        "tokenizer": 595 * 200,
        "world_model": 575 * 200,
        "controller": 550 * 100,
        "evaluate": 59 * 16 + 100,
    }
    assert replay_capacity(PRESETS["paper"]) == 100_000


def test_seeds_differ_by_purpose_and_never_change() -> None:
    assert derive_seed(0, "replay") == derive_seed(0, "replay")
    seeds = {derive_seed(seed, *purpose) for seed in (0, 1) for purpose in (("replay",), ("a", 1), ("a", 2))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
