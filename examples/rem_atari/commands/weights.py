"""``rem-atari weights``: the weights of the perceptual loss, fetched once."""

from __future__ import annotations

import sys

from rem_atari.arguments import WeightsArguments


def weights(arguments: WeightsArguments) -> None:
    """Fetch the weights, or convert files fetched by hand, and say where they are.

    Raises:
        RunError: they cannot be fetched.
        UsageError: the files given are not what is wanted.
    """
    from rem_atari.weights import convert_weights, fetch_weights

    path = convert_weights(arguments.files) if arguments.files else fetch_weights(sys.stderr)
    print(path)
