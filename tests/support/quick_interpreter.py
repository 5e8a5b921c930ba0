"""Triton's interpreter without the work that it does for nothing: the same values in half the time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import triton.language as tl
from triton.runtime import interpreter


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Change the interpreter of this process."""
    # Each sum of integers is computed again in int64, for an assertion that is made in debug mode alone.
    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    patch.setattr(interpreter, "_get_np_dtype", remembering(interpreter._get_np_dtype))
    patch.setattr(interpreter.GridExecutor, "__call__", untraced(interpreter.GridExecutor.__call__))
    if hasattr(interpreter, "_LangPatchScope"):
        patch.setattr(interpreter, "_patch_lang", patching_once(interpreter._patch_lang))


def remembering(np_dtype: Callable[[tl.dtype], object]) -> Callable[[tl.dtype], object]:
    """NumPy's dtypes, without a new table for each value; types of blocks and pointers have no hash."""
    known = cache(np_dtype)
    return lambda dtype: np_dtype(dtype.scalar) if dtype.scalar.is_ptr() else known(dtype.scalar)


def untraced(launch: Callable[..., None]) -> Callable[..., None]:
    """A launch that coverage, which counts nothing in kernels, does not follow through the interpreter."""

    def launch_untraced(*args: object, **kwargs: object) -> None:
        tracer = sys.gettrace()
        if not type(tracer).__module__.startswith("coverage"):
            return launch(*args, **kwargs)
        sys.settrace(None)
        try:
            return launch(*args, **kwargs)
        finally:
            tracer.start()  # as sys.settrace(tracer), which would lose count of calls and returns

    return launch_untraced


def patching_once(patch_lang: Callable[..., object]) -> Callable[..., object]:
    """Replace the functions of `triton.language` at a launch, and not at every call inside the kernel."""
    patched: set[frozenset[str]] = set()

    @cache
    def languages(function: Callable[..., object]) -> frozenset[str]:
        return frozenset(x.__name__ for x in function.__globals__.values() if x is tl or x is tl.core)

    def patch_once(function: Callable[..., object]) -> object:
        names = languages(function)
        if names in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        scope = patch_lang(function)
        restore = scope.restore

        def restore_and_forget() -> None:
            patched.discard(names)
            restore()

        patched.add(names)
        scope.restore = restore_and_forget
        return scope

    return patch_once
