"""A step of training or decoding as a CUDA graph: one launch in place of one for every kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from retpop._torch import pytree
from retpop.arguments import as_int

Result = TypeVar("Result")

WHERE = "capture()"


def capture(
    function: Callable[..., Result], *, generators: Iterable[torch.Generator] = (), warm_up: int = 3
) -> Captured[Result]:
    """A function whose work on a GPU is captured in a CUDA graph, which later calls replay.

    A small model waits for Python: a pass of a decoder launches hundreds of kernels, and a launch takes the
    host longer than many of them take the GPU. A graph launches them all at once. Capture a whole step: one
    token of decoding, or forward, backward and optimiser.

    Every call does the function's work once. The first ``warm_up`` calls run the function, the next one
    captures it, and from then on the graph runs in its place. On a device other than a GPU the function runs
    in every call. The rules are the same there, so that a program that is right on one is right on the other:

    - Arguments are copied into tensors of the graph's own. Their shapes, dtypes and device must be those of
      the first call, and arguments that are not tensors must be equal to the first call's.
    - The result's tensors are the graph's own: **the next call overwrites them**, so clone what you keep.
      They may be the next call's arguments, as a state is. They have no gradient: call ``backward`` inside.
    - Weights, and what else the function finds outside, are read and written where they lie. Change them in
      place, as optimisers and ``load_state_dict`` do, and do not move them.
    - The capture fixes what Python decides: numbers such as a learning rate (give the optimiser a tensor),
      train or eval mode, autocast. The function must not wait for the GPU: no ``.item()``, and no ``if`` on a
      tensor's values.

    Args:
        function: takes and returns tensors on one device, alone or in tuples, lists, dicts and `RetNetState`.
            Objects of other classes may be in its result, which passes them on as they are.
        generators: the generators on the GPU that it draws from, beside torch's own.
        warm_up: calls before the capture, at least 1: kernels are compiled in them, and optimisers and
            libraries set up. DistributedDataParallel needs 11.

    Returns:
        a function with the same arguments and result.

    Raises:
        TypeError, ValueError: an argument does not fit. A call raises if it breaks a rule on arguments, or if
            one requires a gradient.
        RuntimeError: by a call, the function cannot be captured.

    Source: PyTorch's notes on CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

    A token a call (``docs/backends.md`` has a training step):
        >>> decode = retpop.capture(torch.no_grad()(model))
        >>> for token in tokens.split(1, dim=1):
        ...     logits, state = decode(token, state)
    """
    if not callable(function):
        raise TypeError(f"{WHERE}: function is {type(function).__name__}; it must be callable.")
    generators = list(generators)
    for generator in generators:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{WHERE}: generators holds {type(generator).__name__}; it must hold torch.Generators."
            )
    if as_int(WHERE, "warm_up", warm_up) < 1:
        raise ValueError(f"{WHERE}: warm_up is {warm_up}; it must be at least 1.")
    return Captured(function, generators, warm_up)


def has_graphs(device: torch.device) -> bool:
    """Whether CUDA graphs exist there; AMD's GPUs have the same under that name."""
    return device.type == "cuda"


