"""How many experts of each layer to hold in memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CapacityError
from ..families import SwitchSite

Capacity = int | float | str
"""Experts a layer (int), a share of them (float), or `"auto"`."""

METAL_SHARE = 0.8
"""Of Metal's recommended working set; beyond it macOS begins to push back."""

MARGIN = 0.1
"""Share of the memory found that `"auto"` leaves for the cache, prefill and everyone else."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that a model could have, in bytes, and what that figure is."""

    nbytes: int
    source: str


def resolve_capacity(
    capacity: Capacity, sites: Sequence[SwitchSite], *, trunk_bytes: int = 0, expert_bytes: int = 0
) -> list[int]:
    """Turns what a user asked for into slots for each layer.

    Args:
        capacity: An int counts experts a layer, a float is a share of them (1 and 1.0 differ),
            rounded half up; `"auto"` takes what fits in the memory there is.
        sites: The model's MoE layers.
        trunk_bytes: Bytes of everything but the experts; for `"auto"`.
        expert_bytes: Bytes of one expert of every layer together; for `"auto"`.

    Returns:
        Slots a layer, in the order of `sites`.

    Raises:
        CapacityError: If it is no such value, or smaller than a layer's top-k or larger than its
            number of experts.
    """
    if isinstance(capacity, bool) or not isinstance(capacity, int | float | str):
        raise CapacityError(
            f"capacity must be an int (experts a layer), a float (a share) or 'auto', "
            f"got {capacity!r}."
        )
    if isinstance(capacity, str):
        if capacity != "auto":
            raise CapacityError(f"capacity must be an int, a float or 'auto', got {capacity!r}.")
        return _automatic(sites, trunk_bytes, expert_bytes)
    if isinstance(capacity, float):
        if not 0 < capacity <= 1:
            raise CapacityError(
                f"A capacity given as a float is a share between 0 and 1, got {capacity}. "
                "Give an int to count experts."
            )
        return [_checked(math.floor(capacity * s.experts + 0.5), s, capacity) for s in sites]
    return [_checked(capacity, site, capacity) for site in sites]


def available_memory() -> Memory:
    """Returns the memory that a model could have on this machine now."""
    import psutil

    free = Memory(psutil.virtual_memory().available, "available memory")
    limit = _cgroup_free()
    if limit is not None and limit < free.nbytes:
        free = Memory(limit, "memory left in this control group")
    if sys.platform == "darwin":
        import mlx.core as mx

        working_set = int(mx.device_info().get("max_recommended_working_set_size", 0) * METAL_SHARE)
        if 0 < working_set < free.nbytes:
            free = Memory(working_set, f"{METAL_SHARE:.0%} of Metal's recommended working set")
    return free


def _checked(slots: int, site: SwitchSite, asked: Capacity) -> int:
    if not site.top_k <= slots <= site.experts:
        raise CapacityError(
            f"capacity {asked!r} is {slots} experts in layer {site.layer}, and it must be between "
            f"{site.top_k} (the layer's top-k: a token needs them all at once) and "
            f"{site.experts} (all its experts)."
        )
    return slots


def _automatic(sites: Sequence[SwitchSite], trunk_bytes: int, expert_bytes: int) -> list[int]:
    memory = available_memory()
    budget = int(memory.nbytes * (1 - MARGIN)) - trunk_bytes
    slots = budget // max(expert_bytes, 1)
    if slots < max(site.top_k for site in sites):
        raise CapacityError(
            f"There is too little memory for this model: {memory.nbytes / 1e9:.1f} GB "
            f"({memory.source}), of which {MARGIN:.0%} is left free and {trunk_bytes / 1e9:.1f} GB "
            f"go to the trunk, hold {max(slots, 0)} experts a layer, and a token needs "
            f"{max(site.top_k for site in sites)}. Close other programs or take a smaller model."
        )
    return [max(site.top_k, min(slots, site.experts)) for site in sites]


def _cgroup_free() -> int | None:
    """Returns the bytes left under this process's memory limit, or None where there is none."""
    try:
        with (
            open("/sys/fs/cgroup/memory.max") as limit,
            open("/sys/fs/cgroup/memory.current") as current,
        ):
            text = limit.read().strip()
            return None if text == "max" else int(text) - int(current.read())
    except (OSError, ValueError):
        return None
