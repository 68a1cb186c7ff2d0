"""Replacement policies written from their definitions, to compare moelab's with.

Slow and plain on purpose: every choice is a minimum over all candidates or a walk through a list,
counts and ages are read off the whole history, and nothing is shared with moelab.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any

NEVER = 10**9


@dataclass
class History:
    """All that happened at one layer. Time 0 is before the first event."""

    now: int = 0
    uses: list[tuple[int, int]] = field(default_factory=list)
    """(time, expert), in order."""
    entries: list[tuple[int, int]] = field(default_factory=list)

    def used(self, expert: int, since: int = 0) -> list[int]:
        """Times of an expert's uses after `since`."""
        return [t for t, e in self.uses if e == expert and t > since]

    def entered(self, expert: int) -> int:
        """Time of an expert's last entry."""
        return max(t for t, e in self.entries if e == expert)


class Rule:
    """A policy: whom to let go."""

    admits = True

    def __init__(self, slots: int, future: Sequence[Sequence[int]]) -> None:
        self.slots = slots
        self.future = future
        self.history = History()

    def use(self, experts: Sequence[int]) -> None:
        """An event begins."""

    def choose(self, candidates: set[int]) -> int:
        """Whom to let go now."""
        return min(candidates, key=lambda e: (self.worth(e), e))

    def worth(self, expert: int) -> Any:
        """The lowest goes first."""
        raise NotImplementedError

    def leave(self, expert: int) -> None:
        """Somebody left."""

    def enter(self, expert: int) -> None:
        """Somebody entered."""

    def order(self, misses: Sequence[int]) -> list[int]:
        """In which order a sweep reads."""
        return sorted(misses)


class LRU(Rule):
    def worth(self, expert: int) -> Any:
        used = self.history.used(expert)
        if used:
            return (used[-1], expert)
        return (0, [e for _, e in self.history.entries].index(expert))


class LFU(Rule):
    def worth(self, expert: int) -> Any:
        before_use = any(e == expert and t == 0 for t, e in self.history.entries)
        return len(self.history.used(expert)) + before_use


class LFRU(LFU):
    def worth(self, expert: int) -> Any:
        last = max([0, *self.history.used(expert)])
        return Fraction(super().worth(expert), self.history.now - last + 1)


class LCP(Rule):
    def worth(self, expert: int) -> Any:
        entry = self.history.entered(expert)
        later = self.history.used(expert, since=entry)
        count, age = 1 + len(later), self.history.now - max([entry, *later])
        # P to the 64th: count^64 · 0.25^(age / 2) = count^64 / 2^age.
        return Fraction(count**64, 2**age)


class LFUAgeing(Rule):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.age = 0
        self.priority: dict[int, int] = {}

    def use(self, experts: Sequence[int]) -> None:
        for expert in experts:
            if expert in self.priority:
                uses = self.history.used(expert, since=self.history.entered(expert))
                self.priority[expert] = 1 + len(uses) + self.age

    def worth(self, expert: int) -> Any:
        return self.priority[expert]

    def leave(self, expert: int) -> None:
        self.age = max(self.age, self.priority.pop(expert))

    def enter(self, expert: int) -> None:
        self.priority[expert] = 1 + self.age


class LeastStale(Rule):
    def worth(self, expert: int) -> Any:
        current = self.history.now > 0 and self.history.now in self.history.used(expert)
        entries = [e for _, e in self.history.entries]
        return (current, len(entries) - entries[::-1].index(expert))


class Static(Rule):
    admits = False


