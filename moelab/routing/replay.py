"""Replay: what a bank of another size or policy would have loaded for a recorded routing.

The live bank's own `Residency` and policies, over the events of a frame. A replay holds for the
frame's step boundaries (a prompt in other chunks has other events) and for lossless runs only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import CapacityError
from ..experts.policies import Future, Min, MinForced, make_policy, placed
from ..experts.residency import Load, Residency
from .events import LayerEvents, check_frame, layer_events, steps_of
from .metrics import miss_rates
from .recording import Recording
from .replay_arguments import (
    Experts,
    as_recorded,
    check_pins,
    experts_of,
    ids_by_layer,
    slots_of,
)

if TYPE_CHECKING:
    import pandas as pd


class Replay:
    """What a replay found.

    Attributes:
        policy: The policy's name.
        capacity: Slots of each layer.
        pins: Pinned experts of each layer, ascending.
        events: A row an event (a step at a layer), in order of time: `run`, `step`, `layer`;
            `needed` and `missed` (distinct experts); `slots` and `hits` (routed slots, and those
            of them whose expert was resident when the event began); `swept` (more misses than
            room); `evicted` (residents that left).
        loads: A row a load, in order: `run`, `step`, `layer`, `expert`, `evicted` (who left the
            slot, −1 for nobody), `admitted` (False if it was computed and forgotten).
        by_layer: `events` and `loads` summed by layer: `capacity`, `pinned`, `events`, `slots`,
            `hits`, `hit_rate`, `loads`, `evicted`, `swept`.
        routing: The frame that was replayed, with `hit` as this replay has it.
    """

    def __init__(
        self,
        policy: str,
        capacity: dict[int, int],
        pins: dict[int, list[int]],
        experts: str,
        frames: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
    ) -> None:
        self.policy = policy
        self.capacity = capacity
        self.pins = pins
        self.events, self.loads, self.routing = frames
        self._experts = experts
        self.by_layer = self._by_layer()

    @property
    def hit_rate(self) -> float:
        """Share of the routed slots whose expert was resident when their step began."""
        return float(self.events["hits"].sum() / self.events["slots"].sum())

    def misses(self, by: Sequence[str] | str | None = ()) -> pd.DataFrame:
        """The three miss figures; see `moelab.routing.metrics.miss_rates`.

        The frame must have `weight`.
        """
        return miss_rates(self.routing, by)

    def _by_layer(self) -> pd.DataFrame:
        columns = ["slots", "hits", "evicted", "swept"]
        frame = self.events.groupby("layer")[columns].sum()
        sizes = self.events.groupby("layer").size()
        loads = self.loads.groupby("layer").size().reindex(frame.index, fill_value=0)
        frame.insert(0, "capacity", [self.capacity[layer] for layer in frame.index])
        frame.insert(1, "pinned", [len(self.pins[layer]) for layer in frame.index])
        frame.insert(2, "events", sizes)
        frame.insert(5, "hit_rate", frame["hits"] / frame["slots"])
        frame.insert(6, "loads", loads)
        return frame.reset_index()

    def _summary(self) -> dict[str, str]:
        pinned = sum(map(len, self.pins.values()))
        slots, swept = int(self.events["slots"].sum()), int(self.events["swept"].sum())
        return {
            "policy": self.policy,
            "capacity": f"{_range(self.capacity.values())} of {self._experts} experts a layer"
            + (f", {pinned / len(self.pins):.1f} of them pinned" if pinned else ""),
            "events": f"{len(self.events):,} in {len(self.capacity)} layers, {swept:,} swept",
            "routed": f"{slots:,} slots, {self.hit_rate:.1%} hits",
            "loads": f"{len(self.loads):,} experts, {len(self.loads) / len(self.events):.2f} "
            "an event",
        }

    def __repr__(self) -> str:
        return facts_text("Replay", self._summary())

    def _repr_html_(self) -> str:
        return facts_html("Replay", self._summary())


def replay(
    routing: pd.DataFrame | Recording,
    policy: Any = "lru",
    *,
    capacity: int | float | Mapping[int, int | float] | None = None,
    pins: Experts = None,
    initial: Experts = None,
    experts: int | Mapping[int, int] | None = None,
) -> Replay:
    """Plays a recorded routing to a bank of another size or policy.

    One step at one layer is one event; its experts are those of all rows of (run, step, layer),
    padding included. The bank starts with its pins and `initial`, and is kept from run to run.

    Args:
        routing: A recording, or a frame with the columns of `rec.routing`; needed are `run`,
            `step`, `layer`, `rank` and `expert`. Rows in order of time, as a recording has them.
            A recording also says what is not given here: capacity, pins, initial contents and
            experts as they were when it was made; not the policy, which is LRU unless given. Of
            what happened before it, the order of the bank's experts is recorded and counts of
            use are not: a replay agrees event for event under LRU, and under other policies if
            the bank was fresh or reset when the recording began.
        policy: A name from `moelab.policies()`, or a policy of one's own.
        capacity: Slots a layer: an int counts experts, a float is a share of them (1 and 1.0
            differ), rounded half up; or either by layer.
        pins: Experts that are resident from the start and never leave: for all layers, or by
            layer.
        initial: Experts that are resident at first, from most to least worth keeping; as many as
            find room. Under a policy that admits nothing top-k slots stay free.
        experts: Experts a layer; by default the highest id in the frame, plus 1. Where it is
            given, a layer with as many slots as experts holds them all, and nothing is loaded.

    Returns:
        What was hit and loaded.

    Raises:
        ReplayError: If the frame lacks columns, is empty, or was recorded with a lossy miss
            action, after which later routing is not what it would have been.
        CapacityError: If none is known, or one is under a layer's top-k or over its number of
            experts.
        PolicyError: If the policy is unknown, or if pins or initial contents name an expert or a
            layer that is not there, or leave fewer than top-k slots.
    """
    if isinstance(routing, Recording):
        recorded = as_recorded(routing.run)
        capacity = recorded["capacity"] if capacity is None else capacity
        pins = recorded["pins"] if pins is None else pins
        initial = recorded["initial"] if initial is None else initial
        experts = recorded["experts"] if experts is None else experts
        routing = routing.routing
    if capacity is None:
        raise CapacityError("A routing frame does not say a capacity. Give capacity=.")
    check_frame(routing)
    step, steps = steps_of(routing)
    layers = layer_events(routing, step)
    sizes = experts_of(experts, layers)
    slots = {e.layer: slots_of(capacity, e, sizes[e.layer], experts is not None) for e in layers}
    pinned = ids_by_layer("pins", pins, layers, sizes)
    first = ids_by_layer("initial", initial, layers, sizes)
    check_pins(pinned, slots, layers, sizes)
    name = policy if policy in (Min.name, MinForced.name) else make_policy(policy)().name
    played = []
    for events in _progress(layers):
        layer = events.layer
        if experts is not None and slots[layer] == sizes[layer]:
            played.append(_Played(events))
            continue
        bank = (slots[layer], pinned[layer], first[layer])
        if name == Min.name:
            played.append(_bypassing(events, *bank))
        else:
            played.append(_replacing(events, *bank, policy))
    told = _range(sizes.values()) + ("" if experts is not None else " (highest id seen)")
    pins_of = {layer: sorted(ids) for layer, ids in pinned.items()}
    frames = _frames(routing, steps, layers, played)
    return Replay(name, slots, pins_of, told, frames)


class _Played:
    """What happened at one layer."""

    def __init__(self, events: LayerEvents) -> None:
        self.hit = np.ones(len(events.expert), bool)
        """bool (pairs,)."""
        self.loads = array("q")
        """Four numbers a load: the event's place in the layer, the expert, who left (−1: nobody),
        and whether it became resident. No list of tuples, since there may be millions."""
        self.swept = np.zeros(len(events.step), bool)


def _replacing(
    events: LayerEvents, capacity: int, pinned: list[int], first: list[int], policy: Any
) -> _Played:
    """Plays the events to the live bank's own bookkeeping."""
    needed_of = events.needed()
    if policy == MinForced.name:
        away = frozenset(pinned)
        made: Any = MinForced(Future([[e for e in n if e not in away] for n in needed_of]))
    else:
        made = placed(make_policy(policy)(), events.layer)
    bank = Residency(capacity, made, pinned)
    for load in bank.fill(first, events.top_k):
        bank.arrived(load)
    played = _Played(events)
    missed: list[int] = []
    loads = played.loads
    admits, slot_of, always = made.admits, bank.slot_of, bank.pinned
    for number, (needed, start) in enumerate(zip(needed_of, events.start.tolist(), strict=False)):
        misses = bank.begin(needed)
        if misses:
            absent = set(misses)
            missed += [start + i for i, e in enumerate(needed) if e in absent]
            parts: Iterable[Sequence[Load]]
            if bank.fits(needed):  # as `rounds` would, without its ado
                parts = [bank.admit(needed, misses)]
            else:
                parts = (part.loads for part in bank.rounds(needed, misses))
                played.swept[number] = True
            for part in parts:
                for expert, slot, evicted in part:
                    slot_of[expert] = slot  # what `arrived` does
                    stays = admits or expert in always
                    loads.extend((number, expert, -1 if evicted is None else evicted, stays))
        bank.end()
    played.hit[missed] = False
    return played


