"""The functional layer: retention and POP on tensors, with checks, a choice of backend and autograd."""

from retpop.ops.dispatch import explain_backend
from retpop.ops.pooled_retention import pooled_retention
from retpop.ops.pop import pop_retention
from retpop.ops.retention import retention

__all__ = ["explain_backend", "pooled_retention", "pop_retention", "retention"]
