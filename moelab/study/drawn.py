"""Pins that are drawn at random: what any pins would do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import PinsError
from .asked import RANDOM


def drawn_pins(experts: Mapping[int, int], count: int, seed: int) -> dict[int, frozenset[int]]:
    """Draws pins: in each layer `count` experts without replacement, every set as likely.

    A layer's draw depends on the seed and the layer only.

    Args:
        experts: Experts of each layer.
        count: How many to draw.
        seed: From 0 on.

    Raises:
        PinsError: If a layer has fewer experts.
    """
    found = {}
    for layer, size in experts.items():
        if count > size:
            raise PinsError(f"'{RANDOM}{count}' is more than the {size} experts of layer {layer}.")
        random = np.random.default_rng([seed, layer])
        found[layer] = frozenset(random.choice(size, count, replace=False).tolist())
    return found
