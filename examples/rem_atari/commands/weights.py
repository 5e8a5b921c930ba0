"""``rem-atari weights``: the weights of the perceptual loss, fetched once."""

from __future__ import annotations

import sys

from rem_atari.arguments import WeightsArguments


def weights(arguments: WeightsArguments) -> None:
    """Fetch the weights, or convert files fetched by hand, and print their path.

    Raises:
        RunError: they cannot be fetched.
        UsageError: the given files do not hold the weights.
    """
    from rem_atari.weights import convert_weights, fetch_weights

    path = convert_weights(arguments.files) if arguments.files else fetch_weights(sys.stderr)
    print(path)
