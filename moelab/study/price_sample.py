"""Which misses of a window are forced."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from ..errors import StudyError

Cell = tuple[int, int, int]
"""A miss to force: the token's place after the prefix, the layer, and the router's rank there (0
for the highest weight)."""


def plan(
    layout: Mapping[int, int],
    judged: int,
    positions: int,
    misses: int,
    random: np.random.Generator,
) -> list[Cell]:
    """Draws which misses of a window are forced.

    Layers take turns, in an order of the window's own, and so do ranks within each layer, so that
    after any number of misses layers differ by one at most; no miss is drawn twice.

    Args:
        layout: Top-k of each layer.
        judged: Judged tokens.
        positions: Tokens to force in.
        misses: How many misses.
        random: Draws.

    Returns:
        Misses, by token.

    Raises:
        StudyError: If the numbers do not fit each other.
    """
    for name, value in (("positions", positions), ("misses", misses)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StudyError(f"{name} is a number, an int from 1 on, got {value!r}.")
    half = max(1, judged // 2)
    if positions > half:
        raise StudyError(
            f"positions={positions} tokens cannot be forced in the first half of {judged} judged "
            f"tokens. Take at most {half}, or judge more tokens."
        )
    cells = sum(layout.values())
    if misses > positions * cells:
        raise StudyError(
            f"misses={misses} are more than there are: {positions} tokens have "
            f"{positions * cells} routed slots in {len(layout)} layers. Take fewer misses or more "
            "positions."
        )
    edges = np.linspace(0, half, positions + 1).round().astype(int)
    tokens = [int(random.integers(a, b)) for a, b in pairwise(edges)]
    layers = random.permutation(list(layout)).tolist()
    turns = {layer: random.permutation(top_k).tolist() for layer, top_k in layout.items()}
    shift = random.integers(0, positions, len(layers))
    found: list[Cell] = []
    turn = 0
    while len(found) < misses:
        for place, layer in enumerate(layers):
            top_k = layout[layer]
            if turn >= top_k * positions or len(found) == misses:
                continue
            # Each cycle through a layer's ranks goes one token on, so no slot comes twice.
            cycle, rank = divmod(turn, top_k)
            token = tokens[(rank + cycle + shift[place]) % positions]
            found.append((token, layer, turns[layer][rank]))
        turn += 1
    return sorted(found)
