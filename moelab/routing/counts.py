"""What one layer misses at each capacity: which events are played, and what each policy loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .streams import WHOLE, LayerStream

POLICIES = ("lru", "best_static", "min_forced", "min")
"""Curves, from the one that a bank can reach to the lowest bound."""

Others = Literal["advance", "exclude"]


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts of one policy. All are pairs, slots and mass, in this order."""

    total: np.ndarray
    """(3, groups)"""
    first: np.ndarray
    """(3, groups): first uses."""
    missed: np.ndarray
    """(3, groups, capacities)"""


def events_of(
    stream: LayerStream, phase: int, others: str, reset: bool
) -> tuple[LayerStream, np.ndarray, np.ndarray]:
    """Chooses the events that are played.

    Returns:
        The events in the order in which they are played; which of them count, bool (events,); and
        before which of them the bank is emptied, bool (events,).
    """
    counted = (stream.phase == phase) | (stream.phase == WHOLE) | (phase == WHOLE)
    chosen = np.flatnonzero(counted) if others == "exclude" else np.arange(len(counted))
    if reset:  # runs that took turns are taken apart
        chosen = chosen[np.argsort(stream.run[chosen], kind="stable")]
    played = stream.events(chosen)
    fresh = np.zeros(len(chosen), bool)
    if reset and len(chosen):
        fresh[0] = True
        fresh[1:] = played.run[1:] != played.run[:-1]
    return played, counted[chosen], fresh


def counts(
    played: LayerStream,
    group: np.ndarray,
    fresh: np.ndarray,
    groups: int,
    sizes: np.ndarray,
    policies: Sequence[str],
) -> dict[str, Counted]:
    """Counts a layer's misses.

    Args:
        played: The events.
        group: int32 (events,): where each is counted; −1 nowhere.
        fresh: bool (events,): the bank is emptied before it.
        groups: Number of groups.
        sizes: int (capacities,): slots.
        policies: Of `POLICIES`.
    """
    from . import stacks, sweeps

    experts = played.experts
    given = (played.start, played.expert, played.slots, played.mass, group, fresh, experts, groups)
    following = np.zeros(0, np.int64)
    if set(policies) & {"min", "min_forced"}:
        following = stacks.next_uses(played.start, played.expert, fresh, experts)
    swept = np.flatnonzero(sizes < played.largest)
    found = {}
    for policy in policies:
        if policy == "best_static":
            at = np.stack(stacks.later_uses(*given))
            order = np.argsort(-at[0, :, :experts].sum(0), kind="stable")
            at = np.concatenate([at[:, :, order], at[:, :, experts:]], axis=2)
        elif policy == "lru":
            at = np.stack(stacks.lru_places(*given))
        else:
            at = np.stack(stacks.min_places(*given, following, policy == "min_forced"))
        total = at.sum(axis=2)
        hits = np.concatenate([np.zeros((3, groups, 1)), at[:, :, :experts].cumsum(axis=2)], axis=2)
        missed = total[:, :, None] - hits[:, :, sizes]
        for i in swept if policy in ("lru", "min_forced") else ():
            if policy == "lru":
                missed[:, :, i] = sweeps.lru_misses(*given, int(sizes[i]))
            else:
                missed[:, :, i] = sweeps.min_forced_misses(*given, following, int(sizes[i]))
        found[policy] = Counted(total, at[:, :, experts], missed)
    return found


def pinned(played: LayerStream, group: np.ndarray, groups: int, pins: list[int]) -> np.ndarray:
    """Returns pairs, slots and mass of the pinned experts, which always hit: (3, groups)."""
    to = np.repeat(group, np.diff(played.start))
    rows = np.isin(played.expert, pins) & (to >= 0)
    weights = (None, played.slots[rows], played.mass[rows])
    return np.stack([np.bincount(to[rows], w, groups).astype(np.float64) for w in weights])
