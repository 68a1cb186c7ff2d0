"""Who leaves when an expert needs a slot. Pure Python over expert ids; knows no MLX.

The live bank and the replay of a recorded trace use the same objects, so what holds for the one
holds for the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class Policy(Protocol):
    """A replacement policy for one layer. Events arrive in order; experts are named by id."""

    name: str
    """What the manifest of a run calls it."""
    admits: bool
    """Whether what was missed stays in memory."""

    def used(self, experts: Sequence[int]) -> None:
        """Notes one event: one step at this layer.

        Args:
            experts: All distinct experts that the step chose, hits and misses, in ascending order.
        """

    def admitted(self, experts: Sequence[int]) -> None:
        """Notes experts that enter a slot now."""

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """Chooses `count` of `residents` to leave, first to leave first.

        Args:
            count: How many; the caller has made sure that there are so many.
            residents: Experts that are in memory now.
            kept: Experts that must stay: pinned, or being served.
        """

    def sweep_order(self, misses: Sequence[int]) -> Sequence[int]:
        """Returns in which order a sweep reads `misses` (given in ascending order)."""

    def resync(self, residents: Iterable[int]) -> None:
        """Forgets every expert that is not in `residents`, after an event was interrupted."""


class LRU:
    """Evicts the least recently used expert.

    Recency is renewed once an event, in ascending expert id, hits and misses together, so that
    of one event's experts the lowest id is the first to go.
    """

    name = "lru"
    admits = True

    def __init__(self) -> None:
        # A dict keeps insertion order: the first key was used longest ago.
        self._order: dict[int, None] = {}

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        order = self._order
        for expert in experts:
            order.pop(expert, None)
            order[expert] = None

    def admitted(self, experts: Sequence[int]) -> None:
        """Notes who enters without having been used: the initial contents."""
        for expert in experts:
            self._order.setdefault(expert)

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        chosen: list[int] = []
        for expert in self._order:
            if len(chosen) == count:
                break
            if expert in residents and expert not in kept:
                chosen.append(expert)
        for expert in chosen:
            del self._order[expert]
        return chosen

    def sweep_order(self, misses: Sequence[int]) -> Sequence[int]:
        """Ascending id: the order in which recency was renewed."""
        return misses

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        known = set(residents)
        order = [expert for expert in self._order if expert in known]
        self._order = dict.fromkeys([*sorted(known.difference(order)), *order])
