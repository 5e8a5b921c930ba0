"""A loss or gradient that is not finite: nothing of the step is applied, and the state before it is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_runs import SHORT, Point, fingerprint, newest, run_part
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rem_atari.cli import main
from rem_atari.config import OptimConfig
from rem_atari.errors import NonFiniteError
from rem_atari.training import tokenizer_phase
from rem_atari.training.component import Component

OPTIM = OptimConfig(lr=0.1, weight_decay=0.5, clip_norm=1.0, batch_size=1, updates_per_epoch=1)


def make_component(*layers: nn.Module) -> Component:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    return Component("layer", nn.Sequential(layer, *layers), OPTIM)


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan loss": lambda weight: weight.sum() * math.nan,
    "infinite loss": lambda weight: weight.sum() * math.inf,
    "finite loss, nan gradient": lambda weight: (0 * weight).sqrt().sum(),
    "finite loss, infinite gradient": lambda weight: (1 - weight[:, 0]).sqrt().sum() + weight[:, 1].sum(),
    # 1e30 each: finite, but their squares are not.
    "finite gradient of infinite norm": lambda weight: (1e30 * weight).sum() * 0.1,
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_update_that_is_not_finite_changes_nothing(name: str) -> None:
    component = make_component()
    weight = component.module[0].weight
    component.apply(weight.square().sum(), {})
    with torch.no_grad():
        weight.fill_(1.0)
    before = {key: value.clone() for key, value in component.optimizer_tensors().items()}
    with pytest.raises(
        NonFiniteError, match=r"^update 1 of the layer was not applied, because it is not finite"
    ):
        component.apply(LOSSES[name](weight), {})
    assert torch.equal(weight, torch.ones(1, 2))
    assert component.updates == 1
    after = component.optimizer_tensors()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_message_has_the_batch_s_numbers() -> None:
    component = make_component()
    loss = component.module[0].weight.sum() * math.nan
    metrics = {"loss": loss.detach(), "reward": torch.tensor(0.25), "end": math.inf}
    with pytest.raises(NonFiniteError, match=r"loss nan, gradient norm nan, reward 0\.25, end inf$"):
        component.apply(loss, metrics)


class CountHostReads(TorchDispatchMode):
    """Counts how often a number is taken from a tensor to Python: what waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_layers", [0, 20])
def test_the_guard_waits_for_the_device_once_an_update(
    monkeypatch: pytest.MonkeyPatch, num_layers: int
) -> None:
    component = make_component(*(nn.Linear(1, 1) for _ in range(num_layers)))
    monkeypatch.setattr(component.optimizer, "step", lambda: None)  # its own reads are on the CPU
    loss = component.module(torch.ones(1, 2)).sum()
    with CountHostReads() as reads:
        component.apply(loss, {})
    assert reads.count == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which everything is finite; its tokenizer's codes are restarted before its third update."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_phase, "RESTART_EVERY", 2)
        run_part(folder)
    return folder


@pytest.mark.parametrize(("name", "at"), [("tokenizer", 2), ("world_model", 1), ("controller", 1)])
def test_the_run_stops_with_the_state_before_the_step(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    at: int,
) -> None:
    """Random numbers too: what is saved is what a signal just before the step would have saved."""
    monkeypatch.setattr(tokenizer_phase, "RESTART_EVERY", 2)
    apply = Component.apply

    def poison(component: Component, loss: torch.Tensor, *more: object) -> object:
        is_it = component.name == name and component.updates == at
        return apply(component, loss * math.nan if is_it else loss, *more)

    run = tmp_path / "run"
    words = ["train", "--preset", "debug", "--tokenizer.freeze-foreground-error", "10.0", "--run", str(run)]
    with monkeypatch.context() as patch:
        patch.setattr(Component, "apply", poison)
        assert main(words) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        title = name.replace("_", " ")
        assert last.startswith(
            f"rem-atari: update {at} of the {title} was not applied, because it is not finite:"
        )
        assert "loss nan, gradient norm nan, " in last
        # As it was not the weights' fault alone, it happens again; the run does not get past it by luck.
        assert main(["resume", str(run)]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == last
    assert all(torch.isfinite(tensor).all() for tensor in newest(run).model.values())
    stopped = tmp_path / "stopped"
    run_part(stopped, until=Point(0, name, at))
    assert fingerprint(run) == fingerprint(stopped)
    run_part(run, resume=True)
    assert fingerprint(run) == fingerprint(whole)


def test_what_was_done_of_the_phase_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rem_atari.runs.metrics import read_metrics

    apply = Component.apply

    def poison(component: Component, loss: torch.Tensor, *more: object) -> object:
        return apply(component, loss * math.nan if component.updates == 1 else loss, *more)

    monkeypatch.setattr(Component, "apply", poison)
    with pytest.raises(NonFiniteError):
        run_part(tmp_path / "run", SHORT)
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (line["phase"], line["updates"], line["interrupted"]) == ("tokenizer", 1, 1)
