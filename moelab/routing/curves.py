"""Miss-ratio curves: what LRU and the two bounds of MIN miss, at every capacity, from one pass.

Events are those of the bank: one step at one layer, its hits judged before anything enters. The
figures equal `moelab.replay`'s at each capacity, event for event (`stacks` says why one pass is
enough, `sweeps` what is done for capacities that some event exceeds).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..display import facts_html, facts_text
from ..errors import CapacityError, PolicyError, StudyError
from .recording import Recording
from .streams import EVENT_PHASES, WHOLE, LayerStream, frame_streams

if TYPE_CHECKING:
    import pandas as pd

ALL_LAYERS = -1
"""What `layer` says in the rows that sum over layers."""

POLICIES = ("lru", "best_static", "min_forced", "min")
"""Curves, from the one that a bank can reach to the lowest bound."""

Others = Literal["advance", "exclude"]
SUMS = (
    "slots", "misses", "compulsory", "needed", "loads", "compulsory_loads", "mass", "missed_mass",
)  # fmt: skip
COLUMNS = (
    "run", "layer", "phase", "policy", "capacity", "experts", "swept", "slots", "misses",
    "miss_ratio", "compulsory", "needed", "loads", "load_ratio", "compulsory_loads", "mass_ratio",
    "chance",
)  # fmt: skip


class Curves:
    """Misses by capacity.

    Attributes:
        frame: A row a layer, policy and capacity, then rows with layer −1 for all layers together:
            `run` (only with `by="run"`), `layer` (int16), `phase` (what was counted), `policy`,
            `capacity` (int32, slots a layer), `experts` (int32, of the layer), `swept` (bool: some
            event is larger than the bank), and
            in routed slots `slots`, `misses`, `compulsory` (int64) and `miss_ratio` (float64);
            in distinct experts an event `needed`, `loads`, `compulsory_loads` (int64) and
            `load_ratio` (float64); in gate weight `mass_ratio` (float64; NaN without weights).
            Compulsory misses are first uses since the bank was empty: every capacity has them.
            `chance` (float64): what any policy that does not know the future misses under uniform
            routing once its bank is full, 1 − capacity ÷ experts.
        settings: What was asked for.
    """

    def __init__(self, frame: pd.DataFrame, settings: dict[str, Any]) -> None:
        self.frame = frame
        self.settings = settings

    @property
    def overall(self) -> pd.DataFrame:
        """The rows for all layers together."""
        return self.frame[self.frame["layer"] == ALL_LAYERS].reset_index(drop=True)

    @property
    def by_layer(self) -> pd.DataFrame:
        """The rows of single layers."""
        return self.frame[self.frame["layer"] != ALL_LAYERS].reset_index(drop=True)

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draws the curves; see `moelab.plots.curves.miss_ratio`. Returns Axes."""
        from ..plots.curves import miss_ratio

        return miss_ratio(self.frame, ax=ax, **options)

    def _summary(self) -> dict[str, str]:
        rows = self.overall
        if rows.empty:  # shares of layers that differ: no capacity is common to all
            return {"layers": f"{self.frame['layer'].nunique()}, with no capacity in common"}
        grouped = rows.groupby(["policy", "capacity"], observed=True, sort=False)
        sums = grouped[["slots", "misses", "compulsory"]].sum().reset_index()
        experts = int(self.frame["experts"].max())
        lru = sums[sums["policy"] == "lru"]
        facts = {
            "counted": f"{int(lru['slots'].iloc[0]):,} routed slots of phase "
            f"{self.frame['phase'].iloc[0]}, {int(lru['compulsory'].iloc[0]):,} of them first uses",
            "bank": "emptied before each run" if self.settings["reset"] == "run" else
            "empty at first, kept from run to run",
            "capacity": f"{lru['capacity'].min()} to {lru['capacity'].max()} of {experts} experts "
            f"a layer, {self.frame['layer'].nunique() - 1} layers",
        }  # fmt: skip
        sizes = lru["capacity"].to_numpy()
        shown = dict.fromkeys(
            int(sizes[np.abs(sizes - share * experts).argmin()]) for share in (0.25, 0.5, 0.75)
        )
        for capacity in shown:
            rows = sums[sums["capacity"] == capacity]
            ratios = zip(rows["policy"], rows["misses"] / rows["slots"], strict=True)
            facts[f"at {capacity}"] = ", ".join(f"{name} misses {x:.1%}" for name, x in ratios)
        return facts

    def __repr__(self) -> str:
        return facts_text("Curves", self._summary())

    def _repr_html_(self) -> str:
        return facts_html("Curves", self._summary())


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of `curves`, checked as far as that can be done without the layers."""

    phase: int
    others: Others
    reset: bool
    by_run: bool
    capacities: tuple[int | float, ...] | None
    pins: Any
    policies: tuple[str, ...]


def curves(
    recording: Recording | pd.DataFrame | str | Path | Any,
    *,
    capacities: Iterable[int | float] | None = None,
    phase: str = "decode",
    others: Others = "advance",
    reset: Literal["run"] | None = None,
    by: Literal["run"] | None = None,
    pins: Iterable[int] | Mapping[int, Iterable[int]] | None = None,
    experts: int | Mapping[int, int] | None = None,
    bounds: bool = True,
) -> Curves:
    """Gives the misses of LRU at every capacity, and how few there could have been.

    The bank is empty at first. `lru` is what a bank misses. `min` is MIN with bypass, below which
    no policy can load; `min_forced` is MIN that must admit every miss; `best_static` is the best
    fixed set with hindsight, each of its experts loaded at its first use. Phases are never pooled
    unless that is asked for. A step must be played as it was recorded: a prompt in other chunks
    has other events.

    Capacities that some event exceeds (`swept`) are played one by one by the bank's own rules for
    `lru` and `min_forced`. That takes time where prompts came in large chunks: give a few
    `capacities` for a long trace, or leave prompts out with `others="exclude"`. A sweep reads every
    expert once, so `loads` are its misses there too. Forced MIN's choice in a sweep is good but not
    always best; `min` is a bound there as well. MIN makes the loads of all events that are played
    the fewest; where some are played and not counted, it is a bound for all of them together.

    Args:
        recording: A recording of a lossless run, its `routing` or a frame like it, what
            `moelab.routing.trace.read_trace` gave or the path of such a trace (of which one layer
            at a time is in memory), or layers as `moelab.routing.streams.LayerStream`.
        capacities: Slots a layer: ints count experts, floats are shares. By default every capacity
            from top-k (and the pins) to the number of experts.
        phase: Events that count: "decode", "prefill", or "all" for both together. Where the frame
            has no `phase`, every event counts and `phase` is "all".
        others: What the other events do: "advance" changes the bank and is not counted, as a
            prompt does before the answer; "exclude" plays them not at all.
        reset: "run" empties the bank before each run; None keeps it from run to run.
        by: "run" gives every run rows of its own.
        pins: Experts that are resident from the start and never leave, for all layers or by layer.
        experts: Experts a layer, or by layer; by default what the recording or trace says, or the
            highest id in the frame, plus 1.
        bounds: Also give the curves other than `lru`.

    Returns:
        The curves.

    Raises:
        ReplayError: If the frame lacks columns, is empty, or was recorded with a lossy miss action.
        StudyError: If there is no event of that phase, or an option is not known.
        CapacityError: If a capacity is under a layer's top-k or over its number of experts.
        PolicyError: If pins name what is not there, or leave fewer than top-k slots.
    """
    import pandas as pd

    _one_of("phase", phase, EVENT_PHASES[1:])
    _one_of("others", others, ("advance", "exclude"))
    _one_of("reset", reset, (None, "run"))
    _one_of("by", by, (None, "run"))
    asked = Asked(
        phase=EVENT_PHASES.index(phase),
        others=others,
        reset=reset == "run",
        by_run=by == "run",
        capacities=None if capacities is None else numbers_of(capacities),
        pins=pins,
        policies=POLICIES if bounds else POLICIES[:1],
    )
    parts, phases = [], set()
    seen: dict[str, int] = {}
    for stream in _progress(streams_of(recording, experts)):
        whole = bool((stream.phase == WHOLE).any())
        phases.add("all" if whole else phase)
        for code, name in enumerate(EVENT_PHASES):
            seen[name] = seen.get(name, 0) + int((stream.phase == code).sum())
        parts.append(_layer(stream, asked))
    if not parts:
        raise StudyError("There is no layer to count.")
    frame = pd.concat(parts, ignore_index=True)
    if frame.empty:
        told = ", ".join(f"{n:,} of {name}" for name, n in seen.items() if n)
        raise StudyError(
            f"There is no event of phase {phase!r}: the recording has events {told}. "
            "Give another phase=."
        )
    frame = pd.concat([frame, _overall(frame)], ignore_index=True)
    settings = {"phase": phase, "others": others, "reset": reset, "by": by, "pins": pins}
    return Curves(_finished(frame, asked, phases.pop() if len(phases) == 1 else phase), settings)


def streams_of(
    source: Any, experts: int | Mapping[int, int] | None = None
) -> Iterable[LayerStream]:
    """Returns the layers of anything that `curves` takes."""
    if isinstance(source, str | Path):
        from .trace import read_trace

        source = read_trace(source)
    if isinstance(source, Recording):
        run = source.run
        known = dict(zip(run["layers"], run["experts"], strict=True)) if "experts" in run else None
        return frame_streams(source.routing, known if experts is None else experts)
    if hasattr(source, "streams"):
        found: Iterable[LayerStream] = source.streams(experts)
        return found
    if not hasattr(source, "columns") and isinstance(source, Iterable):
        return source
    return frame_streams(source, experts)


def events_of(
    stream: LayerStream, phase: int, others: str, reset: bool
) -> tuple[LayerStream, np.ndarray, np.ndarray]:
    """Chooses the events that are played.

    Returns:
        The events in the order in which they are played; which of them count, bool (events,); and
        before which of them the bank is emptied, bool (events,).
    """
    counted = (stream.phase == phase) | (stream.phase == WHOLE) | (phase == WHOLE)
    chosen = np.flatnonzero(counted) if others == "exclude" else np.arange(len(counted))
    if reset:  # runs that took turns are taken apart
        chosen = chosen[np.argsort(stream.run[chosen], kind="stable")]
    played = stream.events(chosen)
    fresh = np.zeros(len(chosen), bool)
    if reset and len(chosen):
        fresh[0] = True
        fresh[1:] = played.run[1:] != played.run[:-1]
    return played, counted[chosen], fresh


def _layer(stream: LayerStream, asked: Asked) -> pd.DataFrame:
    """Counts one layer, in every group and at every capacity."""
    pins = _pins(asked.pins, stream)
    sizes = capacities_of(stream, asked.capacities, len(pins))
    played, counted, fresh = events_of(stream, asked.phase, asked.others, asked.reset)
    if asked.by_run:
        names, place = np.unique(played.run, return_inverse=True)
    else:
        names, place = np.zeros(1, np.int64), np.zeros(len(counted), np.int64)
    group = np.where(counted, place, -1).astype(np.int32)
    always = np.zeros((3, len(names)))
    if pins:
        always = _pinned(played, group, len(names), pins)
        played = played.without(pins)
    found = counts(played, group, fresh, len(names), sizes - len(pins), asked.policies)
    return _rows(stream, sizes, names, found, always, played.largest + len(pins))


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts of one policy. All are pairs, slots and mass, in this order."""

    total: np.ndarray
    """(3, groups)"""
    first: np.ndarray
    """(3, groups): first uses."""
    missed: np.ndarray
    """(3, groups, capacities)"""


