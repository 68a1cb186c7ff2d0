"""Every policy against its definition, and what holds for all of them."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
from moelab.errors import MoelabError, PolicyError
from moelab.experts.policies import (
    LRU,
    REPLAY_ONLY,
    Future,
    Min,
    MinForced,
    PolicyBase,
    make_policy,
)  # fmt: skip
from moelab.experts.residency import Load, Residency, Round
from tests.support import brute

EXPERTS = 12
LIVE = [name for name in brute.RULES if name not in REPLAY_ONLY]
ALL = [*LIVE, "min_forced"]

Events = list[list[int]]


@st.composite
def situations(draw: Any, longest: int = EXPERTS, events: int = 40) -> dict[str, Any]:
    """Events of up to `longest` experts, a capacity, pins and initial contents."""
    capacity = draw(st.integers(1, EXPERTS))
    pins = draw(st.lists(st.integers(0, EXPERTS - 1), max_size=capacity - 1, unique=True))
    longest = min(longest, EXPERTS)
    # From few experts more often, so that something is used again.
    width = draw(st.sampled_from([4, 7, EXPERTS]))
    event = st.lists(
        st.integers(0, width - 1), min_size=1, max_size=min(longest, width), unique=True
    )
    return {
        "events": draw(st.lists(event.map(sorted), max_size=events)),
        "capacity": capacity,
        "pins": pins,
        "first": draw(st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True)),
    }


def residency(
    name: str, events: Events, capacity: int, pins: Iterable[int] = (), first: Iterable[int] = ()
) -> Residency:
    """A bank with its initial contents, as replay and the live bank make it."""
    fixed = frozenset(pins)
    if name == "min_forced":
        policy: Any = MinForced(Future([[e for e in n if e not in fixed] for n in events]))
    else:
        policy = make_policy(name)()
    bank = Residency(capacity, policy, fixed)
    for load in bank.fill(first, 1):
        bank.arrived(load)
    return bank


def serve(bank: Residency, needed: Sequence[int]) -> tuple[list[int], list[Round]]:
    misses = bank.begin(needed)
    rounds = []
    for part in bank.rounds(needed, misses):
        for load in part.loads:
            bank.arrived(load)
        assert all(e in bank.slot_of for e in part.serve)
        rounds.append(part)
    bank.end()
    return misses, rounds


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(at=situations())
def test_agrees_with_its_definition(name: str, at: dict[str, Any]) -> None:
    """Event for event: hits, loads and their order, evictions and theirs, rounds, contents."""
    events = at["events"]
    ours = residency(name, **at)
    theirs = brute.Bank(name, at["capacity"], at["pins"], at["first"], 1, events)
    assert set(ours.slot_of) == theirs.inside
    for needed in events:
        misses, rounds = serve(ours, needed)
        want_misses, want = theirs.event(needed)
        assert misses == want_misses
        got = [
            brute.Part(frozenset(r.serve), tuple((load.expert, load.evicted) for load in r.loads))
            for r in rounds
        ]
        assert got == want
        assert set(ours.slot_of) == theirs.inside


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(at=situations(longest=3, events=120))
def test_agrees_over_many_small_events(name: str, at: dict[str, Any]) -> None:
    """Without sweeps, long enough for counts, ages, ghosts and hands to matter."""
    at["capacity"] = max(at["capacity"], len(at["pins"]) + 3)
    ours = residency(name, **at)
    theirs = brute.Bank(name, at["capacity"], at["pins"], at["first"], 1, at["events"])
    if not theirs.rule.admits:
        return  # one slot is free, so nearly all of its events are swept
    for needed in at["events"]:
        misses, (only,) = serve(ours, needed)
        want, (part,) = theirs.event(needed)
        assert misses == want
        assert tuple((load.expert, load.evicted) for load in only.loads) == part.loads


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ALL)
def test_agrees_over_a_long_time(name: str, seed: int) -> None:
    """Skewed use, now and then a sweep: high counts, long ages, many promotions."""
    rng = np.random.default_rng(seed)
    capacity, skew = (14, 0.9) if seed % 2 else (6, 0.3)
    pins = [5, 17] if seed > 1 else []
    scores = rng.gumbel(size=(260, 24)) - skew * np.log(np.arange(1, 25))
    order = np.argsort(-scores, axis=1)
    sizes = np.where(rng.random(260) < 0.04, 20, rng.integers(1, 5, 260))
    events = [sorted(row[:size].tolist()) for row, size in zip(order, sizes, strict=True)]
    ours = residency(name, events, capacity, pins, [20, 3])
    theirs = brute.Bank(name, capacity, pins, [20, 3], 1, events)
    for needed in events:
        misses, rounds = serve(ours, needed)
        want, parts = theirs.event(needed)
        assert misses == want
        assert [[(load.expert, load.evicted) for load in r.loads] for r in rounds] == [
            list(part.loads) for part in parts
        ]


def test_least_stale_by_example() -> None:
    """Between events, as a bank does that drops its misses: what the last one used goes last."""
    policy = make_policy("least_stale")()
    policy.admitted([4, 1, 2])
    policy.used([4, 7])
    policy.admitted([7])
    assert policy.evict(3, [1, 2, 4, 7], [2]) == [1, 4, 7]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(at=situations())
def test_invariants(name: str, at: dict[str, Any]) -> None:
    """Capacity, pins, protection and slots, from the loads alone."""
    bank = residency(name, **at)
    pins, capacity = set(at["pins"]), at["capacity"]
    slots = {slot: expert for expert, slot in bank.slot_of.items()}
    assert pins <= set(bank.slot_of)
    for needed in at["events"]:
        before = set(bank.slot_of)
        fits = bank.fits(needed)
        misses, rounds = serve(bank, needed)
        assert misses == [e for e in needed if e not in before]
        assert (len(rounds) == 1) == fits
        assert sorted(e for r in rounds for e in r.serve) == needed, "each is served once"
        assert sorted(load.expert for r in rounds for load in r.loads) == misses, "and read once"
        left = [load.evicted for r in rounds for load in r.loads if load.evicted is not None]
        assert not pins & set(left), "a pin never leaves"
        assert not set(needed) & {load.evicted for load in rounds[0].loads}
        if fits:
            assert not set(needed) & set(left), "nobody leaves while the event needs it"
        for part in rounds:
            for load in part.loads:
                assert 0 <= load.slot < capacity
                assert load.evicted is None or slots[load.slot] == load.evicted
                slots[load.slot] = load.expert
        assert len(bank.slot_of) == len(set(bank.slot_of.values())) <= capacity
        assert pins <= set(bank.slot_of)
        assert all(slots[slot] == expert for expert, slot in bank.slot_of.items())
        if not bank.policy.admits:
            assert set(bank.slot_of) == before, "whoever was there stays, nobody else does"
        elif fits:
            assert set(needed) <= set(bank.slot_of)


@settings(max_examples=150, deadline=None)
@given(at=situations())
def test_min_agrees_with_its_definition(at: dict[str, Any]) -> None:
    events, pins, capacity = at["events"], at["pins"], at["capacity"]
    contents = list(dict.fromkeys([*pins, *at["first"]]))[:capacity]
    ours = Min(capacity, Future(events), pins, contents)
    for needed, (misses, inside) in zip(
        events, brute.minimum(events, capacity, pins, contents), strict=True
    ):
        before = set(ours.residents)
        got = ours.event(needed)
        assert got.misses == misses
        assert ours.residents == inside
        assert got.admitted == sorted(set(misses) & inside)
        assert set(got.evicted) == before - inside and len(got.evicted) == len(set(got.evicted))


small = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True).map(sorted),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(small, st.integers(1, 3), st.booleans())
def test_min_needs_the_least_loads_there_are(events: Events, capacity: int, pin: bool) -> None:
    """Against every possible sequence of choices: with bypass always, forced without sweeps."""
    pins = [4] if pin and capacity > 1 else []
    bypass = Min(capacity, Future(events), pins, pins)
    loads = sum(len(bypass.event(needed).misses) for needed in events)
    assert loads == brute.least_loads(events, capacity, frozenset(pins), forced=False)
    events = [needed[: capacity - len(pins)] for needed in events]
    bank = residency("min_forced", events, capacity, pins)
    forced = sum(len(serve(bank, needed)[0]) for needed in events)
    assert forced == brute.least_loads(events, capacity, frozenset(pins), forced=True)


@settings(max_examples=150, deadline=None)
@given(at=st.one_of(situations(), situations(longest=3, events=60)))
def test_min_never_loads_more_than_any_other(at: dict[str, Any]) -> None:
    """From the same contents; the forced variant against all that admit, where nothing is swept."""
    events, pins, capacity = at["events"], at["pins"], at["capacity"]
    banks = {name: residency(name, **at) for name in ALL}
    contents = sorted(banks["lru"].slot_of)
    minimum = Min(capacity, Future(events), pins, contents)
    least = sum(len(minimum.event(needed).misses) for needed in events)
    loads = {
        name: sum(len(serve(bank, needed)[0]) for needed in events) for name, bank in banks.items()
    }
    assert all(least <= number for number in loads.values())
    if all(len({*needed, *pins}) <= capacity for needed in events):
        admitting = [n for name, n in loads.items() if banks[name].policy.admits]
        assert loads["min_forced"] <= min(admitting)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=3).map(sorted), max_size=60))
def test_lru_misses_fall_as_capacity_grows(events: Events) -> None:
    """While every event fits. A sweep lets its last misses stay, which breaks inclusion."""
    curve = []
    for capacity in range(3, EXPERTS + 1):
        bank = residency("lru", events, capacity)
        curve.append(sum(len(serve(bank, needed)[0]) for needed in events))
    assert curve == sorted(curve, reverse=True)


@pytest.mark.parametrize("name", LIVE)
@settings(max_examples=60, deadline=None)
@given(
    at=situations(),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, EXPERTS)), max_size=4),
)
def test_recovers_from_an_interrupt(
    name: str, at: dict[str, Any], cuts: list[tuple[int, int]]
) -> None:
    """After `recover` the bank holds what arrived, and goes on keeping its rules."""
    bank = residency(name, **at)
    stops = dict(cuts)
    pins = set(at["pins"])
    for number, needed in enumerate(at["events"]):
        left = stops.get(number, 10**6)
        for part in bank.rounds(needed, bank.begin(needed)):
            for load in part.loads:
                if left == 0:
                    break
                left -= 1
                bank.arrived(load)
            if left == 0:
                break
        if left == 0:
            bank.recover()
        bank.end()
        assert len(bank.slot_of) == len(set(bank.slot_of.values())) <= at["capacity"]
        assert pins <= set(bank.slot_of)
        assert sorted([*bank.slot_of.values(), *bank._free]) == list(range(at["capacity"]))
        assert sorted(bank.ranking()) == sorted(bank.slot_of)


@contextlib.contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Raises at the n-th line that is run of the bank's rules and policies."""
    left = line
    before = sys.gettrace()

    def trace(frame: Any, what: str, _: Any) -> Any:
        nonlocal left
        if "moelab/experts" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if what == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("name", LIVE)
