"""What can happen when a chosen expert is not resident.

`load` reads it, which is exact. The others are approximations: they compute with what is in
memory, never wait for ids inside a token, and say for every routed slot what they did. Each one's
rule stands in its docstring and is computed by `lossy.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import MissActionError


@dataclass(frozen=True, slots=True)
class MissAction:
    """One thing that can happen on a miss."""

    name: ClassVar[str]
    lossy: ClassVar[bool] = True
    selects: ClassVar[bool] = False
    """It changes which experts are selected, so it must see the router's scores."""
    weighs: ClassVar[bool] = False
    """It changes the weights that the block applies."""

    @property
    def settings(self) -> dict[str, float]:
        """What a manifest says beside the name."""
        return {}


@dataclass(frozen=True, slots=True)
class Load(MissAction):
    """The missing expert is read from disk. Exact; the default."""

    name: ClassVar[str] = "load"
    lossy: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Drop(MissAction):
    """The miss contributes nothing.

    The other weights are renormalised to the same sum only where the family normalises its top k.
    """

    name: ClassVar[str] = "drop"
    weighs: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Substitute(MissAction):
    """Each miss, by rank, takes the best-scored resident that the token does not already use.

    Best by the family's own selection score and within its allowed groups. The substitute carries
    its own score, renormalised only where the family does. Where no resident is left, the slot is
    dropped.
    """

    name: ClassVar[str] = "substitute"
    selects: ClassVar[bool] = True
    weighs: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class LowBit(MissAction):
    """A copy of the missing expert at few bits is computed in its place.

    Every expert is also resident at 2 or 3 bits (affine, groups of 64, from the dequantised
    checkpoint), made once when the action is first set and kept until the lab is closed.
    """

    name: ClassVar[str] = "low_bit"
    bits: int = 2

    def __post_init__(self) -> None:
        if self.bits not in (2, 3):
            raise MissActionError(f"low_bit keeps copies of 2 or 3 bits, got bits={self.bits!r}.")

    @property
    def settings(self) -> dict[str, float]:
        """See `MissAction.settings`."""
        return {"bits": self.bits}


@dataclass(frozen=True, slots=True)
class Reroute(MissAction):
    """Resident experts get a bonus of λΔ in the selection; weights come from the plain scores.

    Δ is the layer's running mean, over the tokens since the run's start and this one, of max − min
    of the selection scores that the token may choose from. What is chosen all the same and is not
    resident is dropped. After Cache-Prior, arXiv 2412.00099, where such misses are read.
    """

    name: ClassVar[str] = "reroute"
    selects: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    strength: float = 0.5
    """λ: 0 changes no selection, at 1 a resident expert nearly always wins."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise MissActionError(
                f"reroute's strength is a finite number from 0 up, got {self.strength!r}."
            )

    @property
    def settings(self) -> dict[str, float]:
        """See `MissAction.settings`."""
        return {"strength": self.strength}


@dataclass(frozen=True, slots=True)
class WrongSlot(MissAction):
    """Slot 0's expert is computed at the missing expert's weight.

    No sensible choice: it is what mlx-moe really does on a miss, kept as a labelled baseline.
    """

    name: ClassVar[str] = "wrong_slot"


ACTIONS: dict[str, type[MissAction]] = {
    kind.name: kind for kind in (Load, Drop, Substitute, LowBit, Reroute, WrongSlot)
}
"""Every action by name."""


def resolve_action(on_miss: str | MissAction) -> MissAction:
    """Returns the action that a user means.

    Args:
        on_miss: A name, for the action with its defaults, or an action.

    Raises:
        MissActionError: If there is no such action; the message lists those there are.
    """
    if isinstance(on_miss, MissAction):
        return on_miss
    if not isinstance(on_miss, str) or on_miss not in ACTIONS:
        raise MissActionError(
            f"on_miss must be one of {', '.join(map(repr, ACTIONS))}, or an action such as "
            f"moelab.experts.misses.Reroute(strength=0.3), got {on_miss!r}."
        )
    return ACTIONS[on_miss]()


def checked_budget(swap_budget: int | None) -> int | None:
    """Returns a swap budget that is one.

    Raises:
        MissActionError: If it is no whole number from 0 up, nor None.
    """
    whole = isinstance(swap_budget, int) and not isinstance(swap_budget, bool)
    if swap_budget is not None and not (whole and swap_budget >= 0):
        raise MissActionError(
            "swap_budget is how many experts a layer may enter after a step, a whole number from "
            f"0 up or None for the layer's top-k, got {swap_budget!r}."
        )
    return swap_budget
