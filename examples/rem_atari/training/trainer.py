"""The trainer. `Trainer.run` is an epoch: collect, train tokenizer, world model and controller, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from rem_atari.config import Config
from rem_atari.envs.frames import doubt_pictures
from rem_atari.errors import (
    EnvironmentAnswerError,
    EnvironmentDiedError,
    NonFiniteError,
    RunError,
    StoppedError,
    describe_os_error,
)
from rem_atari.evaluation import EvaluationResult, describe_mean, evaluate, evaluate_random
from rem_atari.play.collector import collect, collect_random
from rem_atari.replay.buffer import Replay
from rem_atari.replay.recorded import read_recorded
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

ENDS = (StoppedError, NonFiniteError, EnvironmentDiedError, EnvironmentAnswerError)
"""Errors that end a run in a state that can be saved."""


class Trainer:
    """One training run, from fresh weights or a checkpoint to the last evaluation.

    Metrics and experience that a folder's files hold beyond the checkpoint are cut off; the run writes them
    again, exactly as they were.

    Args:
        config: the run's configuration, checked.
        run: its folder.
        parts: environments and agent.
        progress: shown to the user.
        stop: checked between steps.
        checkpoint: the checkpoint to continue from; None: the beginning.

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
        self._game = {
            "num_actions": parts.envs.num_actions,
            "action_names": parts.envs.action_names,
            "sees": parts.envs.sees,
        }
        self._progress = progress
        self._stop = stop
        self._is_new = checkpoint is None
        self._told_of_rewards = False
        replay, notes = reopen_replay(config, run, checkpoint, progress.say)
        self._state = assemble(config, parts, replay, progress.say)
        self.phases = self._state.phases
        """The components' phases, by name."""
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
        """Train through all epochs that are left, from the phase in which the run was stopped.

        Raises:
            StoppedError: a signal asked for it; a checkpoint has been saved.
            NonFiniteError: a loss or gradient was not finite and not applied; the state has been saved.
            EnvironmentDiedError: an environment died too often; the state before that has been saved.
            EnvironmentAnswerError: an environment answered what none may; the state before has been saved.
            RunError: one of these, and the state could not be saved.
        """
        state, phases = self._state, self.phases
        with self._saving_where_it_stops():
            if self._is_new:
                state.env.reset()
                doubt = doubt_pictures(state.env.frames)
                if doubt is not None:
                    self._progress.say(f"warning: {doubt}")
            while state.epoch < self._config.schedule.epochs:
                if state.enter("random") and state.epoch == 0:
                    self._play_at_random()
                if state.enter("collect_random") and state.epoch == 0:
                    if self._config.schedule.recorded is None:
                        self._collect_random()
                    else:
                        self._read_recorded(self._config.schedule.recorded)
                if state.enter("collect"):
                    self._collect()
                if state.enter("tokenizer"):
                    self._train(phases["tokenizer"])
                if state.enter("world_model"):
                    self._train(phases["world_model"])
                if state.enter("controller"):
                    self._train(phases["controller"])
                is_best = state.enter("evaluate") and self._evaluate()
                state.end_epoch()
                self._save_if_due(is_best=is_best)

    @contextmanager
    def _saving_where_it_stops(self) -> Iterator[None]:
        """Save the run where it is stopped or cannot continue; always close its metrics."""
        try:
            yield
        except BaseException as error:
            try:
                if isinstance(error, ENDS) and self._state.env.is_started:
                    self._save_because_of(error)
            finally:
                # Report the error that ended the run, not a failure to close the log on a full disk.
                with suppress(OSError):
                    self._metrics.close()
            raise
        self._metrics.close()

    def _save_because_of(self, error: RunError) -> None:
        """Save the run's state; a failed save must not hide the error that ended the run."""
        try:
            self._save()
            self._write_interrupted()
        except Exception as failed:
            why = describe_os_error(failed) if isinstance(failed, OSError) else str(failed)
            raise RunError(f"{error}; and no checkpoint could be saved: {why}") from error
        if isinstance(error, StoppedError):
            self._progress.say(f"saved; `{resume_command(self._config.env, self._run.path)}` goes on")

    def _play_at_random(self) -> None:
        """Random play for comparison, before anything is learned."""
        state = self._state
        episodes = self._config.evaluation.random_episodes if state.units is None else state.units
        if episodes == 0:
            return
        state.units = episodes
        with self._showing(episodes, done=len(state.evaluation.games)):
            result = evaluate_random(
                state.agent,
                self._config,
                episodes=episodes,
                seed=derive_seed(self._config.seed, "random"),
                after_step=self._advance,
                evaluation=state.evaluation,
            )
        self._write(result.metrics())

    def _collect_random(self) -> None:
        """Collect random experience before the first epoch."""
        state = self._state
        play = partial(collect_random, state.env, state.collection, generator=state.random["random steps"])
        self._collect_steps(play, self._config.schedule.random_steps)

    def _read_recorded(self, source: str) -> None:
        """Read recorded episodes in place of the run's own experience, all of them or none."""
        state = self._state
        with self._showing(state.replay.room):
            state.collection.take_recorded(
                read_recorded(
                    source, frame_size=self._config.env.frame_size, num_actions=state.env.num_actions
                ),
                state.replay,
                self._progress.advance,
            )
        state.replay.flush()
        self._write(state.collection.metrics())

    def _collect(self) -> None:
        """The agent's own experience."""
        state, cfg = self._state, self._config.controller
        play = partial(
            collect,
            state.env,
            state.agent.controller,
            state.collection,
            generator=state.random["actions"],
            temperature=cfg.temperature,
            epsilon=cfg.epsilon,
        )
        self._collect_steps(play, steps_in_epoch(self._config, state.epoch))

    def _collect_steps(self, play: Callable[..., None], steps: int) -> None:
        """Play `steps` steps, or the rest of them, into the replay."""
        if steps == 0:
            return
        state = self._state
        state.units = steps if state.units is None else state.units
        with self._showing(state.units, done=state.collection.steps):
            play(
                steps=state.units,
                after_step=self._after_collected,
                max_seconds=self._config.schedule.collect_max_seconds,
                repeat=self._config.controller.random_repeat,
            )
        state.replay.flush()
        self._write(state.collection.metrics())

    def _train(self, phase: TrainingPhase) -> None:
        """An epoch's updates of one component, or those of them that are left."""
        state, component = self._state, phase.component
        if state.units is not None:
            phase.go_on()
        elif not self._begin_training(phase):
            return
        component.module.train()
        with self._showing(state.units, done=state.updates.done):
            run_updates(
                lambda: self._update(phase),
                state.updates,
                count=state.units,
                max_seconds=component.config.max_seconds,
                after_update=self._advance,
            )
        component.settle()
        component.module.eval()
        means = state.updates.means()
        self._write(means | phase.more_metrics(means))

    def _begin_training(self, phase: TrainingPhase) -> bool:
        """Whether there are updates to make in this epoch; if not, write a line of metrics."""
        state, component = self._state, phase.component
        updates = updates_in_epoch(component.config, state.epoch, first=component.updates == 0)
        if updates == 0:
            return False
        if phase.prepare(state.epoch):
            state.units = updates
            return True
        if phase.is_over:
            self._progress.time_left.drop(component.name)
        means = {"updates": 0.0, "phase_seconds": 0.0, "rate": 0.0}
        self._write(means | phase.more_metrics(means))
        return False

    def _update(self, phase: TrainingPhase) -> Metrics:
        """One update; if it is not applied, the random state before it is restored, for inspection."""
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
        with self._showing(episodes, done=len(state.evaluation.games)):
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
        self._write(metrics | {"final": int(final)})
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
        # Files of an earlier evaluation. The recordings of an interrupted one are in its checkpoint.
        delete_shards(self._run.heldout)
        side = self._config.env.frame_size
        seed = derive_seed(self._config.seed, "heldout")
        return Replay((side, side, 3), steps, folder=self._run.heldout, seed=seed)

    def _showing(self, units: int, *, done: int = 0) -> AbstractContextManager[None]:
        """Show the phase under way while it does its `units`, `done` of them before the run was resumed."""
        return self._progress.phase(self._state.epoch, self._state.phase, units, done=done)

    def _after_collected(self, units: int) -> None:
        """Warn once about reward sizes that the world model does not learn."""
        sizes = self._state.collection.sizes
        learns_signs = self._config.world_model.reward_bins == 0
        if learns_signs and not sizes.are_signs and not self._told_of_rewards:
            self._told_of_rewards = True
            self._progress.say(
                f"warning: the game gives a reward of size {sizes.largest:g}, and the world model learns only"
                " the signs of rewards: to the agent each is worth -1, 0 or +1. --world-model.reward-bins 255"
                " teaches their sizes"
            )
        self._advance(units)

    def _advance(self, units: int = 1) -> None:
        """Record progress of the current phase; a signal may stop the run here, between two steps."""
        self._progress.advance(units)
        self._stop.check()

    def _write(self, values: Mapping[str, MetricValue]) -> None:
        """A line of metrics of the phase under way."""
        state = self._state
        self._metrics.write(state.phase, epoch=state.epoch, env_steps=state.replay.num_steps, values=values)

    def _write_interrupted(self) -> None:
        """Write a line for the finished part of the current phase. A resumption cuts it off."""
        state = self._state
        if state.units is None or state.phase in ("random", "evaluate"):
            return  # part of an evaluation is no result
        part = state.updates.means() if state.phase in self.phases else state.collection.metrics()
        self._write(part | {"interrupted": 1})

    def _save_if_due(self, *, is_best: bool) -> None:
        """At an epoch's end, save if a checkpoint is due, the run ends, or the agent is the best so far."""
        epoch, schedule = self._state.epoch, self._config.schedule
        keep_this = is_best and schedule.keep_best
        if epoch % schedule.checkpoint_every == 0 or epoch == schedule.epochs or keep_this:
            self._save(best=keep_this)

    def _save(self, *, best: bool = False) -> None:
        """Save a checkpoint; the files that it refers to are on the disk before it."""
        state, schedule = self._state, self._config.schedule
        state.replay.flush()
        self._metrics.sync()
        more = {
            **self._game,
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
        """Continue from a checkpoint, and report what could not be restored."""
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
    games = f"{len(result.games)} games{marked}"
    return f"evaluation after epoch {epoch + 1}: mean return {describe_mean(mean)} over {games}"