def test_an_interrupt_at_any_line_leaves_a_bank_that_works(name: str) -> None:
    """In small events and sweeps, with a pin; 8 slots of 24 experts."""
    events = [sorted({(7 * i * k + k) % 24 for k in range(1, 4)}) for i in range(1, 30)]
    events[4::6] = [list(range(i % 5, 24, 2)) for i in range(len(events[4::6]))]
    for line in range(1, 10_000, 13):
        bank = residency(name, [], 8, [3], [9, 1, 4])
        done = 0
        try:
            with interrupted_at(line):
                for needed in events:
                    serve(bank, needed)
                    done += 1
        except KeyboardInterrupt:
            pass
        else:
            break
        bank.recover()
        for needed in events[done:]:
            assert sorted([*bank.slot_of.values(), *bank._free]) == list(range(8))
            assert 3 in bank.slot_of
            assert sorted(bank.ranking()) == sorted(bank.slot_of)
            misses, rounds = serve(bank, needed)
            assert sorted(load.expert for part in rounds for load in part.loads) == misses
    assert line > 1000


@pytest.mark.parametrize("name", LIVE)
@settings(max_examples=40, deadline=None)
@given(at=situations())
def test_a_cleared_bank_is_a_new_one(name: str, at: dict[str, Any]) -> None:
    def run(bank: Residency) -> list[Any]:
        return [serve(bank, needed) for needed in at["events"]]

    bank = residency(name, at["events"], at["capacity"])
    first = run(bank)
    bank.clear()
    assert not bank.slot_of
    assert run(bank) == first


