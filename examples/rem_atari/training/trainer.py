"""The trainer: epoch by epoch collect, train the tokenizer, the world model and the controller, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rem_atari.checkpoint import Checkpoint, save_checkpoint
from rem_atari.collector import CollectStats, RealEnv, collect, collect_random
from rem_atari.config import Config
from rem_atari.errors import NonFiniteError, StoppedError
from rem_atari.evaluation import EvaluationResult, evaluate, evaluate_random
from rem_atari.metrics import MetricsLog, MetricValue
from rem_atari.models.controller import Carry
from rem_atari.models.parameter_groups import parameter_groups
from rem_atari.progress import Progress
from rem_atari.replay import Replay
from rem_atari.run_folder import RunFolder
from rem_atari.training.component import Component
from rem_atari.training.controller_phase import ControllerPhase
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.schedule import evaluation_episodes, replay_capacity, steps_in_epoch, updates_in_epoch
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import TrainingParts
from rem_atari.training.signals import StopRequest
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.tokenizer_phase import TokenizerPhase
from rem_atari.training.updates import run_updates
from rem_atari.training.world_model_phase import WorldModelPhase


class Trainer:
    """One training run, from fresh weights to the last evaluation.

    Args:
        config: the run's configuration, checked.
        run: its folder, new.
        parts: environments and agent.
        progress: shown to the user.
        stop: asked between steps whether to stop.
    """

    def __init__(
        self, config: Config, run: RunFolder, parts: TrainingParts, progress: Progress, stop: StopRequest
    ) -> None:
        self._config = config
        self._run = run
        self._agent = parts.agent.eval()
        self._action_names = parts.envs.action_names
        self._progress = progress
        self._stop = stop
        self._replay = self._make_replay("replay", replay_capacity(config), run.replay)
        self._env = RealEnv(parts.envs, parts.agent.tokenizer, self._replay, device=config.device)
        self._carry: Carry | None = None
        self._actions = self._generator("actions")
        self.phases = self._make_phases()
        """The components' turns, in order, by name."""
        self._metrics = MetricsLog(run.metrics, run.tensorboard)

    def run(self) -> None:
        """Train through all epochs.

        Raises:
            StoppedError: a signal asked for it; a checkpoint has been saved.
            NonFiniteError: a loss or gradient was not finite; the state before it has been saved.
        """
        epoch = 0
        try:
            self._begin()
            for epoch in range(self._config.schedule.epochs):
                self._run_epoch(epoch)
        except (StoppedError, NonFiniteError):
            self._save(epoch)
            raise
        finally:
            self._metrics.close()

    def _begin(self) -> None:
        """Before the first epoch: random play for comparison, random experience to start from."""
        self._env.reset()
        episodes = self._config.evaluation.random_episodes
        if episodes > 0:
            seed = derive_seed(self._config.seed, "random")
            with self._progress.phase(0, "random", episodes):
                result = evaluate_random(
                    self._agent, self._config, episodes=episodes, seed=seed, after_step=self._advance
                )
            self._write("random", 0, result.metrics())
        steps = self._config.schedule.random_steps
        if steps > 0:
            generator = torch.Generator().manual_seed(derive_seed(self._config.seed, "random steps"))
            bound = self._config.schedule.collect_max_seconds
            with self._progress.phase(0, "collect_random", steps):
                stats = collect_random(
                    self._env, steps=steps, generator=generator, after_step=self._advance, max_seconds=bound
                )
            self._keep_collected("collect_random", 0, stats)

    def _run_epoch(self, epoch: int) -> None:
        self._collect(epoch)
        for phase in self.phases.values():
            self._train(phase, epoch)
        self._evaluate(epoch)
        schedule = self._config.schedule
        if (epoch + 1) % schedule.checkpoint_every == 0 or epoch == schedule.epochs - 1:
            self._save(epoch + 1)

    def _collect(self, epoch: int) -> None:
        steps = steps_in_epoch(self._config, epoch)
        if steps == 0:
            return
        with self._progress.phase(epoch, "collect", steps):
            stats, self._carry = collect(
                self._env,
                self._agent.controller,
                self._carry,
                steps=steps,
                temperature=self._config.controller.temperature,
                epsilon=self._config.controller.epsilon,
                generator=self._actions,
                after_step=self._advance,
                max_seconds=self._config.schedule.collect_max_seconds,
            )
        self._keep_collected("collect", epoch, stats)

    def _keep_collected(self, phase: str, epoch: int, stats: CollectStats) -> None:
        self._replay.flush()
        self._write(phase, epoch, stats.metrics())

    def _train(self, phase: TrainingPhase, epoch: int) -> None:
        component = phase.component
        updates = updates_in_epoch(component.config, epoch, first=component.updates == 0)
        if updates == 0:
            return
        means = {"updates": 0.0, "phase_seconds": 0.0, "rate": 0.0}
        if phase.prepare(epoch):
            component.module.train()
            with self._progress.phase(epoch, component.name, updates):
                means = run_updates(
                    phase.update,
                    count=updates,
                    max_seconds=component.config.max_seconds,
                    after_update=self._advance,
                )
            component.module.eval()
        elif phase.is_over:
            self._progress.time_left.drop(component.name)
        self._write(component.name, epoch, means | phase.more_metrics(means))

    def _evaluate(self, epoch: int) -> None:
        episodes = evaluation_episodes(self._config, epoch)
        if episodes == 0:
            return
        final = epoch == self._config.schedule.epochs - 1
        heldout = self._make_heldout() if final else None
        with self._progress.phase(epoch, "evaluate", episodes):
            result = evaluate(
                self._agent,
                self._config,
                episodes=episodes,
                seed=derive_seed(self._config.seed, "evaluation", epoch),
                heldout=heldout,
                after_step=self._advance,
            )
        if heldout is not None:
            heldout.flush()
        self._write("evaluate", epoch, result.metrics() | {"final": int(final)})
        self._progress.say(_describe(result, epoch))

    def _make_heldout(self) -> Replay | None:
        steps = self._config.evaluation.heldout_steps
        return self._make_replay("heldout", steps, self._run.heldout) if steps > 0 else None

    def _advance(self, units: int = 1) -> None:
        """The running phase has done so much more; between two of its steps a signal may stop the run."""
        self._progress.advance(units)
        self._stop.check()

    def _write(self, phase: str, epoch: int, values: Mapping[str, MetricValue]) -> None:
        self._metrics.write(phase, epoch=epoch, env_steps=self._replay.num_steps, values=values)

    def _save(self, epoch: int) -> None:
        """Save a checkpoint; `epoch` epochs are complete."""
        self._replay.flush()
        components = [phase.component for phase in self.phases.values()]
        optimizer: dict[str, torch.Tensor] = {}
        for component in components:
            optimizer |= component.optimizer_tensors()
        updates = {component.name: component.updates for component in components}
        state: dict[str, Any] = {
            "epoch": epoch,
            "env_steps": self._replay.num_steps,
            "updates": updates,
            "num_actions": self._env.num_actions,
            "action_names": self._action_names,
            "phases": {name: phase.state() for name, phase in self.phases.items()},
        }
        # A number that grows with all that a run does, so that no two states share a name; epochs count too,
        # because one may do nothing but evaluate.
        step = epoch + self._replay.num_steps + sum(updates.values())
        checkpoint = Checkpoint(step, self._agent.state_dict(), optimizer, state)
        save_checkpoint(self._run.checkpoints, checkpoint, keep=self._config.schedule.keep_checkpoints)

    def _make_phases(self) -> dict[str, TrainingPhase]:
        config, agent, replay = self._config, self._agent, self._replay
        groups = parameter_groups(agent.world_model, config.world_model.optim.weight_decay)
        tokenizer = Component("tokenizer", agent.tokenizer, config.tokenizer.optim)
        world_model = Component("world_model", agent.world_model, config.world_model.optim, groups)
        controller = Component("controller", agent.controller, config.controller.optim)
        codes, imagination, warn = (
            self._generator("codes"),
            self._generator("imagination"),
            self._progress.say,
        )
        tokens = TokenCache(replay, agent.tokenizer)
        phases = (
            TokenizerPhase(agent.tokenizer, tokenizer, replay, tokens, config.tokenizer, codes, warn),
            WorldModelPhase(
                agent.world_model,
                world_model,
                replay,
                tokens,
                config.world_model,
                warn,
            ),
            ControllerPhase(agent, controller, replay, tokens, config.controller, imagination, warn),
        )
        return {phase.component.name: phase for phase in phases}

    def _make_replay(self, purpose: str, capacity: int, folder: Path) -> Replay:
        side = self._config.env.frame_size
        seed = derive_seed(self._config.seed, purpose)
        return Replay((side, side, 3), capacity, folder=folder, seed=seed)

    def _generator(self, purpose: str) -> torch.Generator:
        """A generator of its own for one purpose, on the run's device."""
        return torch.Generator(self._config.device).manual_seed(derive_seed(self._config.seed, purpose))


def _describe(result: EvaluationResult, epoch: int) -> str:
    mean = result.metrics().get("mean_return")
    if mean is None:
        return f"evaluation after epoch {epoch + 1}: no game was played in its time"
    marked = f", {result.unfinished} of them unfinished" if result.unfinished else ""
    return (
        f"evaluation after epoch {epoch + 1}: mean return {mean:.2f} over {len(result.games)} games{marked}"
    )
