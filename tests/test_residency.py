"""Who sits in the bank: the rules, against a brute-force LRU written from their definition."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.experts.policies import LRU
from moelab.experts.residency import Load, Residency, Round

EXPERTS = 12


@dataclass
class BruteForce:
    """LRU with recency as explicit times and every choice a minimum over all candidates."""

    capacity: int
    pinned: frozenset[int] = frozenset()
    clock: int = 0
    last: dict[int, tuple[int, int]] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)

    def event(self, needed: Iterable[int]) -> list[tuple[set[int], list[int], set[int]]]:
        """Serves an event; returns experts served, read and thrown out, for each round."""
        wanted = set(needed)
        self.clock += 1
        for expert in wanted:
            self.last[expert] = (self.clock, expert)
        hits, misses = wanted & self.inside, sorted(wanted - self.inside)
        rounds = []
        protected, served = self.pinned | wanted, hits
        while misses or served:
            movable = self.inside - protected
            space = self.capacity - len(self.inside) + len(movable)
            now, misses = misses[:space], misses[space:]
            out = set()
            while len(self.inside) + len(now) > self.capacity:
                oldest = min(self.inside - protected, key=lambda e: self.last[e])
                self.inside.remove(oldest)
                out.add(oldest)
            self.inside.update(now)
            rounds.append((served | set(now), now, out))
            protected, served = self.pinned, set()
        return rounds


def serve(residency: Residency, needed: list[int]) -> tuple[list[int], list[Round]]:
    """Does what the switch does: asks, reads, confirms."""
    misses = residency.begin(needed)
    rounds = []
    for part in residency.rounds(needed, misses):
        for load in part.loads:
            residency.arrived(load)
        rounds.append(part)
    return misses, rounds


events = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True).map(sorted),
    max_size=40,
)


@settings(max_examples=250, deadline=None)
@given(events, st.integers(2, EXPERTS), st.sets(st.integers(0, EXPERTS - 1), max_size=4))
def test_agrees_with_brute_force(stream: list[list[int]], capacity: int, pins: set[int]) -> None:
    """Event for event and round for round: hits, misses, reads, who left, who stayed."""
    pinned = frozenset(sorted(pins)[: capacity - 1])
    ours = Residency(capacity, LRU(), pinned)
    theirs = BruteForce(capacity, pinned)
    for needed in stream:
        before = set(theirs.inside)
        misses, got = serve(ours, needed)
        want = theirs.event(needed)
        assert misses == sorted(set(needed) - before)
        assert [
            (set(r.serve), [load.expert for load in r.loads],
             {load.evicted for load in r.loads} - {None})
            for r in got if r.serve
        ] == [r for r in want if r[0]]  # fmt: skip
        assert set(ours.slot_of) == theirs.inside
        assert (len(got) > 1) == (len(set(needed) | (pinned & before)) > capacity)


@settings(max_examples=150, deadline=None)
@given(events, st.integers(1, EXPERTS))
def test_every_event_keeps_the_rules(stream: list[list[int]], capacity: int) -> None:
    residency = Residency(capacity, LRU())
    slots: dict[int, int] = {}  # what each slot holds, from the loads alone
    for needed in stream:
        start = dict(slots)
        misses = residency.begin(needed)
        served: list[int] = []
        read: list[int] = []
        for number, part in enumerate(residency.rounds(needed, misses)):
            for load in part.loads:
                assert 0 <= load.slot < capacity
                assert slots.get(load.slot) == load.evicted
                # Nobody leaves who is still to be served.
                assert load.evicted not in set(needed) - set(served) or load.evicted is None
                slots[load.slot] = load.expert
                residency.arrived(load)
                read.append(load.expert)
            hits = [e for e in needed if e in start.values()]
            assert number > 0 or set(hits) <= set(part.serve), "hits go first"
            assert all(residency.slot_of[e] in slots for e in part.serve)
            assert {slots[residency.slot_of[e]] for e in part.serve} == set(part.serve)
            served += part.serve
        assert sorted(served) == needed, "each expert is served once"
        assert sorted(read) == misses, "each miss is read once, and no hit"
        assert len(slots) == len(set(slots.values())) <= capacity
        assert residency.slot_of == {expert: slot for slot, expert in slots.items()}


@settings(max_examples=150, deadline=None)
@given(
    events,
    st.integers(1, EXPERTS),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, EXPERTS)), max_size=4),
)
def test_recovers_from_an_interrupt_after_any_read(
    stream: list[list[int]], capacity: int, cuts: list[tuple[int, int]]
) -> None:
    """After `recover` the state is whole: what arrived is there, all other slots are free."""
    residency = Residency(capacity, LRU())
    stops = dict(cuts)
    holds: dict[int, int] = {}
    for number, needed in enumerate(stream):
        left = stops.get(number, 10**6)
        cut = False
        for part in residency.rounds(needed, residency.begin(needed)):
            for load in part.loads:  # all of these slots are lost to who sat there
                holds.pop(load.slot, None)
            for load in part.loads:
                if left == 0:
                    cut = True
                    break
                left -= 1
                residency.arrived(load)
                holds[load.slot] = load.expert
            if cut:
                break
        if cut:
            residency.recover()
        assert residency.slot_of == {expert: slot for slot, expert in holds.items()}
        assert len(holds) <= capacity
    everyone = list(range(min(capacity, EXPERTS)))
    _, (only,) = serve(residency, everyone)
    assert set(residency.slot_of) == set(everyone) == set(only.serve)


class Perverse(LRU):
    """Throws out whoever was used last, so that only the bank's own rules protect anyone."""

    name = "perverse"

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        chosen = [e for e in reversed(self._order) if e in residents and e not in kept][:count]
        for expert in chosen:
            del self._order[expert]
        return chosen


