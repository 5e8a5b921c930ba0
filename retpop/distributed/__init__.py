"""Over several processes: context parallelism, on `torch.distributed`.

Every operation, layer and decoder takes ``context_parallel=group``. `context_parallel` has the rules.
"""

from retpop.distributed import context_parallel

__all__ = ["context_parallel"]
