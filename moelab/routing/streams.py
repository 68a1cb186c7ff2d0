"""A layer's events as narrow arrays, for what counts over long traces one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CapacityError, SchemaError
from .compiled import compiled
from .events import NEEDED, check_frame, steps_of

if TYPE_CHECKING:
    import pandas as pd

EVENT_PHASES = ("padding", "prefill", "decode", "all")
"""Phases of events, by code. An event has the phase of its tokens other than padding; one with
tokens of both kinds is of prefill. "all" is where the frame does not say."""
WHOLE = EVENT_PHASES.index("all")

MOST = 1 << 16
"""Experts of a layer beyond which a frame is taken to be damaged."""


@dataclass(frozen=True, slots=True)
class LayerStream:
    """The events of one layer in order of time. Pairs are (event, distinct expert)."""

    layer: int
    experts: int
    """Experts of the layer."""
    top_k: int
    run: np.ndarray
    """int64 (events,): the run of each event."""
    phase: np.ndarray
    """int8 (events,): codes into `EVENT_PHASES`."""
    start: np.ndarray
    """int64 (events + 1,): first pair of each event, and the number of pairs."""
    expert: np.ndarray
    """int32 (pairs,): by event, ascending in it."""
    slots: np.ndarray
    """int64 (pairs,): routed slots of each pair."""
    mass: np.ndarray
    """float64 (pairs,): their gate weight together; NaN where it is not known."""

    @property
    def largest(self) -> int:
        """Distinct experts of the largest event."""
        return int(np.diff(self.start).max(initial=0))

    def events(self, chosen: np.ndarray) -> LayerStream:
        """Returns some of the events, in another order if need be.

        Args:
            chosen: int64: events by number.
        """
        if len(chosen) == len(self.run) and (chosen[1:] > chosen[:-1]).all():
            return self
        sizes = np.diff(self.start)[chosen]
        start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        pairs = np.repeat(self.start[:-1][chosen] - start[:-1], sizes) + np.arange(start[-1])
        return self._with(self.run[chosen], self.phase[chosen], start, pairs)

    def without(self, experts: list[int]) -> LayerStream:
        """Returns the same events without some experts."""
        kept = np.flatnonzero(~np.isin(self.expert, experts))
        event = np.repeat(np.arange(len(self.run)), np.diff(self.start))
        sizes = np.bincount(event[kept], minlength=len(self.run))
        start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return self._with(self.run, self.phase, start, kept)

    def _with(
        self, run: np.ndarray, phase: np.ndarray, start: np.ndarray, pairs: np.ndarray
    ) -> LayerStream:
        return LayerStream(
            self.layer,
            self.experts,
            self.top_k,
            run,
            phase,
            start,
            self.expert[pairs],
            self.slots[pairs],
            self.mass[pairs],
        )


@compiled
def _gather(
    first: np.ndarray, expert: np.ndarray, weight: np.ndarray, experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Finds the distinct experts of each event, ascending.

    Args:
        first: int64 (events + 1,): first row of each event, and the number of rows.
        expert: int32 (rows,).
        weight: float32 (rows,).
        experts: Experts of the layer.

    Returns:
        `start`, `expert`, `slots` and `mass` of a `LayerStream`.
    """
    rows = len(expert)
    start = np.zeros(len(first), np.int64)
    found = np.empty(rows, np.int32)
    slots = np.empty(rows, np.int64)
    mass = np.empty(rows, np.float64)
    times = np.zeros(experts, np.int64)
    sums = np.zeros(experts, np.float64)
    count = 0
    for event in range(len(first) - 1):
        begin = count
        for row in range(first[event], first[event + 1]):
            one = expert[row]
            if times[one] == 0:
                found[count] = one
                count += 1
                sums[one] = 0.0
            times[one] += 1
            sums[one] += weight[row]
        if count - begin > 32:
            found[begin:count] = np.sort(found[begin:count])
        else:
            for i in range(begin + 1, count):
                one = found[i]
                j = i
                while j > begin and found[j - 1] > one:
                    found[j] = found[j - 1]
                    j -= 1
                found[j] = one
        for i in range(begin, count):
            one = found[i]
            slots[i] = times[one]
            mass[i] = sums[one]
            times[one] = 0
        start[event + 1] = count
    return start, found[:count].copy(), slots[:count].copy(), mass[:count].copy()


