"""Hits of every capacity from one pass: stacks of experts, one event at a time.

A policy has the *inclusion* property if a bank of C + 1 slots always holds what a bank of C holds.
Then the banks of all sizes are one list, the stack: the first C of it are the bank of C slots, and
an expert hits in every bank that is larger than its place in the stack (Mattson et al.,
"Evaluation techniques for storage hierarchies", 1970). An event asks for several experts at once,
so all its places are read before anything moves. Of an event with the experts N and the bank R_C:

- LRU: N enters at the top, in an order that is the same for every C (ascending id, so that the
  highest id is on top, as `experts.residency` has it); the others keep their order.
- MIN: the bank is then the C of R_C ∪ N that are used soonest. Let X_C be the rest of R_C ∪ N.
  From C to C + 1 the place C + 1 gets the soonest of X_C and of who was in that place. X_0 is N,
  so X never has more members than the event, and is empty once all of N have been passed.
- MIN that must admit: N, then the C − |N| soonest of R_C without N; the same walk from place
  |N| + 1 on.

MIN's inclusion holds at every capacity. That of the others holds where no event is larger than the
bank; `sweeps` has the other capacities.

All functions work on one layer. They share these arguments:

- `start` int64 (events + 1,), `expert` int32 (pairs,): an event's distinct experts, ascending;
- `slots` int64 (pairs,), `mass` float64 (pairs,): routed slots and gate weight of each;
- `group` int32 (events,): where the event is counted; −1: nowhere, it only changes the bank;
- `fresh` bool (events,): the bank is emptied before the event.

They return counts by group and place, `(groups, experts + 1)`: pairs, slots (int64) and mass
(float64). The last place is that of first uses, which miss in every bank.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled

Counts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Pairs, slots and mass."""


@compiled
def _no_counts(groups: int, experts: int) -> Counts:
    shape = (groups, experts + 1)
    return np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float64)


@compiled
def _count(counts: Counts, group: int, place: int, slots: int, mass: float) -> None:
    """Counts one pair in a place."""
    counts[0][group, place] += 1
    counts[1][group, place] += slots
    counts[2][group, place] += mass


@compiled
def next_uses(start: np.ndarray, expert: np.ndarray, fresh: np.ndarray, experts: int) -> np.ndarray:
    """Returns for each pair the event of the expert's next use.

    Returns:
        int64 (pairs,); the number of events where there is none before the bank is emptied.
    """
    events = len(fresh)
    soonest = np.full(experts, events, np.int64)
    found = np.empty(len(expert), np.int64)
    for event in range(events - 1, -1, -1):
        for pair in range(start[event], start[event + 1]):
            found[pair] = soonest[expert[pair]]
            soonest[expert[pair]] = event
        if fresh[event]:
            soonest[:] = events
    return found


@compiled
def lru_places(
    start: np.ndarray,
    expert: np.ndarray,
    slots: np.ndarray,
    mass: np.ndarray,
    group: np.ndarray,
    fresh: np.ndarray,
    experts: int,
    groups: int,
) -> Counts:
    """Counts places in the LRU stack; exact for capacities that no event exceeds."""
    counts = _no_counts(groups, experts)
    stack = np.empty(experts, np.int32)
    aside = np.empty(experts, np.int32)
    known = np.zeros(experts, np.bool_)
    wanted = np.full(experts, -1, np.int64)  # pair of each expert that is looked for
    depth = 0
    for event in range(len(group)):
        if fresh[event]:
            depth = 0
            known[:] = False
        begin, end, to = start[event], start[event + 1], group[event]
        left = 0
        for pair in range(begin, end):
            one = expert[pair]
            if known[one]:
                wanted[one] = pair
                left += 1
                continue
            known[one] = True
            if to >= 0:
                _count(counts, to, experts, slots[pair], mass[pair])
        new = end - begin - left
        place = passed = 0
        while left:
            one = stack[place]
            pair = wanted[one]
            if pair < 0:
                aside[passed] = one
                passed += 1
            else:
                wanted[one] = -1
                left -= 1
                if to >= 0:
                    _count(counts, to, place, slots[pair], mass[pair])
            place += 1
        if new:
            for i in range(depth - 1, place - 1, -1):
                stack[i + new] = stack[i]
            depth += new
        size = end - begin
        for i in range(passed):
            stack[size + i] = aside[i]
        for i in range(size):
            stack[i] = expert[end - 1 - i]
    return counts


