"""What `moelab.replay` is given, checked: slots, pins and initial contents of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import CapacityError, PolicyError
from .events import LayerEvents

Experts = Iterable[int] | Mapping[int, Iterable[int]] | None
"""Expert ids: the same for every layer, or by layer."""


def as_recorded(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that a recording's manifest holds."""
    capacity, layers = run["capacity"], run["layers"]
    return {
        "capacity": dict(zip(layers, capacity, strict=True))
        if isinstance(capacity, list)
        else capacity,
        "pins": {int(layer): ids for layer, ids in run["pins"].items()},
        "initial": {int(layer): ids for layer, ids in run["initial_bank"].items()},
        "experts": dict(zip(layers, run["experts"], strict=True)),
    }


def experts_of(
    experts: int | Mapping[int, int] | None, layers: list[LayerEvents]
) -> dict[int, int]:
    """Returns the number of experts of each layer."""
    seen = {events.layer: int(events.expert.max()) + 1 for events in layers}
    if experts is None:
        return dict.fromkeys(seen, max(seen.values()))
    if isinstance(experts, Mapping):
        lacking = [layer for layer in seen if layer not in experts]
        if lacking:
            raise CapacityError(f"experts= says nothing of layers {lacking}.")
        sizes = {layer: experts[layer] for layer in seen}
    else:
        sizes = dict.fromkeys(seen, experts)
    for layer, size in sizes.items():
        if size < seen[layer]:
            raise CapacityError(
                f"experts={size}, and layer {layer} of the frame has expert {seen[layer] - 1}."
            )
    return sizes


def slots_of(capacity: Any, events: LayerEvents, experts: int, known: bool) -> int:
    """Returns a layer's slots."""
    asked = capacity
    if isinstance(capacity, Mapping):
        if events.layer not in capacity:
            raise CapacityError(
                f"capacity= says nothing of layer {events.layer}; it has {sorted(capacity)}."
            )
        asked = capacity[events.layer]
    if isinstance(asked, bool) or not isinstance(asked, int | float | np.integer | np.floating):
        raise CapacityError(
            f"capacity must be an int (experts a layer) or a float (a share), got {asked!r}."
        )
    slots = int(asked)
    if isinstance(asked, float | np.floating):
        if not 0 < asked <= 1:
            raise CapacityError(
                f"A capacity given as a float is a share between 0 and 1, got {asked}. "
                "Give an int to count experts."
            )
        slots = math.floor(asked * experts + 0.5)
    if slots < events.top_k or (known and slots > experts):
        raise CapacityError(
            f"capacity {asked!r} is {slots} experts in layer {events.layer}, and it must be "
            f"between {events.top_k} (the layer's top-k: a token needs them all at once) and "
            f"{experts} (all its experts)."
        )
    return slots


def ids_by_layer(
    what: str, given: Experts, layers: list[LayerEvents], sizes: Mapping[int, int]
) -> dict[int, list[int]]:
    """Returns experts by layer, each once, in the order given."""
    found: dict[int, list[int]] = {events.layer: [] for events in layers}
    if given is None:
        return found
    if isinstance(given, Mapping):
        others = sorted(set(given) - set(found))
        if others:
            raise PolicyError(f"{what}= names layers {others}; the frame has {sorted(found)}.")
        named = {layer: given.get(layer, ()) for layer in found}
    else:
        same = list(given)
        named = dict.fromkeys(found, same)
    for layer, ids in named.items():
        found[layer] = list(dict.fromkeys(int(expert) for expert in ids))
        wrong = [expert for expert in found[layer] if not 0 <= expert < sizes[layer]]
        if wrong:
            raise PolicyError(
                f"{what}= names experts {wrong}, and layer {layer} has {sizes[layer]} experts "
                "(0 is the first). Say experts= if the frame does not show them all."
            )
    return found


def check_pins(
    pinned: Mapping[int, list[int]],
    slots: Mapping[int, int],
    layers: list[LayerEvents],
    sizes: Mapping[int, int],
) -> None:
    """Refuses pins that leave fewer than top-k slots."""
    for events in layers:
        layer, room = events.layer, slots[events.layer] - events.top_k
        if len(pinned[layer]) > room and slots[layer] < sizes[layer]:
            raise PolicyError(
                f"{len(pinned[layer])} pins are too many for layer {layer}: of its {slots[layer]} "
                f"slots {events.top_k} (top-k) must be free to change, which leaves {room} for "
                "pins. Pin fewer, or raise the capacity."
            )
