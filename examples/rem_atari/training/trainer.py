"""The trainer: epoch by epoch collect, train the tokenizer, the world model and the controller, evaluate."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from rem_atari.config import Config
from rem_atari.errors import (
    EnvironmentAnswerError,
    EnvironmentDiedError,
    NonFiniteError,
    RunError,
    StoppedError,
    describe_os_error,
)
from rem_atari.evaluation import EvaluationResult, evaluate, evaluate_random
from rem_atari.play.collector import collect, collect_random
from rem_atari.replay.buffer import Replay
from rem_atari.replay.shards import delete_shards
from rem_atari.runs.checkpoint import Checkpoint, save_checkpoint
from rem_atari.runs.command_line import resume_command
from rem_atari.runs.config_file import config_text
from rem_atari.runs.folder import RunFolder
from rem_atari.runs.metrics import MetricsLog, MetricValue
from rem_atari.runs.progress import Progress
from rem_atari.training.assembly import assemble
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.resume import LogState, describe_machine, explain_differences, reopen_replay
from rem_atari.training.schedule import evaluation_episodes, steps_in_epoch, updates_in_epoch
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import TrainingParts
from rem_atari.training.signals import StopRequest
from rem_atari.training.updates import Metrics, run_updates


class Trainer:
    """One training run, from fresh weights or a checkpoint to the last evaluation.

    What a checkpoint does not hold of a folder's files (metrics, experience) is cut off: the run writes it
    again, exactly as it was.

    Args:
        config: the run's configuration, checked.
        run: its folder.
        parts: environments and agent.
        progress: shown to the user.
        stop: asked between steps whether to stop.
        checkpoint: where to go on from; None: from the beginning.

    Raises:
        CheckpointError: the checkpoint is not one of this run.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        parts: TrainingParts,
        progress: Progress,
        stop: StopRequest,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._config = config
        self._run = run
        self._action_names = parts.envs.action_names
        self._progress = progress
        self._stop = stop
        self._is_new = checkpoint is None
        self._told_of_rewards = False
        replay, notes = reopen_replay(config, run, checkpoint, progress.say)
        self._state = assemble(config, parts, replay, progress.say)
        self.phases = self._state.phases
        """The components' turns, in order, by name."""
        log = LogState.of(checkpoint)
        if checkpoint is not None:
            self._load(checkpoint, notes, log)
        self._metrics = MetricsLog(
            run.metrics,
            run.tensorboard,
            keep=log.metric_lines,
            seconds=log.seconds,
            cpu_seconds=log.cpu_seconds,
        )

    def run(self) -> None:
        """Train through all epochs that are left.

        Raises:
            StoppedError: a signal asked for it; a checkpoint has been saved.
            NonFiniteError: a loss or gradient was not finite; the state before it has been saved.
            EnvironmentDiedError: an environment died too often; the state before that has been saved.
            EnvironmentAnswerError: an environment answered what none may; the state before has been saved.
            RunError: one of these, and the state could not be saved.
        """
        try:
            self._run_epochs()
        except BaseException:
            # What ended the run is to be told, not what a full disk makes of the log's end.
            with contextlib.suppress(OSError):
                self._metrics.close()
            raise
        self._metrics.close()

    def _run_epochs(self) -> None:
        if self._is_new:
            self._state.env.reset()  # should that fail, there is nothing to save yet
        try:
            while self._state.epoch < self._config.schedule.epochs:
                self._run_phase()
        except (StoppedError, NonFiniteError, EnvironmentDiedError, EnvironmentAnswerError) as error:
            self._save_interrupted(error)
            raise

    def _save_interrupted(self, error: RunError) -> None:
        """Save where the run is, because of `error`, which a save that fails must not hide."""
        try:
            self._save()
            self._write_interrupted()
        except Exception as failed:
            why = describe_os_error(failed) if isinstance(failed, OSError) else str(failed)
            raise RunError(f"{error}; and no checkpoint could be saved: {why}") from error
        if isinstance(error, StoppedError):
            self._progress.say(f"saved; `{resume_command(self._config.env, self._run.path)}` goes on")

    def _run_phase(self) -> None:
        """Run the phase that is due, or the rest of it; then save, if it's time to."""
        state, schedule = self._state, self._config.schedule
        is_best = False
        match state.phase:
            case "random":
                self._play_at_random()
            case "collect_random" | "collect":
                self._collect(state.phase)
            case "evaluate":
                is_best = self._evaluate()
            case _:
                self._train(self.phases[state.phase])
        begun = state.epoch
        state.next_phase()
        if state.epoch == begun:
            return
        keep_this = is_best and schedule.keep_best
        if state.epoch % schedule.checkpoint_every == 0 or state.epoch == schedule.epochs or keep_this:
            self._save(best=keep_this)

    def _play_at_random(self) -> None:
        """Before the first epoch: random play for comparison."""
        state = self._state
        episodes = self._config.evaluation.random_episodes if state.units is None else state.units
        if episodes == 0 or state.epoch > 0:
            return
        state.units = episodes
        with self._progress.phase(0, "random", episodes, done=len(state.evaluation.games)):
            result = evaluate_random(
                state.agent,
                self._config,
                episodes=episodes,
                seed=derive_seed(self._config.seed, "random"),
                after_step=self._advance,
                evaluation=state.evaluation,
            )
        self._write("random", result.metrics())

    def _collect(self, phase: str) -> None:
        """Random experience before the first epoch, the agent's own in every one."""
        state, config = self._state, self._config
        if phase == "collect":
            steps = steps_in_epoch(config, state.epoch)
        else:
            steps = config.schedule.random_steps if state.epoch == 0 else 0
        if steps == 0:
            return
        state.units = steps if state.units is None else state.units
        bounds = {
            "steps": state.units,
            "generator": state.random["random steps" if phase == "collect_random" else "actions"],
            "after_step": self._after_collected,
            "max_seconds": config.schedule.collect_max_seconds,
        }
        with self._progress.phase(state.epoch, phase, state.units, done=state.collection.steps):
            if phase == "collect_random":
                collect_random(state.env, state.collection, **bounds)
            else:
                temperature, epsilon = config.controller.temperature, config.controller.epsilon
                collect(
                    state.env,
                    state.agent.controller,
                    state.collection,
                    temperature=temperature,
                    epsilon=epsilon,
                    **bounds,
                )
        state.replay.flush()
        self._write(phase, state.collection.metrics())

    def _train(self, phase: TrainingPhase) -> None:
        state, component = self._state, phase.component
        if state.units is None:
            updates = updates_in_epoch(component.config, state.epoch, first=component.updates == 0)
            if updates == 0:
                return
            if not phase.prepare(state.epoch):
                if phase.is_over:
                    self._progress.time_left.drop(component.name)
                means = {"updates": 0.0, "phase_seconds": 0.0, "rate": 0.0}
                self._write(component.name, means | phase.more_metrics(means))
                return
            state.units = updates
        else:
            phase.go_on()
        component.module.train()
        with self._progress.phase(state.epoch, component.name, state.units, done=state.updates.done):
            run_updates(
                lambda: self._update(phase),
                state.updates,
                count=state.units,
                max_seconds=component.config.max_seconds,
                after_update=self._advance,
            )
        component.module.eval()
        means = state.updates.means()
        self._write(component.name, means | phase.more_metrics(means))

    def _update(self, phase: TrainingPhase) -> Metrics:
        """One update; where it is not applied, nothing has happened, so that it can be looked at again."""
        random = self._state.random.snapshot()
        kept = [(tensor, tensor.detach().clone()) for tensor in phase.changed_on_the_way()]
        try:
            return phase.update()
        except NonFiniteError:
            self._state.random.restore(random)
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)
            raise

    def _evaluate(self) -> bool:
        """Evaluate if it's time to; whether the mean return is the best so far."""
        state = self._state
        episodes = evaluation_episodes(self._config, state.epoch) if state.units is None else state.units
        if episodes == 0:
            return False
        state.units = episodes
        final = state.epoch == self._config.schedule.epochs - 1
        heldout = self._make_heldout()
        with self._progress.phase(state.epoch, "evaluate", episodes, done=len(state.evaluation.games)):
            result = evaluate(
                state.agent,
                self._config,
                episodes=episodes,
                seed=derive_seed(self._config.seed, "evaluation", state.epoch),
                heldout=heldout,
                after_step=self._advance,
                evaluation=state.evaluation,
            )
        if heldout is not None:
            heldout.flush()
        metrics = result.metrics()
        self._write("evaluate", metrics | {"final": int(final)})
        self._progress.say(_describe(result, state.epoch))
        mean = metrics.get("mean_return")
        is_best = mean is not None and (state.best_return is None or mean > state.best_return)
        if is_best:
            state.best_return = mean
        return is_best

    def _make_heldout(self) -> Replay | None:
        steps = self._config.evaluation.heldout_steps
        if steps == 0:
            return None
        # Those of an earlier evaluation. What an interrupted one recorded is in its checkpoint.
        delete_shards(self._run.heldout)
        side = self._config.env.frame_size
        seed = derive_seed(self._config.seed, "heldout")
        return Replay((side, side, 3), steps, folder=self._run.heldout, seed=seed)

    def _after_collected(self, units: int) -> None:
        """Say once, and as soon as it is seen, what the world model does not learn of the game's rewards."""
        sizes = self._state.collection.sizes
        if not sizes.are_signs and not self._told_of_rewards:
            self._told_of_rewards = True
            self._progress.say(
                f"warning: the game gives a reward of size {sizes.largest:g}, and the world model learns only"
                " the signs of rewards: to the agent each is worth -1, 0 or +1"
            )
        self._advance(units)

    def _advance(self, units: int = 1) -> None:
        """The running phase has done so much more; between two of its steps a signal may stop the run."""
        self._progress.advance(units)
        self._stop.check()

    def _write(self, phase: str, values: Mapping[str, MetricValue]) -> None:
        state = self._state
        self._metrics.write(phase, epoch=state.epoch, env_steps=state.replay.num_steps, values=values)

    def _write_interrupted(self) -> None:
        """A line for the part that was done of the phase under way. When the run goes on, it is cut off."""
        state = self._state
        if state.units is None or state.phase in ("random", "evaluate"):
            return  # half an evaluation is no result
        part = state.updates.means() if state.phase in self.phases else state.collection.metrics()
        self._write(state.phase, part | {"interrupted": 1})

    def _save(self, *, best: bool = False) -> None:
        """Save a checkpoint; what it refers to is on the disk before it."""
        state, schedule = self._state, self._config.schedule
        state.replay.flush()
        self._metrics.sync()
        more = {
            "num_actions": state.env.num_actions,
            "action_names": self._action_names,
            "metric_lines": self._metrics.num_lines,
            "seconds": self._metrics.seconds,
            "cpu_seconds": self._metrics.cpu_seconds,
            "pace": self._progress.time_left.pace,
            "machine": describe_machine(self._config.device),
        }
        shards: list[Path] = [self._run.replay / entry.name for entry in state.replay.shards]
        save_checkpoint(
            self._run.checkpoints,
            state.checkpoint(more, config_text(self._config)),
            keep=schedule.keep_checkpoints,
            shards=shards,
            best=best,
        )

    def _load(self, checkpoint: Checkpoint, notes: list[str], log: LogState) -> None:
        """Go on from a checkpoint, and say what is not as it was."""
        seed = derive_seed(self._config.seed, "environments", checkpoint.step)
        for index in self._state.load(checkpoint, seed=seed):
            notes.append(
                f"environment {index} could not be saved: it starts anew, and its open episode ends as"
                " truncated"
            )
        for note in notes:
            self._progress.say(f"warning: {note}")
        self._state.notes += notes
        difference = explain_differences(log.machine, describe_machine(self._config.device))
        if difference is not None:
            self._progress.say(difference)
        self._progress.time_left.pace.update(log.pace)


def _describe(result: EvaluationResult, epoch: int) -> str:
    mean = result.metrics().get("mean_return")
    if mean is None:
        return f"evaluation after epoch {epoch + 1}: no game was played in its time"
    marked = f", {result.unfinished} of them unfinished" if result.unfinished else ""
    return (
        f"evaluation after epoch {epoch + 1}: mean return {mean:.2f} over {len(result.games)} games{marked}"
    )