class Captured(Generic[Result]):
    """What `capture` returns."""

    def __init__(
        self, function: Callable[..., Result], generators: Sequence[torch.Generator], warm_up: int
    ) -> None:
        self._function = function
        self._generators = generators
        self._warm_up = warm_up
        self._arguments: _Arguments | None = None
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Result:
        """The function's result; the next call overwrites its tensors."""
        named = dict(sorted(named.items()))
        if self._arguments is None:
            self._arguments = _Arguments((arguments, named), self._generators)
        else:
            self._arguments.take((arguments, named))
        device = self._arguments.device
        if not has_graphs(device):
            return self._kept(self._run())
        with torch.cuda.device(device):
            if self._warm_up:
                self._warm_up -= 1
                return self._run_beside()
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        found: Result = self._result
        return found

    def _run(self) -> Any:
        assert self._arguments is not None
        arguments, named = self._arguments.values()
        result = self._function(*arguments, **named)
        return pytree.tree_map_only(Tensor, self._arguments.apart, result)

    def _kept(self, result: Any) -> Any:
        """The result in the tensors of the first one, as a graph leaves it."""
        if self._result is None:
            self._result = _own(result)
        for kept, new in zip(*map(pytree.tree_leaves, (self._result, result)), strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(new)
        return self._result

    def _run_beside(self) -> Any:
        """The function on a side stream, as the autograd of a later capture wants it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Weights that autocast has cast are kept until it ends. The graph must cast its own, or it would read
        # copies of old weights; and other code must not read the graph's.
        torch.clear_autocast_cache()
        try:
            # Other threads, such as a loader that pins memory, may go on.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self._run()
        except RuntimeError as error:
            error.add_note(
                f"{WHERE}: the function cannot be captured. It must not wait for the GPU (.item(), an if on "
                "a tensor's values, a copy to the host), and its generators must be given."
            )
            raise
        finally:
            torch.clear_autocast_cache()
        return graph


class _Arguments:
    """The arguments of the first call, with tensors of their own that take the values of later calls'.

    Attributes:
        device: of all tensors.
    """

    def __init__(self, given: Any, generators: Sequence[torch.Generator]) -> None:
        paths, self._form = pytree.tree_flatten_with_path(given)
        self._names = [_name(path) for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        self.device = self._check(leaves, generators)
        self._leaves: list[Any] = _own(leaves)

    def _check(self, leaves: Sequence[Any], generators: Sequence[torch.Generator]) -> torch.device:
        """The device of all tensors and generators."""
        devices = {}
        for name, x in zip(self._names, leaves, strict=True):
            if isinstance(x, Tensor):
                _check_gradient(name, x)
                devices[name] = x.device
            elif not isinstance(x, bool | int | float | str | torch.dtype | None):
                raise TypeError(
                    f"{WHERE}: {name} is {type(x).__name__}; it must be a tensor, a number, a str, a dtype "
                    "or None, alone or in tuples, lists, dicts and RetNetState."
                )
        if not devices:
            raise ValueError(f"{WHERE}: a call has no tensor; at least one argument must be a tensor.")
        first, device = next(iter(devices.items()))
        devices |= {f"generator {i}": x.device for i, x in enumerate(generators)}
        for name, found in devices.items():
            if found != device:
                raise ValueError(
                    f"{WHERE}: {name} is on {found} but {first} is on {device}; they must agree."
                )
        return device

    def take(self, given: Any) -> None:
        """Copy a later call's tensors.

        Raises:
            ValueError: the arguments differ from the first call's in more than that.
        """
        leaves, form = pytree.tree_flatten(given)
        if form != self._form:
            raise ValueError(
                f"{WHERE}: the arguments are {form}; they must be, as in the first call, {self._form}."
            )
        for name, own, new in zip(self._names, self._leaves, leaves, strict=True):
            if _kind(own) != _kind(new):
                raise ValueError(
                    f"{WHERE}: {name} is {_kind(new)}; it must be, as in the first call, {_kind(own)}."
                )
            _check_gradient(name, new)
        with torch.no_grad():
            for own, new in zip(self._leaves, leaves, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new)

    def apart(self, result: Tensor) -> Tensor:
        """A result without gradient, and in memory of its own where it lies in an argument's.

        The next call copies its arguments one by one, and this result may be one of them.
        """
        owned = {x.untyped_storage().data_ptr() for x in self._leaves if isinstance(x, Tensor)}
        found = result.detach()
        return found.clone() if found.untyped_storage().data_ptr() in owned else found

    def values(self) -> Any:
        """What the function is called with: positional arguments and named ones."""
        return pytree.tree_unflatten(self._leaves, self._form)


def _check_gradient(name: str, x: Any) -> None:
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{WHERE}: {name} requires a gradient, which does not leave the graph; detach it, or compute the "
            "gradient inside the function."
        )


def _own(tree: Any) -> Any:
    """A copy with tensors of its own, which later calls may write."""
    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map_only(Tensor, Tensor.clone, tree)


def _kind(leaf: Any) -> tuple[Any, ...]:
    """What must not change of an argument."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return type(leaf).__name__, leaf


def _name(path: Sequence[Any]) -> str:
    """An argument, or a part of one, by its path from (positional, named)."""
    (kind, which), rest = path[:2], pytree.keystr(tuple(path[2:]))
    return f"argument {which.idx}{rest}" if kind.idx == 0 else f"{which.key}{rest}"
