"""Spreads a number of slots over the layers by how the experts of each were used.

A layer whose few busiest experts take most tokens needs fewer slots than one that uses all of
them alike. If the busiest experts of each layer were resident, hits would be the sum of their
counts; the next slot is worth most in the layer whose next expert was used most. Since a layer's
experts come in falling order, giving slots one at a time like that is not only greedy but the
best there is for this objective. What LRU makes of it is another matter and has to be measured.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CapacityError

if TYPE_CHECKING:
    import pandas as pd


def spread_capacity(
    usage: Any, total: int, *, top_k: int | Mapping[int, int] | None = None
) -> dict[int, int]:
    """Spreads slots over the layers by their experts' use.

    Args:
        usage: A profile (`moelab.profile`), or a frame with a row for every expert of every MoE
            layer: `layer`, `expert`, and `count` (uses) or `share`. Several rows for an expert,
            such as of domains or phases, are added up.
        total: Slots of all layers together.
        top_k: Experts a token, by layer or the same for all; the least that a layer gets. A
            profile knows it.

    Returns:
        Slots by layer, at least top-k and at most all experts each; `total` in all. Give it to
        `moelab.load(capacity=…)`.

    Raises:
        CapacityError: If the table lacks something or has a bad value in it, or `total` is under
            top-k or over all experts in every layer.
    """
    frame: pd.DataFrame = usage if hasattr(usage, "columns") else getattr(usage, "usage", None)
    counts = _counts(usage if frame is None else frame)
    least = _least(usage, top_k, counts)
    smallest, largest = sum(least.values()), sum(map(len, counts.values()))
    if isinstance(total, bool) or not isinstance(total, int) or not smallest <= total <= largest:
        raise CapacityError(
            f"total must be a number of slots between {smallest} (top-k in each of {len(counts)} "
            f"layers) and {largest} (all experts), got {total!r}."
        )
    slots = dict(least)
    # The most used expert that a layer lacks; among equals the layer with the fewest slots.
    waiting = [
        (-values[slots[layer]], slots[layer], layer)
        for layer, values in counts.items()
        if slots[layer] < len(values)
    ]
    heapq.heapify(waiting)
    for _ in range(total - smallest):
        _, _, layer = heapq.heappop(waiting)
        slots[layer] += 1
        values = counts[layer]
        if slots[layer] < len(values):
            heapq.heappush(waiting, (-values[slots[layer]], slots[layer], layer))
    return slots


def _counts(frame: Any) -> dict[int, np.ndarray]:
    """Returns the uses of each layer's experts, most used first."""
    columns = list(getattr(frame, "columns", ()))
    if not {"layer", "expert"} <= set(columns):
        raise CapacityError(
            "usage must be a profile, or a frame with the columns layer, expert and count or "
            f"share, got {columns or type(frame).__name__}."
        )
    # A profile that mlx-moe wrote knows prompts and no counts.
    names = [n for n in ("count", "share", "prompts") if n in columns and frame[n].notna().any()]
    if not names:
        raise CapacityError(
            f"usage has neither count nor share, so nothing says how much experts were used; it "
            f"has the columns {', '.join(map(str, columns))}."
        )
    values = frame[names[0]].to_numpy(float)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise CapacityError(
            f"usage has values in {names[0]} that are negative or no numbers: every expert needs "
            "one, 0 if it was not used."
        )
    summed = frame.groupby(["layer", "expert"], observed=True)[names[0]].sum()
    return {
        int(layer): np.sort(part.to_numpy(float))[::-1]
        for layer, part in summed.groupby(level="layer")
    }


def _least(
    usage: Any, top_k: int | Mapping[int, int] | None, counts: Mapping[int, np.ndarray]
) -> dict[int, int]:
    """Returns each layer's top-k."""
    known: Any = getattr(usage, "top_k", None) if top_k is None else top_k
    if known is None:
        raise CapacityError(
            "Nothing says how many experts a token chooses, which is the least that a layer "
            "needs. Give top_k."
        )
    found = {}
    for layer, values in counts.items():
        value = known.get(layer) if isinstance(known, Mapping) else known
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= len(values):
            raise CapacityError(
                f"top_k of layer {layer} must be between 1 and its {len(values)} experts, "
                f"got {value!r}."
            )
        found[layer] = value
    return found
