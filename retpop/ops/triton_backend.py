"""The Triton backend's door: whether the kernels of `retpop.kernels` can run, and why not.

The kernels have not landed yet, so the answer is always no; `dispatch` asks here and nowhere else.
"""

from __future__ import annotations


def why_unavailable() -> str | None:
    """One sentence that says why the Triton backend cannot run here, or None where it can."""
    return "this version of retpop has no Triton kernels yet"