def stream(
    layer: int,
    experts: int,
    top_k: int,
    event: np.ndarray,
    expert: np.ndarray,
    weight: np.ndarray | None,
    run: np.ndarray,
    phase: np.ndarray,
) -> LayerStream:
    """Builds a layer's events from its rows.

    Args:
        layer: The layer.
        experts: Experts of the layer.
        top_k: Experts a token.
        event: int (rows,): number of each row's event in the order of all events of all layers.
        expert: int (rows,).
        weight: float (rows,) or None.
        run: int (all events,): the run of each event.
        phase: int8 (all events,): codes into `EVENT_PHASES`.
    """
    if (event[1:] < event[:-1]).any():
        order = np.argsort(event, kind="stable")
        event, expert = event[order], expert[order]
        weight = None if weight is None else weight[order]
    places = np.flatnonzero(np.concatenate([[True], event[1:] != event[:-1]]))
    first = np.append(places, len(event)).astype(np.int64)
    known = np.full(len(event), np.nan, np.float32) if weight is None else weight
    gathered = _gather(
        first, expert.astype(np.int32, copy=False), known.astype(np.float32, copy=False), experts
    )
    which = event[places]
    return LayerStream(layer, experts, top_k, run[which], phase[which], *gathered)


def frame_streams(
    routing: pd.DataFrame, experts: int | Mapping[int, int] | None = None
) -> Iterator[LayerStream]:
    """Yields the layers of a routing frame, ascending.

    Events and their order are those of `moelab.replay`, so padding is part of its event.

    Args:
        routing: `run`, `step`, `layer`, `rank`, `expert`; `phase` and `weight` if it has them.
        experts: Experts a layer, or by layer; by default the frame's highest id, plus 1.

    Raises:
        ReplayError: As for `moelab.replay`.
        SchemaError: If a column has values that it cannot have.
        CapacityError: If the frame has an expert that `experts` does not count.
    """
    check_frame(routing)
    check_columns(routing)
    step, steps = steps_of(routing)
    phase = event_phases(routing, step, len(steps))
    run = steps["run"].to_numpy().astype(np.int64)
    layers = routing["layer"].to_numpy()
    names = np.unique(layers)
    chosen = routing["expert"].to_numpy()
    rank = routing["rank"].to_numpy()
    weight = routing["weight"].to_numpy() if "weight" in routing.columns else None
    highest = int(chosen.max()) + 1
    for layer in names.tolist():
        rows = np.flatnonzero(layers == layer)
        mine = chosen[rows]
        size = _size(experts, layer, int(mine.max()), highest)
        weights = None if weight is None else weight[rows]
        top_k = int(rank[rows].max()) + 1
        yield stream(layer, size, top_k, step[rows], mine, weights, run, phase)


def check_columns(routing: pd.DataFrame) -> None:
    """Refuses a frame whose columns were edited into something else.

    Raises:
        SchemaError: Names the column.
    """
    for name in NEEDED:
        kind = getattr(routing[name].dtype, "kind", "O")
        if kind not in "iu" or routing[name].isna().any():
            raise SchemaError(
                f"The column {name} must be whole numbers, and is {routing[name].dtype}"
                f"{' with gaps' if routing[name].isna().any() else ''}."
            )
    highest = int(routing["expert"].max())
    if highest >= MOST:
        raise SchemaError(
            f"The column expert has {highest}, and no layer has so many experts; the highest id "
            f"that is believed is {MOST - 1}."
        )
    if "weight" in routing.columns and getattr(routing["weight"].dtype, "kind", "O") not in "fiu":
        raise SchemaError(f"The column weight must be numbers, and is {routing['weight'].dtype}.")


def event_phases(routing: pd.DataFrame, step: np.ndarray, count: int) -> np.ndarray:
    """Returns the phase of each of `count` events, int8, from the event of each row."""
    if "phase" not in routing.columns:
        return np.full(count, WHOLE, np.int8)
    found = np.zeros(count, np.int8)
    named = routing["phase"].astype("str").to_numpy()
    wrong = sorted(set(named.tolist()) - set(EVENT_PHASES[:WHOLE]))
    if wrong:
        raise SchemaError(
            f"The column phase has {', '.join(map(repr, wrong[:3]))}, and it may have "
            f"{', '.join(map(repr, EVENT_PHASES[:WHOLE]))}."
        )
    for name in ("decode", "prefill"):  # prefill last: it decides where an event has both
        found[step[named == name]] = EVENT_PHASES.index(name)
    return found


def _size(experts: int | Mapping[int, int] | None, layer: int, seen: int, highest: int) -> int:
    if experts is None:
        return highest
    if isinstance(experts, Mapping):
        if layer not in experts:
            raise CapacityError(f"experts= says nothing of layer {layer}.")
        size = int(experts[layer])
    else:
        size = int(experts)
    if size <= seen:
        raise CapacityError(f"experts={size}, and layer {layer} has expert {seen}.")
    return size