@pytest.mark.parametrize("name", LIVE)
@settings(max_examples=40, deadline=None)
@given(at=situations(longest=3))
def test_ranking_is_the_order_of_leaving(name: str, at: dict[str, Any]) -> None:
    """And looking changes nothing."""
    bank, twin = residency(name, **at), residency(name, **at)
    for needed in at["events"]:
        order = bank.ranking()
        assert sorted(order) == sorted(bank.slot_of)
        pinned = [e for e in order if e in bank.pinned]
        assert order[len(order) - len(pinned) :] == pinned
        first = copy.deepcopy(bank.policy).evict(
            len(order) - len(pinned), bank.slot_of, bank.pinned
        )
        assert order == [*first, *pinned]
        assert serve(bank, needed) == serve(twin, needed)


@pytest.mark.parametrize("name", LIVE)
@settings(max_examples=40, deadline=None)
@given(at=situations(longest=3), slots=st.integers(1, EXPERTS))
def test_resized_keeps_what_is_most_worth_keeping(
    name: str, at: dict[str, Any], slots: int
) -> None:
    slots = max(slots, len(at["pins"]) + 1)
    bank = residency(name, **at)
    for needed in at["events"]:
        serve(bank, needed)
    before, order = dict(bank.slot_of), bank.ranking()
    other = bank.resized(slots, 1)
    room = slots if bank.policy.admits else slots - 1
    assert set(other.slot_of) == set(order[max(0, len(order) - room) :])
    assert sorted([*other.slot_of.values(), *other._free]) == list(range(slots))
    assert bank.slot_of == before and bank.ranking() == order
    same = bank.resized(at["capacity"], 1)
    for needed in at["events"]:
        serve(other, needed)
        assert len(other.slot_of) <= slots and other.pinned <= set(other.slot_of)
        got, want = serve(same, needed), serve(bank, needed)
        assert got[0] == want[0], "of the same size it goes on alike"


