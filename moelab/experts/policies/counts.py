"""Policies that count uses: LFU, LFU with dynamic ageing, LFRU, LCP.

A count goes up by one an event, however many tokens of the step chose the expert. An expert that
enters without ever having been used (initial contents) counts as used once, when it entered.
Equal priorities: the lowest id leaves first.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush

import numpy as np

from .base import PolicyBase


class _Ranked(PolicyBase):
    """Evicts the lowest priority, where priorities of residents only ever rise.

    Subclasses keep `_key`, the present priority of each resident. The heap has one entry for each
    resident, perhaps of an earlier and so lower priority; it is renewed when it comes up.
    """

    def __init__(self) -> None:
        self._key: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        heap, key = self._heap, self._key
        chosen: list[int] = []
        aside: list[tuple[float, int]] = []
        while len(chosen) < count:
            priority, expert = heappop(heap)
            if priority != key[expert]:
                heappush(heap, (key[expert], expert))
            elif expert in kept:
                aside.append((priority, expert))
            else:
                chosen.append(expert)
        for entry in aside:
            heappush(heap, entry)
        for expert in chosen:
            self._leave(expert)
        return chosen

    def admitted(self, experts: Sequence[int]) -> None:
        """See `Policy.admitted`."""
        for expert in experts:
            if expert not in self._key:
                self._enter(expert)
                heappush(self._heap, (self._key[expert], expert))

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        known = set(residents)
        for expert in [e for e in self._key if e not in known]:
            self._leave(expert)
        for expert in sorted(known.difference(self._key)):
            self._enter(expert)
        self._heap = [(key, expert) for expert, key in self._key.items()]
        heapify(self._heap)

    def _enter(self, expert: int) -> None:
        """Sets the priority of an expert that enters."""
        raise NotImplementedError

    def _leave(self, expert: int) -> None:
        """Forgets the priority of an expert that left."""
        del self._key[expert]


class LFU(_Ranked):
    """Evicts the expert that was used in the fewest events since the bank was empty.

    Uses are counted whether the expert is in memory or not ("perfect" LFU in the terms of Breslau
    et al., "Web caching and Zipf-like distributions", INFOCOM 1999): a layer has few experts, so
    to remember all counts costs nothing, and an in-cache LFU would evict whoever came last.
    Source: textbook.
    """

    name = "lfu"

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, int] = {}

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        uses, key = self._uses, self._key
        for expert in experts:
            uses[expert] = count = uses.get(expert, 0) + 1
            if expert in key:
                key[expert] = count

    def _enter(self, expert: int) -> None:
        self._key[expert] = self._uses.setdefault(expert, 1)


class LFUAgeing(_Ranked):
    """LFU with dynamic ageing: evicts the lowest K = F + L.

    F counts an expert's uses since it entered (1 for the one that brought it in); L, the age of
    the cache, is the highest K that was evicted so far, 0 at first. K is set when the expert is
    used, with the L of that moment: a hit takes the L before the event's evictions, an entry the
    one after them. History is forgotten on eviction. Source: Arlitt et al., "Evaluating content
    management techniques for web proxy caches", 1999 (LFU-DA).
    """

    name = "lfu_da"

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, int] = {}
        self._age = 0.0

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        uses, key, age = self._uses, self._key, self._age
        for expert in experts:
            if expert in key:
                uses[expert] = count = uses[expert] + 1
                key[expert] = count + age

    def _enter(self, expert: int) -> None:
        self._uses[expert] = 1
        self._key[expert] = 1 + self._age

    def _leave(self, expert: int) -> None:
        # In the paper nobody is protected, so K evicted never falls; here it could.
        self._age = max(self._age, self._key.pop(expert))
        self._uses.pop(expert, None)

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        age = self._age  # nobody was evicted by priority
        known = set(residents)
        self._uses = {e: n for e, n in self._uses.items() if e in known}
        self._key = {e: key for e, key in self._key.items() if e in self._uses}
        super().resync(known)
        self._age = age


class LCP(_Ranked):
    """Evicts the lowest P = μ · 0.25^(ν/128).

    μ counts an expert's uses since it entered (1 for the one that brought it in), ν the events
    since its last use. History is forgotten on eviction. mlx-moe lets the one that entered first
    go where P is equal; here the lowest id does. Source: mlx-moe, `ExpertCache`.
    """

    name = "lcp"

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, int] = {}
        self._now = 0

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        uses, key = self._uses, self._key
        self._now = now = self._now + 1
        for expert in experts:
            if expert in key:
                uses[expert] = count = uses[expert] + 1
                key[expert] = _standing(count, now)

    def _enter(self, expert: int) -> None:
        self._uses[expert] = 1
        self._key[expert] = _standing(1, self._now)

    def _leave(self, expert: int) -> None:
        del self._key[expert]
        self._uses.pop(expert, None)

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        known = set(residents)
        self._uses = {e: n for e, n in self._uses.items() if e in known}
        self._key = {e: key for e, key in self._key.items() if e in self._uses}
        super().resync(known)


def _standing(uses: int, last: int) -> float:
    """Returns log2 of LCP's priority, up to what all experts share, so that it need not be redone.

    P = μ · 2^(−(now − last)/64). Equal P means equal μ up to a power of two, so the power is
    kept apart: equal priorities then give equal floats.
    """
    mantissa, exponent = math.frexp(uses)
    return math.log2(mantissa) + (64 * exponent + last) / 64


class LFRU(PolicyBase):
    """Evicts the lowest f/(a + 1).

    f counts the events that used an expert since the bank was empty, in memory or not (as LFU
    does); a, its age, the events since its last use. Source: arXiv 2608.07911.
    """

    name = "lfru"

    def __init__(self) -> None:
        # By expert id. Scores change with every event, so they are computed when they are wanted,
        # by numpy; `array` because single items are quicker to set there.
        self._now = 0
        self._uses = array("d")
        self._last = array("d")
        self._held = array("d")
        """Uses of residents, infinite for all others: a score that is never the lowest."""

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        self._now = now = self._now + 1
        if experts and experts[-1] >= len(self._uses):
            self._grow(experts[-1])
        uses, last, held = self._uses, self._last, self._held
        for expert in experts:
            uses[expert] += 1
            held[expert] += 1
            last[expert] = now

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        if count <= 0:
            return []
        held = self._held
        score = self._scores()
        chosen = _lowest(score, count)
        if any(expert in kept for expert in chosen):  # seldom: those in use have age 0
            score[[e for e in kept if e < len(score)]] = np.inf
            chosen = _lowest(score, count)
        for expert in chosen:
            held[expert] = math.inf
        return chosen

    def _scores(self) -> np.ndarray:
        """Returns a new array, by expert: what is evicted lowest first; infinite if not there."""
        return np.frombuffer(self._held) / (self._now + 1 - np.frombuffer(self._last))

    def admitted(self, experts: Sequence[int]) -> None:
        """See `Policy.admitted`."""
        for expert in experts:
            if expert >= len(self._uses):
                self._grow(expert)
            if not self._uses[expert]:
                self._uses[expert], self._last[expert] = 1, self._now
            self._held[expert] = self._uses[expert]

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        count = len(self._uses)  # an interrupted `_grow` may have left the others longer
        self._held, self._last = array("d", [math.inf]) * count, self._last[:count]
        self.admitted(sorted(residents))

    def _grow(self, expert: int) -> None:
        length = max(2 * len(self._uses), expert + 1, 64)
        self._held = self._held + array("d", [math.inf]) * (length - len(self._held))
        self._last = self._last + array("d", [0.0]) * (length - len(self._last))
        # Last, since its length is what is looked at, whatever interrupted this before.
        self._uses = self._uses + array("d", [0.0]) * (length - len(self._uses))


def _lowest(score: np.ndarray, count: int) -> list[int]:
    """Returns where the `count` lowest scores are, lowest first, of equal ones the first first."""
    if count <= 4:  # quicker one by one
        score = score.copy()
        chosen = []
        for _ in range(count):
            chosen.append(int(score.argmin()))
            score[chosen[-1]] = np.inf
        return chosen
    ids = (score <= np.partition(score, count - 1)[count - 1]).nonzero()[0]
    return ids[score[ids].argsort(kind="stable")[:count]].tolist()
