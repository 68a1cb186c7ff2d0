"""LRU and forced MIN at one capacity that some event exceeds: the bank's own rules for sweeps.

An event of more experts than slots is read in rounds, and who stays depends on where the rounds
ended, so a larger bank need not hold what a smaller one holds and there is no stack. These
functions play one capacity at a time, as `experts.residency` does, and agree with it event for
event. Of a swept event with h hits and misses M in the order in which they are read (ascending id
for LRU, furthest next use first for MIN), the first C − h misses join the hits; everyone else has
left. Then whole banks of misses follow each other, and in the end the last C misses are there; or,
where fewer than C are left after the first round, as many of those who were served go as come, in
the same order. Arguments as in `stacks`.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled


@compiled
def _swept(inside: np.ndarray, needed: np.ndarray, order: np.ndarray, capacity: int) -> None:
    """Sets `inside` to who is in the bank after a sweep.

    Args:
        inside: bool (experts,): who was in it before.
        needed: The event's distinct experts.
        order: The same in the order in which they are read and leave.
        capacity: Slots; fewer than `needed`.
    """
    hits = 0
    for one in needed:
        hits += inside[one]
    misses = np.empty(len(needed) - hits, np.int64)
    served = np.empty(len(needed), np.int64)  # who sits in the bank after the first round
    count = sitting = 0
    for one in order:
        if inside[one]:
            served[sitting] = one
            sitting += 1
        else:
            misses[count] = one
            count += 1
            if count <= capacity - hits:
                served[sitting] = one
                sitting += 1
    inside[:] = False
    later = count - (capacity - hits)
    if later >= capacity:
        for i in range(count - capacity, count):
            inside[misses[i]] = True
        return
    for i in range(later, sitting):
        inside[served[i]] = True
    for i in range(count - later, count):
        inside[misses[i]] = True


@compiled
def lru_misses(
    start: np.ndarray,
    expert: np.ndarray,
    slots: np.ndarray,
    mass: np.ndarray,
    group: np.ndarray,
    fresh: np.ndarray,
    experts: int,
    groups: int,
    capacity: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts the misses of LRU at one capacity.

    Returns:
        By group: pairs, slots (int64) and mass (float64) that missed.
    """
    pairs_of = np.zeros(groups, np.int64)
    slots_of = np.zeros(groups, np.int64)
    mass_of = np.zeros(groups, np.float64)
    inside = np.zeros(experts, np.bool_)
    now = np.zeros(experts, np.bool_)
    stack = np.empty(capacity, np.int32)  # residents, the most recent first
    after = np.empty(capacity, np.int32)
    depth = 0
    for event in range(len(group)):
        if fresh[event]:
            depth = 0
            inside[:] = False
        begin, end, to = start[event], start[event + 1], group[event]
        for pair in range(begin, end):
            if to >= 0 and not inside[expert[pair]]:
                pairs_of[to] += 1
                slots_of[to] += slots[pair]
                mass_of[to] += mass[pair]
        if end - begin > capacity:
            needed = expert[begin:end]
            _swept(inside, needed, needed, capacity)
            depth = 0
            for pair in range(end - 1, begin - 1, -1):
                if inside[expert[pair]]:
                    stack[depth] = expert[pair]
                    depth += 1
            continue
        size = 0
        for pair in range(end - 1, begin - 1, -1):
            after[size] = expert[pair]
            size += 1
            now[expert[pair]] = True
        for i in range(depth):
            one = stack[i]
            if now[one]:
                continue
            if size < capacity:
                after[size] = one
                size += 1
            else:
                inside[one] = False
        for pair in range(begin, end):
            now[expert[pair]] = False
            inside[expert[pair]] = True
        stack, after, depth = after, stack, size
    return pairs_of, slots_of, mass_of


@compiled
def min_forced_misses(
    start: np.ndarray,
    expert: np.ndarray,
    slots: np.ndarray,
    mass: np.ndarray,
    group: np.ndarray,
    fresh: np.ndarray,
    experts: int,
    groups: int,
    following: np.ndarray,
    capacity: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts the misses of forced MIN at one capacity; see `lru_misses`."""
    pairs_of = np.zeros(groups, np.int64)
    slots_of = np.zeros(groups, np.int64)
    mass_of = np.zeros(groups, np.float64)
    inside = np.zeros(experts, np.bool_)
    now = np.zeros(experts, np.bool_)
    worth = np.zeros(experts, np.int64)  # as in `stacks.min_places`: the greatest leaves first
    free = capacity
    for event in range(len(group)):
        if fresh[event]:
            free = capacity
            inside[:] = False
        begin, end, to = start[event], start[event + 1], group[event]
        missing = 0
        for pair in range(begin, end):
            one = expert[pair]
            worth[one] = following[pair] * experts + (experts - 1 - one)
            now[one] = True
            if inside[one]:
                continue
            missing += 1
            if to >= 0:
                pairs_of[to] += 1
                slots_of[to] += slots[pair]
                mass_of[to] += mass[pair]
        needed = expert[begin:end]
        if end - begin > capacity:
            order = needed[np.argsort(-worth[needed])]
            _swept(inside, needed, order, capacity)
            free = 0
        else:
            short = missing - free
            free = max(0, free - missing)
            if short > 0:
                others = np.empty(capacity, np.int64)
                count = 0
                for one in range(experts):
                    if inside[one] and not now[one]:
                        others[count] = -worth[one]
                        count += 1
                leaving = np.sort(others[:count])[:short]
                for value in leaving:
                    inside[experts - 1 - (-value) % experts] = False
            for one in needed:
                inside[one] = True
        for one in needed:
            now[one] = False
    return pairs_of, slots_of, mass_of
