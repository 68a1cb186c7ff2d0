"""Which expert sits in which slot, and how one event changes that. Pure Python; knows no MLX.

An event is one step (a prefill chunk or a decoded token) at one layer. The rules, which the
replay of a trace follows as well:

- hits are judged against the bank as it was when the event began;
- the event's experts are protected while it is served;
- an event of more experts than there are slots is *swept*, in rounds: the hits and as many misses
  as fit beside them first, then the other misses in the policy's order, each read once. Whoever
  sits in the slots at the end stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .policy import Policy


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
        policy: Who leaves.
        pinned: Experts that never leave once they are in.
    """

    def __init__(self, capacity: int, policy: Policy, pinned: Iterable[int] = ()) -> None:
        self.capacity = capacity
        self.policy = policy
        self.pinned = frozenset(pinned)
        self.slot_of: dict[int, int] = {}
        """Slot of each resident expert."""
        self._free = list(range(capacity - 1, -1, -1))  # slot 0 is given out first

    def begin(self, needed: Sequence[int]) -> list[int]:
        """Starts an event.

        Args:
            needed: The event's distinct experts, ascending.

        Returns:
            Those that are not resident, ascending.
        """
        self.policy.used(needed)
        slot_of = self.slot_of
        return [expert for expert in needed if expert not in slot_of]

    def fits(self, needed: Sequence[int]) -> bool:
        """Whether an event can be served in one round."""
        pinned = sum(1 for e in self.pinned if e in self.slot_of and e not in needed)
        return len(needed) + pinned <= self.capacity

    def admit(self, needed: Sequence[int], misses: Sequence[int]) -> list[Load]:
        """Makes room for the misses of an event that fits; returns what to load."""
        return self._place(misses, self.pinned.union(needed))

    def rounds(self, needed: Sequence[int], misses: Sequence[int]) -> Iterator[Round]:
        """Yields what to load and serve, in order; one round unless the event is swept.

        A round's loads are to be done, and confirmed, before the next round is asked for.
        """
        if self.fits(needed):
            yield Round(needed, self.admit(needed, misses))
            return
        absent = set(misses)
        protected = self.pinned.union(needed)
        room = len(self._free) + sum(1 for e in self.slot_of if e not in protected)
        waiting = list(self.policy.sweep_order(misses))
        serve = [expert for expert in needed if expert not in absent]
        while waiting or serve:
            first, waiting = waiting[:room], waiting[room:]
            if serve or first:
                yield Round([*serve, *first], self._place(first, protected))
            # Everyone who was served may leave now.
            serve, protected = [], self.pinned
            room = self.capacity - sum(1 for e in self.slot_of if e in self.pinned)

    def fill(self, experts: Sequence[int]) -> list[Load]:
        """Puts experts into empty slots, before the first event; returns what to load."""
        entering = [e for e in experts if e not in self.slot_of]
        self.policy.admitted(entering)
        return self._place(entering, self.pinned)

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
        self.policy.used(needed)
        protected = self.pinned
        if len(needed) <= self.capacity:
            protected = protected.union(needed)
        room = len(self._free) + sum(1 for e in self.slot_of if e not in protected)
        return self._place(wanted[: min(budget, room)], protected)

    def arrived(self, load: Load) -> None:
        """Confirms that `load` was read, whole."""
        self.slot_of[load.expert] = load.slot

    def clear(self) -> None:
        """Empties every slot."""
        self.slot_of.clear()
        self.recover()

    def recover(self) -> None:
        """Makes the state consistent after an event that was interrupted at any point."""
        taken = set(self.slot_of.values())
        self._free = [s for s in range(self.capacity - 1, -1, -1) if s not in taken]
        self.policy.resync(self.slot_of)

    def _place(self, misses: Sequence[int], protected: frozenset[int]) -> list[Load]:
        loads = []
        short = len(misses) - len(self._free)
        leaving = iter(self.policy.evict(short, self.slot_of, protected) if short > 0 else ())
        for expert in misses:
            if self._free:
                loads.append(Load(expert, self._free.pop(), None))
            else:
                evicted = next(leaving)
                loads.append(Load(expert, self.slot_of.pop(evicted), evicted))
        return loads