class Sieve(Rule):
    """After libCacheSim: newest at the head of the list, the hand an object or nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.line: list[int] = []
        self.bits: set[int] = set()
        self.hand: int | None = None

    def use(self, experts: Sequence[int]) -> None:
        self.bits |= set(experts) & set(self.line)

    def newer(self, expert: int) -> int | None:
        place = self.line.index(expert)
        return self.line[place - 1] if place else None

    def choose(self, candidates: set[int]) -> int:
        at = self.hand if self.hand is not None else self.line[-1]
        while at not in candidates or at in self.bits:
            if at in candidates:
                self.bits.remove(at)
            after = self.newer(at)
            at = self.line[-1] if after is None else after
        self.hand = self.newer(at)
        self.line.remove(at)
        return at

    def enter(self, expert: int) -> None:
        self.line.insert(0, expert)


class S3FIFO(Rule):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.hits: dict[int, int] = {}
        self.back: list[int] = []
        self.any_left = False
        self.share = max(1, int(self.slots * 0.1 + 1e-9))

    def use(self, experts: Sequence[int]) -> None:
        self.back = [e for e in experts if e in self.ghost]
        self.ghost = [e for e in self.ghost if e not in self.back]
        for expert in experts:
            if expert in self.hits:
                self.hits[expert] += 1

    def choose(self, candidates: set[int]) -> int:
        self.any_left = True
        while True:
            main_over = len(self.main) > self.slots - self.share
            if not (main_over and candidates & set(self.main)):
                for expert in [e for e in self.small if e in candidates]:
                    self.small.remove(expert)
                    if self.hits[expert] < 2:
                        self.ghost.append(expert)
                        size = int(self.slots * 0.9 + 1e-9)
                        self.ghost = self.ghost[max(0, len(self.ghost) - size) :]
                        return self.gone(expert)
                    self.hits[expert] = 0
                    self.main.append(expert)
            while candidates & set(self.main):
                expert = next(e for e in self.main if e in candidates)
                self.main.remove(expert)
                if not self.hits[expert]:
                    return self.gone(expert)
                self.hits[expert] = min(self.hits[expert], 3) - 1
                self.main.append(expert)

    def gone(self, expert: int) -> int:
        del self.hits[expert]
        return expert

    def enter(self, expert: int) -> None:
        self.ghost = [e for e in self.ghost if e != expert]
        straight = not self.any_left and len(self.small) >= self.share
        (self.main if expert in self.back or straight else self.small).append(expert)
        self.hits[expert] = 0


class MinForced(Rule):
    def next_use(self, expert: int) -> int:
        """Time of the next use after the present event."""
        later = range(self.history.now, len(self.future))
        return next((t for t in later if expert in self.future[t]), NEVER)

    def worth(self, expert: int) -> Any:
        return -self.next_use(expert)

    def order(self, misses: Sequence[int]) -> list[int]:
        return sorted(misses, key=lambda e: (-self.next_use(e), e))


RULES: dict[str, type[Rule]] = {
    "lru": LRU,
    "lfu": LFU,
    "lfu_da": LFUAgeing,
    "lfru": LFRU,
    "lcp": LCP,
    "sieve": Sieve,
    "s3_fifo": S3FIFO,
    "least_stale": LeastStale,
    "static": Static,
    "min_forced": MinForced,
}


@dataclass(frozen=True)
class Part:
    """A round of an event."""

    served: frozenset[int]
    loads: tuple[tuple[int, int | None], ...]
    """(expert read, who left its slot), in order."""


class Bank:
    """The rules of the bank, around a rule.

    Args:
        name: The policy.
        capacity: Slots.
        pins: In from the start.
        first: Others that are in from the start, from most to least worth keeping.
        top_k: Slots that stay free where nothing is admitted.
        future: All events that will come.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        pins: Iterable[int] = (),
        first: Iterable[int] = (),
        top_k: int = 1,
        future: Sequence[Sequence[int]] = (),
    ) -> None:
        self.capacity = capacity
        self.pins = frozenset(pins)
        self.rule = RULES[name](capacity - len(self.pins), future)
        room = capacity if self.rule.admits else capacity - top_k
        others = [e for e in dict.fromkeys(first) if e not in self.pins]
        others = others[: max(0, room - len(self.pins))]
        self.inside = set(self.pins) | set(others)
        for expert in reversed(others):
            self.rule.history.entries.append((0, expert))
            self.rule.enter(expert)

    def event(self, needed: Iterable[int]) -> tuple[list[int], list[Part]]:
        """Serves an event; returns its misses and its rounds."""
        wanted = set(needed)
        history = self.rule.history
        history.now += 1
        history.uses += [(history.now, e) for e in sorted(wanted)]
        self.rule.use(sorted(wanted - self.pins))
        hits, misses = wanted & self.inside, sorted(wanted - self.inside)
        if not self.rule.admits:
            return misses, self.forgotten(hits, misses)
        if len(wanted | (self.pins & self.inside)) <= self.capacity:
            return misses, [Part(frozenset(wanted), self.replace(misses, self.pins | wanted))]
        parts, waiting = [], self.rule.order(misses)
        protected, served = self.pins | wanted, hits
        while waiting or served:
            room = self.capacity - len(self.inside & protected)
            now, waiting = waiting[:room], waiting[room:]
            if served or now:
                loads = self.replace(now, protected)
                parts.append(Part(frozenset(served) | frozenset(now), loads))
            protected, served = self.pins, set()
        return misses, parts

    def replace(
        self, entering: list[int], protected: frozenset[int] | set[int]
    ) -> tuple[tuple[int, int | None], ...]:
        free = self.capacity - len(self.inside)
        left: list[int | None] = [None] * min(free, len(entering))
        while len(left) < len(entering):
            expert = self.rule.choose(self.inside - protected)
            assert expert in self.inside - protected
            self.inside.remove(expert)
            self.rule.leave(expert)
            left.append(expert)
        for expert in entering:
            self.inside.add(expert)
            if expert not in self.pins:
                self.rule.history.entries.append((self.rule.history.now, expert))
                self.rule.enter(expert)
        return tuple(zip(entering, left, strict=True))

    def forgotten(self, hits: set[int], misses: list[int]) -> list[Part]:
        room = self.capacity - len(self.inside)
        if len(misses) <= room:
            return [Part(frozenset(hits) | set(misses), tuple((e, None) for e in misses))]
        parts = []
        for at in range(0, len(misses), room):
            now = misses[at : at + room]
            served = frozenset(now) | (hits if at == 0 else set())
            parts.append(Part(served, tuple((e, None) for e in now)))
        return parts


