"""Modules: the retention layer, the feed-forward, and the decoder that stacks them."""

from retpop.layers.decoder import FeedForward, RetNetDecoder
from retpop.layers.retention import MultiScaleRetention

__all__ = ["FeedForward", "MultiScaleRetention", "RetNetDecoder"]
