"""The weights of the perceptual loss (LPIPS): finding, fetching and safely reading them."""

from rem_atari.weights.fetch import convert_weights, fetch_weights
from rem_atari.weights.files import cached_weights, find_weights, load_perceptual

__all__ = ["cached_weights", "convert_weights", "fetch_weights", "find_weights", "load_perceptual"]