def _bypassing(events: LayerEvents, capacity: int, pinned: list[int], first: list[int]) -> _Played:
    needed_of = events.needed()
    contents = list(dict.fromkeys([*pinned, *first]))[:capacity]
    minimum = Min(capacity, Future(needed_of), pinned, contents)
    played = _Played(events)
    missed: list[int] = []
    loads = played.loads
    for number, (needed, start) in enumerate(zip(needed_of, events.start.tolist(), strict=False)):
        misses, admitted, evicted = minimum.event(needed)
        if not misses:
            continue
        absent, stays = set(misses), set(admitted)
        missed += [start + i for i, e in enumerate(needed) if e in absent]
        leaving = iter(evicted)
        free = len(admitted) - len(evicted)
        for expert in misses:
            if expert not in stays:
                loads.extend((number, expert, -1, False))
            elif free > 0:
                free -= 1
                loads.extend((number, expert, -1, True))
            else:
                loads.extend((number, expert, next(leaving), True))
    played.hit[missed] = False
    return played


def _frames(
    routing: pd.DataFrame, steps: pd.DataFrame, layers: list[LayerEvents], played: list[_Played]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Builds the frames of events, loads and routing."""
    import pandas as pd

    hit = np.zeros(len(routing), bool)
    events, loads = [], []
    for layer, found in zip(layers, played, strict=True):
        row_hit = found.hit[layer.pair]
        hit[layer.rows] = row_hit
        count = len(layer.step)
        event_of_pair = np.repeat(np.arange(count), np.diff(layer.start))
        event_of_row = event_of_pair[layer.pair]
        told = np.array(found.loads, np.int64).reshape(-1, 4)
        left = told[told[:, 2] >= 0, 0]
        events.append(
            pd.DataFrame(
                {
                    "place": layer.step,
                    "layer": layer.layer,
                    "needed": np.diff(layer.start),
                    "missed": np.bincount(event_of_pair, ~found.hit, count).astype(np.int64),
                    "slots": np.bincount(event_of_row, minlength=count),
                    "hits": np.bincount(event_of_row, row_hit, count).astype(np.int64),
                    "swept": found.swept,
                    "evicted": np.bincount(left, minlength=count),
                }
            )
        )
        loads.append(
            pd.DataFrame(
                {
                    "place": layer.step[told[:, 0]],
                    "layer": layer.layer,
                    "expert": told[:, 1],
                    "evicted": told[:, 2],
                    "admitted": told[:, 3].astype(bool),
                }
            )
        )
    return (
        _in_time(pd.concat(events), routing, steps),
        _in_time(pd.concat(loads), routing, steps),
        routing.assign(hit=hit),
    )


def _in_time(frame: pd.DataFrame, routing: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Sorts by step, then by layer, and says run and step in place of the step's place."""
    frame = frame.sort_values("place", kind="stable", ignore_index=True)
    places = frame.pop("place").to_numpy()
    frame.insert(0, "run", steps["run"].to_numpy()[places])
    frame.insert(1, "step", steps["step"].to_numpy()[places])
    for name in ("run", "step", "layer", "expert"):
        if name in frame:
            frame[name] = frame[name].astype(routing[name].dtype)
    return frame


def _progress(layers: list[LayerEvents]) -> Iterable[LayerEvents]:
    """Shows a bar where the replay takes a while."""
    from tqdm.auto import tqdm

    return tqdm(layers, desc="replay", unit="layer", delay=2, leave=False)


def _range(numbers: Iterable[int]) -> str:
    """Returns a number, or the lowest and the highest where they differ."""
    lowest, *others = sorted(set(numbers))
    return f"{lowest}–{others[-1]}" if others else f"{lowest}"
