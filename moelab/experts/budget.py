"""What fits into the memory there is, written as a sum that a person can check.

Memory less margin, trunk, cache and prefill is what experts may take. The sum is kept with the
lab that was made from it and shown by every refusal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..display import facts_html, facts_text, size
from ..errors import CapacityError
from ..families import SwitchSite
from .attach import all_parameters, arrays_in
from .footprint import PREFILL_CHUNK, Footprint, default_context, footprint
from .memory import Memory

MARGIN = 0.1
"""Share of the memory found that `"auto"` leaves alone: for other programs, for the page cache
that reads of experts go through, and for what the estimate of prefill misses."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes, in bytes."""

    trunk: int
    """Everything but the routed experts."""
    experts: tuple[int, ...]
    """One expert of each MoE layer, in layer order."""
    footprint: Footprint
    """What running takes."""
    extra: int = 0
    """What is held beside trunk and slots, such as low-bit copies of every expert."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the sum."""

    name: str
    nbytes: int
    """Bytes; negative for what is taken off."""
    why: str
    counted: bool = True
    """False for what comes on top of a budget and is only mentioned."""


@dataclass(frozen=True, slots=True, repr=False)
class Budget:
    """How a capacity follows from memory."""

    memory: Memory
    """What there was, or what was asked for."""
    rows: tuple[Row, ...]
    """The sum: what there was first, what is left last."""
    capacities: tuple[int, ...]
    """Slots of each MoE layer, in layer order; 0 where a layer's top-k does not fit."""
    need: Need

    @property
    def left(self) -> int:
        """Bytes that nothing takes; negative if the model does not fit."""
        return sum(row.nbytes for row in self.rows if row.counted)

    @property
    def experts(self) -> int:
        """Bytes of all slots."""
        return sum(c * b for c, b in zip(self.capacities, self.need.experts, strict=True))

    @property
    def weights(self) -> int:
        """Bytes of everything that `Lab.memory` counts, and of `Need.extra`."""
        return self.need.trunk + self.need.extra + self.experts

    def facts(self) -> dict[str, str]:
        """Returns the sum's lines by name, as they are shown."""
        facts = {}
        for row in self.rows:
            amount = size(row.nbytes) if row.counted else f"({size(-row.nbytes)})"
            facts[row.name] = f"{amount.replace('-', '−'):>10}  {row.why}"
        facts["left"] = f"{size(self.left).replace('-', '−'):>10}"
        return facts

    def __repr__(self) -> str:
        return facts_text("Memory", self.facts())

    def _repr_html_(self) -> str:
        return facts_html("Memory", self.facts())