def counts(
    played: LayerStream,
    group: np.ndarray,
    fresh: np.ndarray,
    groups: int,
    sizes: np.ndarray,
    policies: Sequence[str],
) -> dict[str, Counted]:
    """Counts a layer's misses.

    Args:
        played: The events.
        group: int32 (events,): where each is counted; −1 nowhere.
        fresh: bool (events,): the bank is emptied before it.
        groups: Number of groups.
        sizes: int (capacities,): slots.
        policies: Of `POLICIES`.
    """
    from . import stacks, sweeps

    experts = played.experts
    given = (played.start, played.expert, played.slots, played.mass, group, fresh, experts, groups)
    following = np.zeros(0, np.int64)
    if set(policies) & {"min", "min_forced"}:
        following = stacks.next_uses(played.start, played.expert, fresh, experts)
    swept = np.flatnonzero(sizes < played.largest)
    found = {}
    for policy in policies:
        if policy == "best_static":
            at = np.stack(stacks.later_uses(*given))
            order = np.argsort(-at[0, :, :experts].sum(0), kind="stable")
            at = np.concatenate([at[:, :, order], at[:, :, experts:]], axis=2)
        elif policy == "lru":
            at = np.stack(stacks.lru_places(*given))
        else:
            at = np.stack(stacks.min_places(*given, following, policy == "min_forced"))
        total = at.sum(axis=2)
        hits = np.concatenate([np.zeros((3, groups, 1)), at[:, :, :experts].cumsum(axis=2)], axis=2)
        missed = total[:, :, None] - hits[:, :, sizes]
        for i in swept if policy in ("lru", "min_forced") else ():
            if policy == "lru":
                missed[:, :, i] = sweeps.lru_misses(*given, int(sizes[i]))
            else:
                missed[:, :, i] = sweeps.min_forced_misses(*given, following, int(sizes[i]))
        found[policy] = Counted(total, at[:, :, experts], missed)
    return found