def minimum(
    events: Sequence[Iterable[int]],
    capacity: int,
    pins: Iterable[int] = (),
    first: Iterable[int] = (),
) -> list[tuple[list[int], set[int]]]:
    """MIN with bypass by its definition: misses and residents after each event."""
    fixed = set(pins)
    inside = fixed | set(first)
    told = []
    for now, needed in enumerate(map(set, events)):
        misses = sorted(needed - inside)
        inside |= needed

        def soon(expert: int, now: int = now) -> int:
            later = range(now + 1, len(events))
            return next((t for t in later if expert in set(events[t])), NEVER)

        while len(inside) > capacity:
            inside.remove(max(inside - fixed, key=lambda e: (soon(e), -e)))
        told.append((misses, set(inside)))
    return told


def least_loads(
    events: Sequence[Iterable[int]],
    capacity: int,
    pins: frozenset[int] = frozenset(),
    first: frozenset[int] = frozenset(),
    *,
    forced: bool,
) -> int:
    """The least loads that any sequence of choices needs: every one is tried.

    Args:
        events: Experts of each event.
        capacity: Slots.
        pins: Never leave; in from the start.
        first: Others that are in from the start.
        forced: Every miss must be admitted, in the rounds that the bank's rules make; otherwise
            a miss may be computed and forgotten.
    """
    best = {pins | first: 0}
    for needed in map(frozenset, events):
        after: dict[frozenset[int], int] = {}
        for inside, cost in best.items():
            loads = cost + len(needed - inside)
            follow = (
                _admitting(inside, needed, capacity, pins)
                if forced
                else _subsets(inside | needed, capacity, pins)
            )
            for state in follow:
                after[state] = min(loads, after.get(state, NEVER))
        best = after
    return min(best.values())


def _subsets(of: frozenset[int], capacity: int, pins: frozenset[int]) -> set[frozenset[int]]:
    free = sorted(of - pins)
    return {
        pins | frozenset(chosen)
        for size in range(capacity - len(pins) + 1)
        for chosen in combinations(free, size)
    }


def _admitting(
    inside: frozenset[int], needed: frozenset[int], capacity: int, pins: frozenset[int]
) -> set[frozenset[int]]:
    found = set()
    todo = [(inside, needed - inside, pins | needed)]
    while todo:
        now, waiting, protected = todo.pop()
        room = capacity - len(now & protected)
        for entering in combinations(sorted(waiting), min(room, len(waiting))):
            short = max(0, len(now) + len(entering) - capacity)
            for left in combinations(sorted(now - protected), short):
                state = (now - frozenset(left)) | frozenset(entering)
                rest = waiting - frozenset(entering)
                if rest:
                    todo.append((state, rest, pins))
                else:
                    found.add(state)
    return found
