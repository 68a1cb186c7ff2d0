"""How many experts of each layer to hold in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..display import size
from ..errors import CapacityError
from ..families import SwitchSite
from .budget import MARGIN, Budget, Need, automatic, within
from .memory import Memory, available_memory

__all__ = ["MARGIN", "Capacity", "Memory", "Settled", "available_memory", "resolve_capacity"]

Capacity = int | float | str | Sequence[int] | Mapping[int, int]
"""Experts a layer (int), a share of them (float), `"auto"`, or an int for each MoE layer: in layer
order, or by the number of the decoder layer."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a capacity comes to."""

    capacities: list[int]
    """Slots of each MoE layer, in layer order."""
    budget: Budget | None = None
    """How they follow from memory; None where they were given."""


def resolve_capacity(
    capacity: Capacity,
    sites: Sequence[SwitchSite],
    need: Callable[[], Need],
    *,
    budget_gb: float | None = None,
    whole: bool = False,
) -> Settled:
    """Turns what a user asked for into slots for each layer.

    Args:
        capacity: An int counts experts a layer, a float is a share of them (1 and 1.0 differ),
            rounded half up; a sequence or a mapping has an int for each layer; `"auto"` takes
            what fits in the memory there is, or in the budget.
        sites: The model's MoE layers.
        need: Says what the model takes; called for `"auto"` only.
        budget_gb: Memory to take, in units of 10⁹ bytes, see `budget.within`; None for no budget.
        whole: Cache and prefill are in the budget too.

    Raises:
        CapacityError: If it is no such value, smaller than a layer's top-k or larger than its
            number of experts, names other layers than the model's, or both a capacity and a
            budget were given.
    """
    if budget_gb is not None and capacity != "auto":
        raise CapacityError(
            f"capacity={capacity!r} and budget_gb={budget_gb!r} were both given, and each settles "
            "how many experts to hold. Give one of them."
        )
    if isinstance(capacity, str) and capacity == "auto":
        return _from_memory(sites, need(), budget_gb, whole)
    return Settled(fixed_capacities(capacity, sites))


def fixed_capacities(capacity: Capacity, sites: Sequence[SwitchSite]) -> list[int]:
    """Turns a capacity that says how many experts, so not `"auto"`, into slots for each layer.

    Raises:
        CapacityError: As `resolve_capacity`.
    """
    if isinstance(capacity, bool | str) or not isinstance(
        capacity, int | float | Sequence | Mapping
    ):
        auto = " (and 'auto' where a model is loaded)" if capacity == "auto" else " or 'auto'"
        raise CapacityError(
            "capacity must be an int (experts a layer), a float (a share), or an int for each "
            f"layer,{auto}, got {capacity!r}."
        )
    if isinstance(capacity, float):
        if not 0 < capacity <= 1:
            raise CapacityError(
                f"A capacity given as a float is a share between 0 and 1, got {capacity}. "
                "Give an int to count experts."
            )
        return [_checked(math.floor(capacity * s.experts + 0.5), s, capacity) for s in sites]
    if isinstance(capacity, int):
        return [_checked(capacity, site, capacity) for site in sites]
    return _by_layer(capacity, sites)


def require_fit(budget: Budget, sites: Sequence[SwitchSite]) -> None:
    """Raises unless a token's experts fit in every layer.

    Raises:
        CapacityError: With the sum.
    """
    if all(budget.capacities):
        return
    top_k = max(site.top_k for site in sites)
    raise CapacityError(
        f"There is too little memory for this model: a token needs {top_k} experts a layer at "
        f"once, and with these {size(-budget.left)} are missing ({budget.memory.source}: "
        f"{size(budget.memory.nbytes)}). Close other programs, allow more, ask for a shorter "
        f"context, or take a smaller model.\n{budget!r}"
    )


def _from_memory(
    sites: Sequence[SwitchSite], need: Need, budget_gb: float | None, whole: bool
) -> Settled:
    if budget_gb is None:
        budget = automatic(available_memory(), sites, need)
    else:
        budget = within(budget_gb, sites, need, whole=whole)
    require_fit(budget, sites)
    return Settled(list(budget.capacities), budget)


def _by_layer(
    capacity: Sequence[Any] | Mapping[Any, Any], sites: Sequence[SwitchSite]
) -> list[int]:
    layers = [site.layer for site in sites]
    if isinstance(capacity, Mapping):
        unknown = [key for key in capacity if key not in layers]
        missing = [layer for layer in layers if layer not in capacity]
        if unknown or missing:
            raise CapacityError(
                f"capacity names layers {_some(unknown)} that have no routed experts and leaves "
                f"out {_some(missing)}: it must give a number for each of the MoE layers "
                f"{_some(layers)}, got {capacity!r}."
            )
        values = [capacity[layer] for layer in layers]
    else:
        if len(capacity) != len(layers):
            raise CapacityError(
                f"capacity has {len(capacity)} numbers and the model has {len(layers)} MoE "
                f"layers ({_some(layers)}), got {capacity!r}."
            )
        values = list(capacity)
    for layer, value in zip(layers, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int):
            raise CapacityError(
                f"capacity for layer {layer} must be an int that counts experts, got {value!r}."
            )
    return [_checked(value, site, value) for value, site in zip(values, sites, strict=True)]


def _checked(slots: int, site: SwitchSite, asked: Any) -> int:
    if not site.top_k <= slots <= site.experts:
        raise CapacityError(
            f"capacity {asked!r} is {slots} experts in layer {site.layer}, and it must be between "
            f"{site.top_k} (the layer's top-k: a token needs them all at once) and "
            f"{site.experts} (all its experts)."
        )
    return slots


def _some(values: Sequence[Any]) -> str:
    listed = [str(value) for value in values]
    return ", ".join(listed if len(listed) <= 8 else [*listed[:4], "…", *listed[-2:]]) or "none"
