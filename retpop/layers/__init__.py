"""Modules: the retention layer, the feed-forward, and the decoder that stacks them."""

from retpop.layers.decoder import RetNetDecoder
from retpop.layers.feed_forward import FeedForward
from retpop.layers.retention import MultiScaleRetention

__all__ = ["FeedForward", "MultiScaleRetention", "RetNetDecoder"]