@pytest.mark.parametrize("name", LIVE)
def test_use_without_entry_is_bounded_and_harmless(name: str) -> None:
    """A bank that drops its misses tells of every use and lets few in, between events."""
    policy = make_policy(name)()
    policy.sized(4)
    inside: dict[int, None] = dict.fromkeys([0, 1, 2, 3])
    policy.admitted([3, 2, 1, 0])
    for turn in range(2000):
        needed = sorted({(turn * k * 7) % 50 for k in range(1, 4)})
        policy.used(needed)
        missed = [e for e in needed if e not in inside][:1]
        if not missed or not policy.admits:
            continue
        (left,) = policy.evict(1, inside, ())
        assert left in inside
        del inside[left]
        policy.admitted(missed)
        inside[missed[0]] = None
    sizes = [len(v) for v in vars(policy).values() if hasattr(v, "__len__")]
    assert max(sizes, default=0) <= 128
    assert sorted(policy.evict(4, inside, ())) == sorted(inside)


def test_what_fills_a_bank() -> None:
    bank = Residency(4, LRU(), [9, 2])
    assert bank.fill([5, 2, 7, 8], 1) == [
        Load(2, 0, None), Load(9, 1, None), Load(5, 2, None), Load(7, 3, None)
    ]  # fmt: skip
    bank.recover()  # as if none had arrived
    for load in bank.fill([5, 7], 1):
        bank.arrived(load)
    assert bank.ranking() == [7, 5, 2, 9], "the least worthy of the initial contents goes first"
    still = Residency(5, make_policy("static")(), [9])
    assert [load.expert for load in still.fill(range(9), 2)] == [9, 0, 1], "two stay free"


def test_static_by_example() -> None:
    bank = residency("static", [], 4, [5], [1, 0, 3])
    assert sorted(bank.slot_of) == [0, 1, 5]
    misses, rounds = serve(bank, [1, 2])
    assert (misses, rounds) == ([2], [Round([1, 2], [Load(2, 3, None)])])
    misses, rounds = serve(bank, [2, 3, 5])
    assert misses == [2, 3]
    assert [list(r.serve) for r in rounds] == [[5, 2], [3]]
    assert sorted(bank.slot_of) == [0, 1, 5]


def test_sieve_by_example() -> None:
    """Worked by hand: the fill's last, 6, is the least worthy and so the oldest in the queue."""
    bank = residency("sieve", [], 7, (), [0, 1, 2, 3, 4, 5, 6])
    serve(bank, [1, 6])
    left = [load.evicted for _, (r,) in [serve(bank, [7])] for load in r.loads]
    assert left == [5], "6 was visited: its bit is cleared, 5 goes"
    assert [load.evicted for _, (r,) in [serve(bank, [8])] for load in r.loads] == [4]
    # The hand stays where it was, and a hit of the same event is passed over.
    assert [load.evicted for _, (r,) in [serve(bank, [3, 9, 10])] for load in r.loads] == [2, 0]
    # Past 1, whose bit is cleared, and round: 7 and 8 are new, 6 has lost its bit.
    assert [load.evicted for _, (r,) in [serve(bank, [11])] for load in r.loads] == [7]


