"""What a replacement policy is: who leaves when an expert needs a slot.

Pure Python over expert ids, without MLX. The live bank and the replay of a recorded trace use the
same objects, so what holds for the one holds for the other. A policy sees one layer; what the
bank tells it, in order, for each event (a step at that layer):

1. `used`: the event's experts, once, all together;
2. for each round of the event (one, unless it is swept): `evict` where slots are wanted, then
   `admitted` for those that enter.

All hits are judged before anything enters, and the event's experts may not leave while it is
served. Pinned experts never leave, so a policy hears neither of their use nor of their entry.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class Policy(Protocol):
    """A replacement policy for one layer. Events arrive in order; experts are named by id.

    `PolicyBase` has a default for all but `name`, `used`, `evict` and `resync`.
    """

    name: str
    """What the manifest of a run calls it."""
    admits: bool
    """False if no miss ever becomes resident: it is read, computed and forgotten."""

    def sized(self, slots: int) -> None:
        """Says how many slots the policy decides about: the capacity less the pins."""

    def used(self, experts: Sequence[int]) -> None:
        """Notes one event.

        Args:
            experts: All distinct experts that the step chose, hits and misses, in ascending
                order, without the pinned ones; none may be left. Not every miss need be admitted:
                a bank that drops misses admits few.
        """

    def evict(self, count: int, residents: Collection[int], kept: Collection[int]) -> list[int]:
        """Chooses `count` of `residents` to leave, first to leave first.

        Args:
            count: How many; the caller has made sure that there are so many.
            residents: Experts that are in memory now, pins too.
            kept: Experts that must stay: pinned, or being served.
        """

    def admitted(self, experts: Sequence[int]) -> None:
        """Notes experts that enter slots now, in order of entry. None of them is pinned."""

    def sweep_order(self, misses: Sequence[int]) -> Sequence[int]:
        """Returns in which order a sweep reads `misses` (given in ascending order)."""

    def resync(self, residents: Iterable[int]) -> None:
        """Takes `residents`, which names no pin, for what is in memory now.

        Called when an event was interrupted: what the policy believed to be in memory and is not
        there is dropped, what is there and was not known is added.
        """


class PolicyBase:
    """Defaults for what most policies do alike. A policy of one's own may derive from it."""

    name = ""
    admits = True

    def sized(self, slots: int) -> None:
        """Ignores the number of slots."""

    def admitted(self, experts: Sequence[int]) -> None:
        """Ignores entries; for policies that know all they need from `used`."""

    def sweep_order(self, misses: Sequence[int]) -> Sequence[int]:
        """Ascending id."""
        return misses

    def placed(self, layer: int) -> None:
        """Ignores which layer the policy is for; told once, before anything else."""


def placed(policy: Policy, layer: int) -> Policy:
    """Tells a fresh policy which layer it is for, if it wants to know, and returns it.

    A policy that has no `placed` is the same for every layer.
    """
    tell = getattr(policy, "placed", None)
    if tell is not None:
        tell(layer)
    return policy
