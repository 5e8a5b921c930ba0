"""An environment's state as plain JSON data, so that another process can continue the game exactly.

An environment is a stack of layers, the wrappers and the game itself, and each layer saves what is its own:

- a layer of this package, or any environment of yours, by two methods: ``get_resume_state() -> dict``, plain
  JSON data, and ``set_resume_state(state)``, which a fresh instance gets before any ``reset``;
- a game of the Arcade Learning Environment by its emulator's snapshot, random numbers included;
- gymnasium's own wrappers by the attributes listed in `WRAPPER_ATTRIBUTES`;
- a layer that keeps nothing between steps (`KeepsNothing`) is left out.

A stack with any other layer cannot be saved, because an unknown layer may hold any state.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit

State = dict[str, Any]
"""Plain JSON data."""

WRAPPER_ATTRIBUTES: dict[type[gymnasium.Wrapper], tuple[str, ...]] = {
    OrderEnforcing: ("_has_reset",),
    TimeLimit: ("_elapsed_steps",),
}
"""Wrappers of gymnasium whose whole state, while a game is played, is these attributes."""

STATES_OF_NOTHING = ("PassiveEnvChecker",)
"""Layers without state that earlier versions saved and that no longer exist."""

MOST_SNAPSHOT_BYTES = 1_000_000
"""An emulator's snapshot has about 15,000 bytes; anything far larger is not one."""


class KeepsNothing:
    """A layer that keeps nothing between steps and so has no state to save."""


def save_env(env: gymnasium.Env) -> State | None:
    """The state of an environment with all its wrappers; None if one of its layers cannot be saved."""
    layers = []
    for layer in _keeping(env):
        state = _save_layer(layer)
        if state is None:
            return None
        layers.append({"layer": type(layer).__name__, "state": state})
    return {"layers": layers}


def load_env(env: gymnasium.Env, state: State) -> None:
    """Give a fresh environment, not reset yet, the state that `save_env` returned for one of its kind.

    Raises:
        ValueError: the state is of an environment that is made in another way.
    """
    layers = list(_keeping(env))
    names = [type(layer).__name__ for layer in layers]
    left_out = {kind.__name__ for kind in KeepsNothing.__subclasses__()} | set(STATES_OF_NOTHING)
    entries = [entry for entry in state["layers"] if entry["layer"] not in left_out]
    saved = [entry["layer"] for entry in entries]
    if saved != names:
        raise ValueError(f"the saved environment consists of {saved}, this one of {names}")
    for layer, entry in zip(layers, entries, strict=True):
        _load_layer(layer, entry["state"])


def random_state(env: gymnasium.Env) -> State:
    """The state of an environment's own random numbers, `np_random`."""
    return dict(env.np_random.bit_generator.state)


def set_random_state(env: gymnasium.Env, state: State) -> None:
    """Give an environment's random numbers back their `random_state`."""
    # A new generator, not the one that a reset without a seed would draw from the system.
    env.np_random = np.random.Generator(np.random.PCG64())
    env.np_random.bit_generator.state = state


def layers_of(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The wrappers from the outside in, and the game."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _keeping(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The layers that keep something between steps, or might."""
    return (layer for layer in layers_of(env) if not isinstance(layer, KeepsNothing))


def _save_layer(layer: gymnasium.Env) -> State | None:
    if hasattr(type(layer), "get_resume_state"):
        return layer.get_resume_state()
    if type(layer) in WRAPPER_ATTRIBUTES:
        return {name: getattr(layer, name) for name in WRAPPER_ATTRIBUTES[type(layer)]}
    if _is_emulated(layer):
        snapshot = layer.ale.cloneState(include_rng=True).serialize()
        return {"random": random_state(layer), "snapshot": base64.b64encode(snapshot).decode("ascii")}
    return None


def _load_layer(layer: gymnasium.Env, state: State) -> None:
    if hasattr(type(layer), "set_resume_state"):
        layer.set_resume_state(state)
    elif type(layer) in WRAPPER_ATTRIBUTES:
        for name in WRAPPER_ATTRIBUTES[type(layer)]:
            setattr(layer, name, state[name])
    elif _is_emulated(layer):
        _load_snapshot(layer, state)
    else:
        raise ValueError(f"an environment with the layer {type(layer).__name__} cannot be loaded")


def _is_emulated(layer: gymnasium.Env) -> bool:
    """Whether it is the Arcade Learning Environment, without importing a package that may be missing."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}" == "ale_py.env.AtariEnv"


def _load_snapshot(layer: gymnasium.Env, state: State) -> None:
    import ale_py

    snapshot = base64.b64decode(state["snapshot"], validate=True)
    if len(snapshot) > MOST_SNAPSHOT_BYTES:
        raise ValueError(f"the emulator's snapshot has {len(snapshot)} bytes, at most {MOST_SNAPSHOT_BYTES}")
    try:
        layer.ale.restoreState(ale_py.ALEState(snapshot))
    except (RuntimeError, SystemError) as error:  # nanobind's only name for the emulator's error
        raise ValueError(f"the emulator does not take the snapshot: {error}") from error
    set_random_state(layer, state["random"])