@settings(max_examples=100, deadline=None)
@given(events, st.integers(2, EXPERTS), st.integers(0, 1))
def test_an_event_is_protected_from_any_policy(
    stream: list[list[int]], capacity: int, pins: int
) -> None:
    residency = Residency(capacity, Perverse(), range(pins))
    for needed in stream:
        misses, rounds = serve(residency, needed)
        assert [load.expert for part in rounds for load in part.loads] == misses
        first = {load.evicted for load in rounds[0].loads}
        assert not first & set(needed), "nobody leaves before being served"
        assert not {load.evicted for part in rounds for load in part.loads} & set(range(pins))
        if residency.fits(needed):
            assert set(needed) <= set(residency.slot_of)


def test_what_fits() -> None:
    bank = Residency(3, LRU(), pinned=[7])
    assert bank.fits([0, 1, 2]) and not bank.fits([0, 1, 2, 3])
    serve(bank, [7])
    assert bank.fits([0, 1]) and bank.fits([0, 1, 7]) and not bank.fits([0, 1, 2])


def test_recency_by_example() -> None:
    """Worked by hand from the rules, so that the brute force above is checked as well."""
    bank = Residency(3, LRU())
    serve(bank, [0, 1, 2])
    serve(bank, [1])
    # 0 and 2 were used longest ago, in one event: the lower id is the first to go.
    assert [load.evicted for _, (r,) in [serve(bank, [5])] for load in r.loads] == [0]
    assert [load.evicted for _, (r,) in [serve(bank, [6])] for load in r.loads] == [2]
    assert set(bank.slot_of) == {1, 5, 6}
    # A hit and a miss: the hit is protected though it is the oldest.
    assert [load.evicted for _, (r,) in [serve(bank, [1, 7])] for load in r.loads] == [5]
    # Recency of hits and misses of one event is renewed together, in ascending id: 6, then 1, 7.
    assert [load.evicted for _, (r,) in [serve(bank, [8, 9])] for load in r.loads] == [6, 1]
    assert set(bank.slot_of) == {7, 8, 9}


def test_sweep_by_example() -> None:
    bank = Residency(3, LRU())
    serve(bank, [4, 8, 9])
    misses, rounds = serve(bank, [0, 1, 2, 3, 5, 8])
    assert misses == [0, 1, 2, 3, 5]
    assert [list(r.serve) for r in rounds] == [[8, 0, 1], [2, 3, 5]]
    assert [[(load.expert, load.evicted) for load in r.loads] for r in rounds] == [
        [(0, 4), (1, 9)],
        [(2, 0), (3, 1), (5, 8)],
    ]
    assert set(bank.slot_of) == {2, 3, 5}


def test_pins_never_leave() -> None:
    bank = Residency(3, LRU(), pinned=[7])
    serve(bank, [7])
    for needed in ([0, 1], [2, 3], [0, 1, 2, 3, 4, 5], [6]):
        serve(bank, needed)
        assert 7 in bank.slot_of
    bank.clear()
    assert not bank.slot_of
    _, (only,) = serve(bank, [1, 2])
    assert only.loads == [Load(1, 0, None), Load(2, 1, None)]


@pytest.mark.parametrize("fits", [True, False])
def test_host_memory_does_not_grow(fits: bool) -> None:
    """The order of use names no expert twice and none that does not exist."""
    policy = LRU()
    bank = Residency(4, policy)
    for turn in range(500):
        serve(bank, sorted({(turn * k) % EXPERTS for k in range(2 if fits else 9)}))
    assert len(policy._order) <= EXPERTS
    assert len(bank.slot_of) <= 4
