"""Which expert sits in which slot, and how one event changes that. Pure Python; knows no MLX.

An event is one step (a prefill chunk or a decoded token) at one layer. The rules, which the
replay of a trace follows as well:

- hits are judged against the bank as it was when the event began;
- the event's experts are protected while it is served;
- an event of more experts than there are slots is *swept*, in rounds: the hits and as many misses
  as fit beside them first, then the other misses in the policy's order, each read once. Whoever
  sits in the slots at the end stays;
- pinned experts never leave once they are in;
- under a policy that admits nothing, pins and initial contents stay, and misses are computed in
  the slots that these leave free and forgotten when the event ends.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .policies import Policy


class Load(NamedTuple):
    """One expert to read from disk into a slot."""

    expert: int
    slot: int
    evicted: int | None
    """The expert that left the slot; None if it was empty."""


@dataclass(frozen=True, slots=True)
class Round:
    """A part of an event that fits in the bank."""

    serve: Sequence[int]
    """Experts whose outputs are to be computed in this round."""
    loads: Sequence[Load]
    """What must be read first. Each is to be confirmed with `Residency.arrived`."""


class Residency:
    """The slots of one layer.

    Args:
        capacity: Number of slots.
        policy: Who leaves. It must be fresh: a copy of it is kept for `clear`.
        pinned: Experts that never leave once they are in; at least top-k fewer than slots.
    """

    def __init__(self, capacity: int, policy: Policy, pinned: Iterable[int] = ()) -> None:
        self.capacity = capacity
        self.policy = policy
        self.pinned = frozenset(pinned)
        policy.sized(capacity - len(self.pinned))
        self._fresh = copy.deepcopy(policy)
        self.slot_of: dict[int, int] = {}
        """Slot of each expert in memory: the residents and, until an event ends, those of its
        misses that are not admitted."""
        self._passing: list[int] = []
        """Those misses."""
        self._free = list(range(capacity - 1, -1, -1))  # slot 0 is given out first

    def fill(self, experts: Iterable[int], top_k: int) -> list[Load]:
        """Fills free slots before the first event: the pins, then others.

        Args:
            experts: From most to least worth keeping; those in memory are left out, and those
                that find no room. The policy is told of them in reverse, so that what goes by age
                lets the least worthy go first.
            top_k: Slots that stay free under a policy that admits nothing, for its misses.

        Returns:
            What to load, pins first. Each is to be confirmed with `arrived`.
        """
        wanted = dict.fromkeys([*sorted(self.pinned), *experts])
        absent = [expert for expert in wanted if expert not in self.slot_of]
        room = len(self._free) - (0 if self.policy.admits else top_k)
        entering = absent[: max(room, 0)]
        loads = [Load(expert, self._free.pop(), None) for expert in entering]
        self.policy.admitted([e for e in reversed(entering) if e not in self.pinned])
        return loads

    def begin(self, needed: Sequence[int]) -> list[int]:
        """Starts an event.

        Args:
            needed: The event's distinct experts, ascending.

        Returns:
            Those that are not resident, ascending.
        """
        if self._passing:
            self.end()
        pinned = self.pinned
        self.policy.used([e for e in needed if e not in pinned] if pinned else needed)
        slot_of = self.slot_of
        return [expert for expert in needed if expert not in slot_of]

    def fits(self, needed: Sequence[int]) -> bool:
        """Whether an event can be served in one round."""
        if not self.policy.admits:
            return sum(1 for e in needed if e not in self.slot_of) <= len(self._free)
        pinned = sum(1 for e in self.pinned if e in self.slot_of and e not in needed)
        return len(needed) + pinned <= self.capacity

    def admit(self, needed: Sequence[int], misses: Sequence[int]) -> list[Load]:
        """Makes room for the misses of an event that fits; returns what to load."""
        if not self.policy.admits:
            return self._pass(misses)
        return self._place(misses, self.pinned.union(needed))

    def rounds(self, needed: Sequence[int], misses: Sequence[int]) -> Iterator[Round]:
        """Yields what to load and serve, in order; one round unless the event is swept.

        A round's loads are to be done, and confirmed, before the next round is asked for.
        """
        if self.fits(needed):
            yield Round(needed, self.admit(needed, misses))
            return
        absent = set(misses)
        waiting = list(self.policy.sweep_order(misses))
        serve = [expert for expert in needed if expert not in absent]
        if not self.policy.admits:
            while waiting:
                first, waiting = waiting[: len(self._free)], waiting[len(self._free) :]
                yield Round([*serve, *first], self._pass(first))
                serve = []
                if waiting:
                    self.end()
            return
        protected = self.pinned.union(needed)
        room = len(self._free) + sum(1 for e in self.slot_of if e not in protected)
        while waiting or serve:
            first, waiting = waiting[:room], waiting[room:]
            if serve or first:
                yield Round([*serve, *first], self._place(first, protected))
            # Everyone who was served may leave now.
            serve, protected = [], self.pinned
            room = self.capacity - sum(1 for e in self.slot_of if e in self.pinned)

    def exchange(self, needed: Sequence[int], wanted: Sequence[int], budget: int) -> list[Load]:
        """Ends a lossy step: lets a few of the experts that it missed in, for the next one.

        Args:
            needed: The step's distinct experts, ascending. They stay, unless there are more of
                them than slots.
            wanted: Those that may enter, the most wanted first.
            budget: How many may enter at most.

        Returns:
            What to load.
        """
        self.policy.used([e for e in needed if e not in self.pinned])
        protected = self.pinned
        if len(needed) <= self.capacity:
            protected = protected.union(needed)
        room = len(self._free) + sum(1 for e in self.slot_of if e not in protected)
        return self._place(wanted[: min(budget, room)], protected)

    def arrived(self, load: Load) -> None:
        """Confirms that `load` was read, whole."""
        self.slot_of[load.expert] = load.slot

    def end(self) -> None:
        """Ends an event: forgets the misses that were not admitted."""
        while self._passing:
            slot = self.slot_of.pop(self._passing[-1])
            self._free.append(slot)
            self._passing.pop()

    def ranking(self) -> list[int]:
        """Returns the residents from least to most worth keeping, by the policy; pins last."""
        self.end()
        pins = sorted(e for e in self.slot_of if e in self.pinned)
        count = len(self.slot_of) - len(pins)
        return [*copy.deepcopy(self.policy).evict(count, self.slot_of, self.pinned), *pins]

    def resized(self, capacity: int, top_k: int) -> Residency:
        """Returns the slots of another size, with the residents most worth keeping in them.

        The policy goes on with the history that it has; this object stays as it is. Slots are
        numbered anew: the caller moves what `slot_of` here and there say.

        Args:
            capacity: Number of slots; the pins and top-k others must fit.
            top_k: As for `fill`.
        """
        order = self.ranking()[::-1]
        other = Residency(capacity, copy.deepcopy(self._fresh), self.pinned)
        other.policy = copy.deepcopy(self.policy)
        other.policy.sized(capacity - len(self.pinned))
        room = capacity if self.policy.admits else capacity - top_k
        other.slot_of = {expert: slot for slot, expert in enumerate(order[:room])}
        other.recover()
        return other

    def clear(self) -> None:
        """Empties every slot; the policy is as fresh as it was at first."""
        self.policy = copy.deepcopy(self._fresh)
        self.slot_of.clear()
        self.recover()

    def recover(self) -> None:
        """Makes the state consistent after an event that was interrupted at any point."""
        for expert in self._passing:
            self.slot_of.pop(expert, None)
        self._passing = []
        taken = set(self.slot_of.values())
        self._free = [s for s in range(self.capacity - 1, -1, -1) if s not in taken]
        self.policy.resync([e for e in self.slot_of if e not in self.pinned])

    def _pass(self, misses: Sequence[int]) -> list[Load]:
        """Gives free slots to misses that are not admitted; a pin is."""
        # Noted first: whatever interrupts this, `recover` knows whom to forget.
        self._passing = [expert for expert in misses if expert not in self.pinned]
        return [Load(expert, self._free.pop(), None) for expert in misses]

    def _place(self, misses: Sequence[int], protected: frozenset[int]) -> list[Load]:
        loads = []
        short = len(misses) - len(self._free)
        leaving = iter(self.policy.evict(short, self.slot_of, protected) if short > 0 else ())
        if misses:
            pinned = self.pinned
            self.policy.admitted([e for e in misses if e not in pinned] if pinned else misses)
        for expert in misses:
            if self._free:
                loads.append(Load(expert, self._free.pop(), None))
            else:
                evicted = next(leaving)
                loads.append(Load(expert, self.slot_of.pop(evicted), evicted))
        return loads
