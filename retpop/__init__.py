"""retpop: retention (RetNet) and parallel observation prediction (POP) for PyTorch.

The operations are `retention` and `pop_retention`, and `pooled_retention` to serve; the modules
`MultiScaleRetention` and `RetNetDecoder` put them into a model. Start with the README, or with
``help(retpop.retention)``.
"""

from retpop import checkpoints
from retpop.config import RetNetConfig
from retpop.cuda_graph import capture
from retpop.decay import log_spaced_decay, retnet_decay
from retpop.layers import MultiScaleRetention, RetNetDecoder
from retpop.ops import explain_backend, pooled_retention, pop_retention, retention
from retpop.packing import Packed, pack_padded, pad_packed
from retpop.state import RetNetState

__version__ = "0.1.0"

__all__ = [
    "MultiScaleRetention",
    "Packed",
    "RetNetConfig",
    "RetNetDecoder",
    "RetNetState",
    "capture",
    "checkpoints",
    "explain_backend",
    "log_spaced_decay",
    "pack_padded",
    "pad_packed",
    "pooled_retention",
    "pop_retention",
    "retention",
    "retnet_decay",
]