@compiled
def _sink(heap: np.ndarray, size: int, value: int) -> None:
    """Puts `value` in place of a heap's least number."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@compiled
def _rise(heap: np.ndarray, size: int, value: int) -> None:
    """Adds `value` to a heap of `size` numbers."""
    at = size
    while at:
        parent = (at - 1) // 2
        if heap[parent] <= value:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = value


@compiled
def min_places(
    start: np.ndarray,
    expert: np.ndarray,
    slots: np.ndarray,
    mass: np.ndarray,
    group: np.ndarray,
    fresh: np.ndarray,
    experts: int,
    groups: int,
    following: np.ndarray,
    forced: bool,
) -> Counts:
    """Counts places in MIN's stack.

    Args:
        start: See the module, as for the arguments up to `groups`.
        expert: "
        slots: "
        mass: "
        group: "
        fresh: "
        experts: Experts of the layer.
        groups: Number of groups.
        following: What `next_uses` gave.
        forced: Every miss is admitted; then exact for capacities that no event exceeds.
    """
    counts = _no_counts(groups, experts)
    stack = np.empty(experts, np.int32)
    known = np.zeros(experts, np.bool_)
    wanted = np.full(experts, -1, np.int64)
    # The least is worth most: the soonest next use, and of equal ones the highest id.
    worth = np.zeros(experts, np.int64)
    rest = np.empty(experts + 1, np.int64)  # X, as a heap
    depth = 0
    for event in range(len(group)):
        if fresh[event]:
            depth = 0
            known[:] = False
        begin, end, to = start[event], start[event + 1], group[event]
        new = size = 0
        for pair in range(begin, end):
            one = expert[pair]
            worth[one] = following[pair] * experts + (experts - 1 - one)
            if not forced:
                _rise(rest, size, worth[one])
                size += 1
            if known[one]:
                wanted[one] = pair
                continue
            known[one] = True
            new += 1
            if to >= 0:
                _count(counts, to, experts, slots[pair], mass[pair])
        place = 0
        if forced:
            for i in range(end - begin):
                if i < depth:
                    one = stack[i]
                    pair = wanted[one]
                    if pair < 0:
                        _rise(rest, size, worth[one])
                        size += 1
                    else:
                        wanted[one] = -1
                        if to >= 0:
                            _count(counts, to, i, slots[pair], mass[pair])
                stack[i] = expert[end - 1 - i]
            place = end - begin
        while size:
            best = rest[0]
            if place < depth:
                one = stack[place]
                pair = wanted[one]
                if pair < 0:
                    if worth[one] > best:
                        stack[place] = experts - 1 - best % experts
                        _sink(rest, size, worth[one])
                    place += 1
                    continue
                wanted[one] = -1
                if to >= 0:
                    _count(counts, to, place, slots[pair], mass[pair])
            stack[place] = experts - 1 - best % experts
            size -= 1
            if size:
                _sink(rest, size, rest[size])
            place += 1
        depth += new
    return counts


@compiled
def later_uses(
    start: np.ndarray,
    expert: np.ndarray,
    slots: np.ndarray,
    mass: np.ndarray,
    group: np.ndarray,
    fresh: np.ndarray,
    experts: int,
    groups: int,
) -> Counts:
    """Counts by expert instead of by place: its uses after the first, which hit if it stays.

    The last column is that of first uses.
    """
    counts = _no_counts(groups, experts)
    known = np.zeros(experts, np.bool_)
    for event in range(len(group)):
        if fresh[event]:
            known[:] = False
        to = group[event]
        for pair in range(start[event], start[event + 1]):
            one = expert[pair]
            if to >= 0:
                at = one if known[one] else experts
                _count(counts, to, at, slots[pair], mass[pair])
            known[one] = True
    return counts
