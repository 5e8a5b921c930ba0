"""Configurations of run folders that an earlier version wrote: they lack the fields added since."""

from __future__ import annotations

from typing import Any

ADDED_FIELDS: dict[str, Any] = {
    "cuda_graphs": False,
    "env.kwargs": (),
    "env.wrapper": None,
    "env.render": False,
    "tokenizer.kind": "vq",
    "tokenizer.fsq_levels": (8, 8, 8),
    "tokenizer.patch_threshold": 0.0,
    "tokenizer.patch_means": False,
    "tokenizer.patchwise": False,
    "world_model.code_network": 0,
    "world_model.local_frames": 0,
    "world_model.local_outcomes": False,
    "world_model.event_share": 0.0,
    "world_model.priority_share": 0.0,
    "world_model.draw": "independent",
    "world_model.refine_passes": 3,
    "world_model.reward_weight": 1.0,
    "world_model.end_weight": 1.0,
    "world_model.reward_bins": 0,
    "world_model.disagreement_heads": 0,
    "world_model.muon": False,
    "world_model.freeze_at_init": False,
    "tokenizer.optim.average": 0.0,
    "world_model.optim.average": 0.0,
    "controller.optim.average": 0.0,
    "controller.heads_see_features": False,
    "controller.context_frames": 1,
    "controller.disagreement_weight": 0.0,
    "controller.mean_rewards": False,
    "controller.value_bins": 0,
    "controller.reward_start_share": 0.0,
    "controller.reward_start_steps": 10,
    "controller.uses": 1,
    "controller.minibatches": 1,
    "controller.clip_ratio": 0.2,
    "controller.scale_advantages": False,
    "controller.random_repeat": 1,
    "schedule.recorded": None,
}
"""Fields that run folders of earlier versions lack, by their dotted paths, each with the value that
reproduces those runs."""


def with_added_fields(data: Any) -> Any:
    """JSON data with missing `ADDED_FIELDS` filled in; data that is no configuration stays as it is."""
    for path, value in ADDED_FIELDS.items():
        data = _with_added_field(data, path, value)
    return data


def _with_added_field(data: Any, path: str, value: Any) -> Any:
    head, _, rest = path.partition(".")
    if not isinstance(data, dict):
        return data
    if not rest:
        return {head: value, **data}
    return {**data, head: _with_added_field(data[head], rest, value)} if head in data else data