def needs(
    model: nn.Module,
    sites: Sequence[SwitchSite],
    config: dict[str, Any],
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    chunk: int = PREFILL_CHUNK,
    widen: bool = False,
    extra_bytes: int = 0,
) -> Need:
    """Works out what a model takes, without evaluating an array.

    Args:
        model: mlx-lm's model; its arrays may be lazy and stay so.
        sites: Its MoE layers.
        config: Its configuration.
        context: Tokens that the cache is to hold; None for `footprint.default_context`.
        kv_bits: Bits of the cache: 8, 4 or None for the model's own type.
        chunk: Prompt tokens a forward pass.
        widen: 16-bit floats will be converted to float32.
        extra_bytes: Bytes held beside trunk and slots, such as low-bit copies of every expert.

    Raises:
        CapacityError: If an argument is out of range.
    """
    routed = {id(array) for site in sites for _, _, array in site.tensors()}
    trunk = [a for a in arrays_in(all_parameters(model)) if id(a) not in routed]
    return Need(
        trunk=sum(held_bytes(a, widen) for a in trunk),
        experts=tuple(
            sum(held_bytes(a, widen) // site.experts for _, _, a in site.tensors())
            for site in sites
        ),
        footprint=footprint(
            model,
            sites,
            context=default_context(config) if context is None else context,
            kv_bits=kv_bits,
            chunk=chunk,
            widen=widen,
        ),
        extra=extra_bytes,
    )


def held_bytes(array: mx.array, widen: bool) -> int:
    """Returns an array's bytes in memory, where 16-bit floats may be held as float32."""
    return array.nbytes * (2 if widen and array.dtype in (mx.bfloat16, mx.float16) else 1)


def automatic(memory: Memory, sites: Sequence[SwitchSite], need: Need) -> Budget:
    """Fits as many experts as the memory there is allows, the same number in every layer."""
    margin = Row("margin", -int(memory.nbytes * MARGIN), f"{MARGIN:.0%}, left to everything else")
    return _budget(memory, sites, need, [margin], _running(need), even=True)


def within(budget_gb: float, sites: Sequence[SwitchSite], need: Need, *, whole: bool) -> Budget:
    """Fits as many experts as a budget allows; where it helps, first layers get one more.

    Args:
        budget_gb: Units of 10⁹ bytes.
        sites: The model's MoE layers.
        need: What the model takes.
        whole: Cache and prefill are in the budget too; if False they come on top, and only trunk,
            slots and `Need.extra` are in it.

    Raises:
        CapacityError: If it is no positive number.
    """
    return _budget(asked(budget_gb), sites, need, [], _running(need, counted=whole), even=False)


def asked(budget_gb: float) -> Memory:
    """Returns a budget as memory.

    Raises:
        CapacityError: If it is no positive number.
    """
    if (
        isinstance(budget_gb, bool)
        or not isinstance(budget_gb, int | float)
        or not (math.isfinite(budget_gb) and budget_gb > 0)
    ):
        raise CapacityError(
            f"budget_gb must be a positive number of GB (10⁹ bytes), got {budget_gb!r}."
        )
    return Memory(round(budget_gb * 1e9), "your budget")


def _running(need: Need, counted: bool = True) -> list[Row]:
    run = need.footprint
    kind = f"{run.kv_bits}-bit" if run.kv_bits else "in the model's own type"
    top = "" if counted else "on top of the budget: "
    state = f", {size(run.constant)} of it at any length" if run.constant else ""
    return [
        Row("cache", -run.cache, f"{top}{run.context:,} tokens, {kind}{state}", counted),
        Row(
            "prefill",
            -run.prefill,
            f"{top}estimated peak of a chunk of {min(run.chunk, run.context):,} prompt tokens",
            counted,
        ),
    ]


def _budget(
    memory: Memory,
    sites: Sequence[SwitchSite],
    need: Need,
    margin: list[Row],
    running: list[Row],
    *,
    even: bool,
) -> Budget:
    rows = [
        Row("there is", memory.nbytes, memory.source),
        *margin,
        Row("trunk", -need.trunk, "everything but the routed experts"),
        *([Row("copies", -need.extra, "low-bit copies of every expert")] if need.extra else []),
        *running,
    ]
    room = sum(row.nbytes for row in rows if row.counted)
    slots = _fit(room, sites, need.experts, even=even)
    fits = slots is not None
    if slots is None:
        slots = [site.top_k for site in sites]  # to show what is missing
    taken = sum(c * b for c, b in zip(slots, need.experts, strict=True))
    whole = all(c == site.experts for c, site in zip(slots, sites, strict=True))
    held = "all of them" if whole else f"{numbers(slots)} of {numbers(s.experts for s in sites)}"
    why = held if fits else f"{numbers(slots)}, the least that a token needs"
    layers = f"{len(sites)} layer{'s' if len(sites) > 1 else ''}"
    rows.append(Row("resident experts", -taken, f"{why}, in {layers}"))
    return Budget(memory, tuple(rows), tuple(slots if fits else [0] * len(sites)), need)


def _fit(
    room: int, sites: Sequence[SwitchSite], each: Sequence[int], *, even: bool
) -> list[int] | None:
    """Returns slots for each layer that take at most `room` bytes, or None if top-k does not fit.

    Every layer has the same number, but for layers with fewer experts or a larger top-k; unless
    `even`, what is left over goes to the first layers, one slot each.
    """

    def slots(level: int) -> list[int]:
        return [max(site.top_k, min(level, site.experts)) for site in sites]

    def taken(level: int) -> int:
        return sum(c * b for c, b in zip(slots(level), each, strict=True))

    low, high = 0, max(site.experts for site in sites)
    if taken(low) > room:
        return None
    while low < high:  # the largest level that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= room else (low, middle - 1)
    found = slots(low)
    if not even:
        room -= taken(low)
        for i, site in enumerate(sites):
            if found[i] == low < site.experts and each[i] <= room:
                found[i] += 1
                room -= each[i]
    return found


def numbers(values: Any) -> str:
    """Returns a number, or from–to where values differ."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"
