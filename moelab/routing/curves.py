"""Miss-ratio curves: what LRU and the two bounds of MIN miss, at every capacity, from one pass.

Events are those of the bank: one step at one layer, its hits judged before anything enters. The
figures equal `moelab.replay`'s at each capacity, event for event (`stacks` says why one pass is
enough, `sweeps` what is done for capacities that some event exceeds).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..display import facts_html, facts_text
from ..errors import StudyError
from .capacities import capacities_of, numbers_of, pins_of
from .counts import POLICIES, Others, counts, events_of, pinned
from .curve_rows import ALL_LAYERS, finished_rows, layer_rows, overall_rows
from .recording import Recording
from .sources import streams_of
from .streams import EVENT_PHASES, WHOLE, LayerStream

if TYPE_CHECKING:
    import pandas as pd


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
    frame = pd.concat([frame, overall_rows(frame)], ignore_index=True)
    settings = {"phase": phase, "others": others, "reset": reset, "by": by, "pins": pins}
    counted = phases.pop() if len(phases) == 1 else phase
    return Curves(finished_rows(frame, asked.policies, asked.by_run, counted), settings)


def _layer(stream: LayerStream, asked: Asked) -> pd.DataFrame:
    """Counts one layer, in every group and at every capacity."""
    pins = pins_of(asked.pins, stream)
    sizes = capacities_of(stream, asked.capacities, len(pins))
    played, counted, fresh = events_of(stream, asked.phase, asked.others, asked.reset)
    if asked.by_run:
        names, place = np.unique(played.run, return_inverse=True)
    else:
        names, place = np.zeros(1, np.int64), np.zeros(len(counted), np.int64)
    group = np.where(counted, place, -1).astype(np.int32)
    always = np.zeros((3, len(names)))
    if pins:
        always = pinned(played, group, len(names), pins)
        played = played.without(pins)
    found = counts(played, group, fresh, len(names), sizes - len(pins), asked.policies)
    return layer_rows(stream, sizes, names, found, always, played.largest + len(pins))


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise StudyError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")


def _progress(layers: Iterable[LayerStream]) -> Iterator[LayerStream]:
    """Shows a bar where it takes a while."""
    from tqdm.auto import tqdm

    yield from tqdm(layers, desc="curves", unit="layer", delay=2, leave=False)
