"""MIN, which knows the future: the least number of loads that any policy could have needed.

Both variants let go of the expert whose next use is furthest away (Belady, "A study of
replacement algorithms for a virtual-storage computer", 1966), for events that ask for several
experts at once. They need the whole trace and so are for replay only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from .base import PolicyBase


class Future:
    """When each expert of one layer is used next.

    Args:
        events: The distinct experts of each event, in order of time.
    """

    def __init__(self, events: Sequence[Sequence[int]]) -> None:
        self.never = len(events)
        """The "next use" of an expert that is not used again."""
        following: dict[int, int] = {}
        after: list[list[int]] = []
        for time in range(len(events) - 1, -1, -1):
            needed = events[time]
            after.append([following.get(expert, self.never) for expert in needed])
            for expert in needed:
                following[expert] = time
        self.after = after[::-1]
        """For each event the next use of each of its experts, as an event's number."""
        self.first = following
        """First use of each expert."""

    def __deepcopy__(self, _: object) -> Future:
        return self  # never changed, and large


IDS = 1 << 32
"""More than there are expert ids."""


class _Furthest:
    """Experts by next use, the furthest first; of equal ones the lowest id."""

    def __init__(self) -> None:
        self.next: dict[int, int] = {}
        """Next use of those who are in."""
        # An entry is −time · IDS + expert: one number, since that is quicker than a pair.
        self._heap: list[int] = []

    def put(self, expert: int, time: int) -> None:
        """Adds an expert, or notes its new next use."""
        self.next[expert] = time
        heappush(self._heap, expert - time * IDS)
        if len(self._heap) > 4 * len(self.next) + 64:  # entries whose time has passed
            self._heap = [expert - time * IDS for expert, time in self.next.items()]
            heapify(self._heap)

    def take(self, kept: Collection[int] = ()) -> int:
        """Removes and returns the furthest expert that is not in `kept`."""
        heap, following = self._heap, self.next
        aside = []
        while True:
            entry = heappop(heap)
            expert = entry % IDS
            if following.get(expert, -1) * IDS != expert - entry:
                continue
            if expert not in kept:
                break
            aside.append(entry)
        for entry in aside:
            heappush(heap, entry)
        del following[expert]
        return expert


class MinForced(PolicyBase):
    """MIN that must admit every miss: evicts the expert whose next use is furthest away.

    As long as every event fits in the bank, no policy that admits every miss needs fewer loads. A
    sweep reads the furthest misses first, so that the nearest are the ones that stay, which is
    good but not always best; `min` is a bound there too. Equal next uses: the lowest id leaves
    first. Source: arXiv 2608.07911 (forced-admission Belady).

    Args:
        future: Of the trace that is replayed, from its first event on.
    """

    name = "min_forced"

    def __init__(self, future: Future) -> None:
        self._future = future
        self._time = 0
        self._soon: dict[int, int] = dict(future.first)
        self._inside = _Furthest()

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`; the experts must be the trace's next event."""
        inside = self._inside
        for expert, time in zip(experts, self._future.after[self._time], strict=True):
            self._soon[expert] = time
            if expert in inside.next:
                inside.put(expert, time)
        self._time += 1

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        return [self._inside.take(kept) for _ in range(count)]

    def admitted(self, experts: Sequence[int]) -> None:
        """See `Policy.admitted`."""
        for expert in experts:
            self._inside.put(expert, self._soon.get(expert, self._future.never))

    def sweep_order(self, misses: Sequence[int]) -> Sequence[int]:
        """Furthest next use first."""
        return sorted(misses, key=lambda expert: -self._soon[expert])

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`; a replay is never interrupted and gone on with."""
        self._inside = _Furthest()
        self.admitted(sorted(residents))


class Served(NamedTuple):
    """What `Min.event` did."""

    misses: list[int]
    """Experts to load, ascending."""
    admitted: list[int]
    """Those of them that are resident afterwards, ascending."""
    evicted: list[int]
    """Who was resident before and no longer is, first to leave first."""


class Min:
    """MIN with bypass: of residents and the event's experts, the C that are used soonest stay.

    A miss may be computed and forgotten, as if it needed no slot; a bound, then, that a real bank,
    which computes misses in its own slots, may not reach. No policy needs fewer loads from the
    same contents, sweeps or not. Equal next uses: the lowest id leaves first. Pins stay, and a
    pin that is missed is admitted. Source: Belady 1966; bypass as in arXiv 2608.07911.

    Args:
        capacity: Experts that may be resident.
        future: Of the trace that is replayed, from its first event on.
        pinned: Experts that never leave once they are in.
        contents: Experts that are resident at first.
    """

    name = "min"

    def __init__(
        self,
        capacity: int,
        future: Future,
        pinned: Collection[int] = (),
        contents: Iterable[int] = (),
    ) -> None:
        self._capacity = capacity
        self._future = future
        self._pinned = frozenset(pinned)
        self._time = 0
        self._free = _Furthest()
        self.residents: set[int] = set(contents)
        for expert in self.residents - self._pinned:
            self._free.put(expert, future.first.get(expert, future.never))

    def event(self, needed: Sequence[int]) -> Served:
        """Serves the trace's next event; `needed` are its distinct experts, ascending."""
        residents, pinned = self.residents, self._pinned
        misses = [expert for expert in needed if expert not in residents]
        for expert, time in zip(needed, self._future.after[self._time], strict=True):
            if expert not in pinned:
                self._free.put(expert, time)
        self._time += 1
        residents.update(misses)
        leaving = [self._free.take() for _ in range(len(residents) - self._capacity)]
        residents.difference_update(leaving)
        return Served(
            misses,
            [expert for expert in misses if expert in residents],
            [expert for expert in leaving if expert not in misses],
        )