def _rows(
    stream: LayerStream,
    sizes: np.ndarray,
    names: np.ndarray,
    found: dict[str, Counted],
    always: np.ndarray,
    largest: int,
) -> pd.DataFrame:
    import pandas as pd

    parts = []
    for policy, counted in found.items():
        total = counted.total + always
        here = np.flatnonzero(total[1] > 0)
        count = len(sizes)

        def each(values: np.ndarray, here: np.ndarray = here, count: int = count) -> np.ndarray:
            return np.repeat(values[here], count)

        parts.append(
            pd.DataFrame(
                {
                    "run": each(names),
                    "layer": stream.layer,
                    "policy": policy,
                    "capacity": np.tile(sizes, len(here)),
                    "experts": stream.experts,
                    "swept": np.tile(sizes < largest, len(here)),
                    "slots": each(total[1]),
                    "misses": counted.missed[1][here].ravel(),
                    "compulsory": each(counted.first[1]),
                    "needed": each(total[0]),
                    "loads": counted.missed[0][here].ravel(),
                    "compulsory_loads": each(counted.first[0]),
                    "mass": each(total[2]),
                    "missed_mass": counted.missed[2][here].ravel(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _overall(frame: pd.DataFrame) -> pd.DataFrame:
    """Sums over layers at capacities that all have; a layer with fewer experts holds them all."""
    import pandas as pd

    own = frame.groupby("layer")["capacity"].agg(["min", "max"])
    sizes = frame["capacity"].unique()
    parts = [frame]
    for layer, highest in own["max"].items():
        full = frame[(frame["layer"] == layer) & (frame["capacity"] == highest)]
        if highest == full["experts"].iloc[0]:
            parts += [full.assign(capacity=size) for size in sizes if size > highest]
    whole = pd.concat(parts)
    layers = whole.groupby("capacity")["layer"].nunique()
    whole = whole[whole["capacity"].isin(layers.index[layers == len(own)])]
    sums = {"experts": "max", "swept": "any", **dict.fromkeys(SUMS, "sum")}
    summed = whole.groupby(["run", "policy", "capacity"], sort=False).agg(sums).reset_index()
    return summed.assign(layer=ALL_LAYERS)


def _finished(frame: pd.DataFrame, asked: Asked, phase: str) -> pd.DataFrame:
    """Makes shares of the sums, and puts the columns in order."""
    import pandas as pd

    frame["phase"] = pd.Categorical([phase] * len(frame), categories=EVENT_PHASES[1:])
    frame["policy"] = pd.Categorical(frame["policy"], categories=asked.policies)
    frame["miss_ratio"] = frame["misses"] / frame["slots"]
    frame["load_ratio"] = frame["loads"] / frame["needed"]
    frame["mass_ratio"] = frame["missed_mass"] / frame["mass"]
    frame["chance"] = 1 - frame["capacity"] / frame["experts"]
    narrow = {name: "int64" for name in SUMS if not name.endswith("mass")}
    narrow |= {"run": "int32", "layer": "int16", "capacity": "int32", "experts": "int32"}
    frame = frame.astype(narrow)[list(COLUMNS)]
    frame.attrs["experts"] = int(frame["experts"].max())
    return frame if asked.by_run else frame.drop(columns="run")


def _pins(pins: Any, stream: LayerStream) -> list[int]:
    """Returns a layer's pins, ascending."""
    given = pins.get(stream.layer, ()) if isinstance(pins, Mapping) else pins or ()
    found = sorted({int(expert) for expert in given})
    wrong = [expert for expert in found if not 0 <= expert < stream.experts]
    if wrong:
        raise PolicyError(
            f"pins= names experts {wrong}, and layer {stream.layer} has {stream.experts} experts "
            "(0 is the first). Say experts= if the frame does not show them all."
        )
    if len(found) > stream.experts - stream.top_k:
        raise PolicyError(
            f"{len(found)} pins are too many for layer {stream.layer}: of {stream.experts} experts "
            f"{stream.top_k} (top-k) must be free to change. Pin fewer."
        )
    return found


def capacities_of(
    stream: LayerStream, asked: Sequence[int | float] | None, pins: int = 0
) -> np.ndarray:
    """Returns the capacities of a layer, int64, ascending, each once."""
    lowest, highest = stream.top_k + pins, stream.experts
    if asked is None:
        return np.arange(lowest, highest + 1)
    sizes = set()
    for given in asked:
        size = given if isinstance(given, int) else math.floor(given * highest + 0.5)
        if not lowest <= size <= highest:
            free = f"its top-k{f' and {pins} pins' if pins else ''}: a token needs them all at once"
            raise CapacityError(
                f"capacity {given!r} is {size} experts in layer {stream.layer}, and it must be "
                f"between {lowest} ({free}) and {highest} (all its experts)."
            )
        sizes.add(size)
    return np.array(sorted(sizes), np.int64)


def numbers_of(capacities: Any) -> tuple[int | float, ...]:
    """Checks the capacities that were asked for, before the layers are known."""
    if isinstance(capacities, int | float | str) or not isinstance(capacities, Iterable):
        raise CapacityError(f"capacities must be a list of numbers, got {capacities!r}.")
    found: list[int | float] = []
    for given in capacities:
        if isinstance(given, bool) or not isinstance(given, int | float | np.number):
            raise CapacityError(
                f"A capacity must be an int (experts a layer) or a float (a share), got {given!r}."
            )
        if isinstance(given, int | np.integer):
            found.append(int(given))
        elif 0 < given <= 1:
            found.append(float(given))
        else:
            raise CapacityError(
                f"A capacity given as a float is a share between 0 and 1, got {given}. "
                "Give an int to count experts."
            )
    if not found:
        raise CapacityError("capacities is empty: give at least one, or None for all.")
    return tuple(found)


def _pinned(played: LayerStream, group: np.ndarray, groups: int, pins: list[int]) -> np.ndarray:
    """Returns pairs, slots and mass of the pinned experts, which always hit: (3, groups)."""
    to = np.repeat(group, np.diff(played.start))
    rows = np.isin(played.expert, pins) & (to >= 0)
    weights = (None, played.slots[rows], played.mass[rows])
    return np.stack([np.bincount(to[rows], w, groups).astype(np.float64) for w in weights])


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise StudyError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")


def _progress(layers: Iterable[LayerStream]) -> Iterator[LayerStream]:
    """Shows a bar where it takes a while."""
    from tqdm.auto import tqdm

    yield from tqdm(layers, desc="curves", unit="layer", delay=2, leave=False)
