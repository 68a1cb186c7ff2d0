"""The capacities and pins that a curve is asked for, against what a layer has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CapacityError, PolicyError
from .streams import LayerStream


def numbers_of(capacities: Any) -> tuple[int | float, ...]:
    """Checks the capacities that were asked for, before the layers are known."""
    if isinstance(capacities, int | float | str) or not isinstance(capacities, Iterable):
        raise CapacityError(f"capacities must be a list of numbers, got {capacities!r}.")
    found: list[int | float] = []
    for given in capacities:
        if isinstance(given, bool) or not isinstance(given, int | float | np.number):
            raise CapacityError(
                f"A capacity must be an int (experts a layer) or a float (a share), got {given!r}."
            )
        if isinstance(given, int | np.integer):
            found.append(int(given))
        elif 0 < given <= 1:
            found.append(float(given))
        else:
            raise CapacityError(
                f"A capacity given as a float is a share between 0 and 1, got {given}. "
                "Give an int to count experts."
            )
    if not found:
        raise CapacityError("capacities is empty: give at least one, or None for all.")
    return tuple(found)


def capacities_of(
    stream: LayerStream, asked: Sequence[int | float] | None, pins: int = 0
) -> np.ndarray:
    """Returns the capacities of a layer, int64, ascending, each once."""
    lowest, highest = stream.top_k + pins, stream.experts
    if asked is None:
        return np.arange(lowest, highest + 1)
    sizes = set()
    for given in asked:
        size = given if isinstance(given, int) else math.floor(given * highest + 0.5)
        if not lowest <= size <= highest:
            free = f"its top-k{f' and {pins} pins' if pins else ''}: a token needs them all at once"
            raise CapacityError(
                f"capacity {given!r} is {size} experts in layer {stream.layer}, and it must be "
                f"between {lowest} ({free}) and {highest} (all its experts)."
            )
        sizes.add(size)
    return np.array(sorted(sizes), np.int64)


def pins_of(pins: Any, stream: LayerStream) -> list[int]:
    """Returns a layer's pins, ascending."""
    given = pins.get(stream.layer, ()) if isinstance(pins, Mapping) else pins or ()
    found = sorted({int(expert) for expert in given})
    wrong = [expert for expert in found if not 0 <= expert < stream.experts]
    if wrong:
        raise PolicyError(
            f"pins= names experts {wrong}, and layer {stream.layer} has {stream.experts} experts "
            "(0 is the first). Say experts= if the frame does not show them all."
        )
    if len(found) > stream.experts - stream.top_k:
        raise PolicyError(
            f"{len(found)} pins are too many for layer {stream.layer}: of {stream.experts} experts "
            f"{stream.top_k} (top-k) must be free to change. Pin fewer."
        )
    return found
