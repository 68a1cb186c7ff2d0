"""Policies that keep experts in a queue: LRU, SIEVE, S3-FIFO, Least-Stale, static."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from .base import PolicyBase


class LRU(PolicyBase):
    """Evicts the least recently used expert.

    Recency is renewed once an event, in ascending expert id, hits and misses together, so that
    of one event's experts the lowest id is the first to go. An expert that enters without having
    been used counts as used when it entered. Source: textbook.
    """

    name = "lru"

    def __init__(self) -> None:
        # A dict keeps insertion order: the first key was used longest ago.
        self._order: dict[int, None] = {}

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        order = self._order
        for expert in experts:
            order.pop(expert, None)
            order[expert] = None

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

    def admitted(self, experts: Sequence[int]) -> None:
        """See `Policy.admitted`."""
        for expert in experts:
            self._order.setdefault(expert)

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        known = set(residents)
        order = [expert for expert in self._order if expert in known]
        self._order = dict.fromkeys([*sorted(known.difference(order)), *order])


class _Fifo(PolicyBase):
    """Experts in the order in which they entered; the oldest leaves first."""

    def __init__(self) -> None:
        self._queue: dict[int, None] = {}

    def used(self, experts: Sequence[int]) -> None:
        """Use changes nothing."""

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        chosen = _oldest(self._queue, count, kept, ())
        for expert in chosen:
            del self._queue[expert]
        return chosen

    def admitted(self, experts: Sequence[int]) -> None:
        """See `Policy.admitted`."""
        for expert in experts:
            self._queue.setdefault(expert)

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        self._queue = dict.fromkeys(_resynced(self._queue, residents))


class LeastStale(_Fifo):
    """Evicts first those experts that this pass did not use, oldest entry first.

    An expert is *current* if the pass (here: the event) used it, and *stale* otherwise. Stale
    experts leave first, then current ones; within each, whoever entered first leaves first, and
    use does not renew the place. In an exact bank of one layer this is FIFO, since the current
    experts are protected anyway: what the policy gains in its paper, where all layers share a
    cache, it cannot gain here. Where misses are dropped and experts enter between steps, it
    differs. Source: SpecMD, arXiv 2602.03921, of which the
    abstract was read; the order within each class is as public implementations have it.
    """

    name = "least_stale"

    def __init__(self) -> None:
        super().__init__()
        self._current: frozenset[int] = frozenset()

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        self._current = frozenset(experts)

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        chosen = _oldest(self._queue, count, kept, self._current)
        if len(chosen) < count:
            chosen += _oldest(self._queue, count - len(chosen), kept, frozenset(chosen))
        for expert in chosen:
            del self._queue[expert]
        return chosen


class Static(_Fifo):
    """Admits nothing: pins and initial contents stay, every other expert is read when it is used.

    Such misses are computed in the slots that are left, at least top-k, and forgotten. This is
    the baseline of a profile without replacement. Source: mlx-moe's pins.
    """

    name = "static"
    admits = False


class Sieve(PolicyBase):
    """A FIFO queue in which use is a bit, and a hand that looks for an expert without it.

    New experts join at the newest end, unvisited. A hit sets the expert's bit and moves nothing.
    To evict, the hand goes from the oldest towards the newest (and on from the oldest again),
    clears the bits that it finds set and evicts the first expert without; it stays there for the
    next time. Experts that must stay are passed over, their bits as they are. The event's
    evictions all come before its entries. No ties. Source: Zhang et al., "SIEVE is simpler than
    LRU", NSDI 2024, algorithm 1, and libCacheSim's Sieve.c.
    """

    name = "sieve"

    def __init__(self) -> None:
        self._queue: list[int] = []  # oldest first
        self._visited: dict[int, bool] = {}
        self._hand = 0

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        visited = self._visited
        for expert in experts:
            if expert in visited:
                visited[expert] = True

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        queue, visited, hand = self._queue, self._visited, self._hand
        chosen: list[int] = []
        while len(chosen) < count:
            expert = queue[hand]
            if expert in kept:
                hand += 1
            elif visited[expert]:
                visited[expert] = False
                hand += 1
            else:
                del queue[hand], visited[expert]
                chosen.append(expert)
            if hand >= len(queue):
                hand = 0
        self._hand = hand
        return chosen

    def admitted(self, experts: Sequence[int]) -> None:
        """See `Policy.admitted`."""
        for expert in experts:
            if expert not in self._visited:
                self._queue.append(expert)
                self._visited[expert] = False

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        known = set(residents)
        passed = sum(expert in known for expert in self._queue[: self._hand])
        queue = _resynced(dict.fromkeys(self._queue), known)
        self._visited = {expert: self._visited.get(expert, False) for expert in queue}
        self._queue = queue
        self._hand = passed if passed < len(queue) else 0


class S3FIFO(PolicyBase):
    """Three FIFO queues: small (a tenth), main (the rest), and a ghost of those that left small.

    A new expert enters *small*; one that the ghost remembers enters *main* and leaves the ghost;
    before the first eviction, what finds small full enters main. A hit raises the expert's count,
    which starts at 0 on entry. To evict: from main if main is over its share or small has nobody
    who may go, else from small. From small, oldest first: whoever has two hits or more is moved
    to main, its count cleared; the first with fewer leaves and is remembered by the ghost, oldest
    forgotten first. From main, oldest first: whoever has a hit goes to the newest end with its
    count, at most 3, less one; the first with none leaves.

    Of s slots that are not pinned small has max(1, ⌊s/10⌋), main the rest, the ghost ⌊9s/10⌋
    names. Experts that must stay are passed over. The event's evictions all come before its
    entries. No ties. Source: Yang et al., "FIFO queues are all you need for cache eviction",
    SOSP 2023; libCacheSim's S3FIFO.c and its defaults (small 0.10, ghost 0.90, threshold 2).
    """

    name = "s3_fifo"

    def __init__(self) -> None:
        self._small: dict[int, int] = {}  # hits by expert, oldest first
        self._main: dict[int, int] = {}
        self._ghost: dict[int, None] = {}
        self._returning: set[int] = set()
        self._evicted = False
        self.sized(1)

    def sized(self, slots: int) -> None:
        """See `Policy.sized`."""
        self._small_size = max(1, slots // 10)
        self._main_size = slots - self._small_size
        self._ghost_size = slots * 9 // 10

    def used(self, experts: Sequence[int]) -> None:
        """See `Policy.used`."""
        small, main, ghost = self._small, self._main, self._ghost
        returning = set()
        for expert in experts:
            if expert in main:
                main[expert] += 1
            elif expert in small:
                small[expert] += 1
            elif expert in ghost:
                del ghost[expert]
                returning.add(expert)
        self._returning = returning

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """See `Policy.evict`."""
        self._evicted |= count > 0
        chosen: list[int] = []
        while len(chosen) < count:
            expert = None
            if len(self._main) <= self._main_size:
                expert = self._from_small(kept)
            if expert is None:
                expert = self._from_main(kept)
            if expert is None:  # everyone in main must stay
                expert = self._from_small(kept)
            if expert is not None:  # None: small moved its last to main
                chosen.append(expert)
        return chosen

    def _from_small(self, kept: Collection[int]) -> int | None:
        small, ghost = self._small, self._ghost
        while True:
            for expert in small:
                if expert not in kept:
                    break
            else:
                return None
            if small.pop(expert) >= 2:
                self._main[expert] = 0
                continue
            ghost[expert] = None
            while len(ghost) > self._ghost_size:
                del ghost[next(iter(ghost))]
            return expert

    def _from_main(self, kept: Collection[int]) -> int | None:
        main = self._main
        while True:
            for expert in main:
                if expert not in kept:
                    break
            else:
                return None
            hits = main.pop(expert)
            if not hits:
                return expert
            main[expert] = min(hits, 3) - 1

    def admitted(self, experts: Sequence[int]) -> None:
        """See `Policy.admitted`."""
        for expert in experts:
            if expert in self._small or expert in self._main:
                continue
            self._ghost.pop(expert, None)
            full = len(self._small) >= self._small_size and not self._evicted
            to_main = expert in self._returning or full
            (self._main if to_main else self._small)[expert] = 0

    def resync(self, residents: Iterable[int]) -> None:
        """See `Policy.resync`."""
        known = set(residents)
        self._main = {e: n for e, n in self._main.items() if e in known}
        # An interrupted move may have left an expert in both.
        self._small = {e: n for e, n in self._small.items() if e in known and e not in self._main}
        self._ghost = {e: None for e in self._ghost if e not in known}
        self._returning = set()
        self.admitted(sorted(known.difference(self._small, self._main)))


def _oldest(
    queue: Iterable[int], count: int, kept: Collection[int], also_kept: Collection[int]
) -> list[int]:
    """Returns the first `count` in `queue` that need not stay, or as many as there are."""
    chosen: list[int] = []
    for expert in queue:
        if len(chosen) == count:
            break
        if expert not in kept and expert not in also_kept:
            chosen.append(expert)
    return chosen


def _resynced(queue: dict[int, None], residents: Iterable[int]) -> list[int]:
    """Returns `queue` without those who are gone, and with those who were not known at its end."""
    known = set(residents)
    return [*(e for e in queue if e in known), *sorted(known.difference(queue))]