def test_s3_fifo_by_example() -> None:
    """20 slots, so two in small; counts, promotion and ghost worked by hand."""
    bank = Residency(20, make_policy("s3_fifo")())

    def left(needed: list[int]) -> list[int | None]:
        return [load.evicted for _, (r,) in [serve(bank, needed)] for load in r.loads]

    assert left(list(range(20))) == [None] * 20  # 0 and 1 to small, 2 to 19 to main
    assert left([0]) == left([0]) == []
    assert left([20]) == [1], "0 was hit twice and is promoted, 1 goes and is remembered"
    assert left([21]) == [2], "main is over its share of 18, and 2 is its oldest"
    assert left([1]) == [20], "main is not: small's oldest goes; 1 comes back straight to main"
    assert left([2]) == [3], "nobody remembers who left main: 2 is in small"
    assert left([22]) == [21]
    assert bank.ranking()[:2] == [2, 22]


@pytest.mark.parametrize(("uses", "later"), [(2, 64), (3, 0), (4, 128), (6, 63), (6, 65), (5, 149)])
def test_lcp_weighs_uses_against_age_exactly(uses: int, later: int) -> None:
    """Expert 1 was used `uses` times, expert 0 once, `later` events after it."""
    bank = residency("lcp", [], 3)
    for _ in range(uses):
        serve(bank, [1])
    for _ in range(later - 1):
        serve(bank, [2])
    serve(bank, [0])
    serve(bank, [2])
    ages = (later + 1, 1) if later else (2, 1)
    worth = [1 * 0.25 ** (ages[1] / 128), uses * 0.25 ** (ages[0] / 128)]
    assert bank.ranking().index(0) < bank.ranking().index(1) or worth[1] < worth[0]
    assert bank.ranking().index(1) < bank.ranking().index(0) or worth[0] <= worth[1]


class Mine(PolicyBase):
    """Lets the highest id go."""

    name = "mine"

    def used(self, experts: Sequence[int]) -> None:
        """Nothing."""

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        return sorted((e for e in residents if e not in kept), reverse=True)[:count]

    def resync(self, residents: Iterable[int]) -> None:
        """Nothing."""


class Counting(Mine):
    def __init__(self) -> None:
        self.events: list[list[int]] = []

    def used(self, experts: Sequence[int]) -> None:
        self.events.append(list(experts))


@pytest.mark.parametrize("given", [Mine, Mine(), lambda: Mine()])
def test_a_policy_of_ones_own(given: Any) -> None:
    bank = Residency(3, make_policy(given)(), [11])
    for load in bank.fill([], 1):
        bank.arrived(load)
    serve(bank, [1, 2])
    _, (only,) = serve(bank, [5])
    assert [load.evicted for load in only.loads] == [2]


def test_each_layer_has_its_own() -> None:
    mine = Counting()
    maker = make_policy(mine)
    mine.used([9])
    first, second = maker(), maker()
    first.used([1])
    assert isinstance(first, Counting) and isinstance(second, Counting)
    assert (first.events, second.events) == ([[1]], [])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lrru", "lru, lfu, lfu_da, lfru, lcp, sieve, s3_fifo, least_stale, static"),
        ("min", "moelab.replay only"),
        ("min_forced", "moelab.replay only"),
        (3, "lacks"),
        (object(), "admits, sized, used, evict"),
        (lambda x: x, "without arguments"),
        (dict, "lacks them"),
    ],
)
def test_bad_policies(given: Any, words: str) -> None:
    with pytest.raises(PolicyError, match=words) as caught:
        make_policy(given)
    assert isinstance(caught.value, MoelabError) and isinstance(caught.value, ValueError)


def test_the_list() -> None:
    frame = moelab.policies()
    assert set(frame["name"]) == {*ALL, "min"}
    assert set(frame.loc[~frame["live"], "name"]) == set(REPLAY_ONLY)
    assert all(frame["what"].str.endswith(".")) and all(frame["source"].str.len() > 3)
    for name in frame.loc[frame["live"], "name"]:
        assert make_policy(name)().name == name
