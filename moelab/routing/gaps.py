"""How far a policy is from the best, and why: admission and victims, skew and recency."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import StudyError
from .capacities import capacities_of, numbers_of
from .compiled import compiled
from .counts import Others, counts, events_of
from .curve_rows import ALL_LAYERS
from .documents import documents_in
from .policies import policy_table
from .sources import streams_of
from .streams import EVENT_PHASES, LayerStream

if TYPE_CHECKING:
    import pandas as pd


def belady_gap(
    recording: Any,
    policies: str | Iterable[Any] = "lru",
    *,
    capacities: Iterable[int | float],
    phase: str = "decode",
    others: Others = "exclude",
    reset: Literal["run"] | None = "run",
    by: Literal["layer"] | None = None,
    documents: Any = None,
    experts: Any = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Splits the loads of a policy beyond MIN's into admission and choice of victim.

    MIN may refuse to admit a miss; forced MIN may not, and a bank that admits every miss cannot do
    better. So of the gap between a policy and MIN

    - *admission* is forced MIN − MIN: what it costs to admit every miss, with perfect victims;
    - *victim* is policy − forced MIN: what it costs to choose victims without the future.

    Loads are distinct experts an event, which MIN minimises; under decode they are also routed
    slots. By default only the counted events are played and the bank is emptied before each run:
    then MIN is the least for each document. Where an event is larger than the bank, forced MIN's
    sweeps are good but not always best, and a share of admission may come out too large. Source:
    arXiv 2608.07911.

    Args:
        recording: As for `moelab.curves`.
        policies: Names, or policies of one's own; "all" for all that a model can run with.
        capacities: Slots a layer: ints count experts, floats are shares.
        phase: Events that count.
        others: What the other events do. With "advance" MIN is the least of all events together,
            not of the counted ones.
        reset: "run" empties the bank before each run; None keeps it.
        by: "layer" gives rows by layer.
        documents: Document and domain of each run; see `moelab.routing.policies.policy_table`.
        experts: Experts a layer; see `moelab.curves`.
        level: Of the intervals, which are clustered by document and stratified by domain.

    Returns:
        A row a policy and capacity (and layer): `policy`, `capacity`, `needed`, `loads`,
        `loads_min_forced`, `loads_min` (int64); as shares of `needed` `gap`, `admission`,
        `victim`, each with `_low` and `_high` (float64); `admission_share` and `victim_share` of
        the gap, `admission_share_low` and `_high` (float64; NaN where the gap is 0, and the
        interval where a document's gap is under 0); `documents` (int64).

    Raises:
        StudyError, PolicyError, CapacityError: As `policy_table`.
    """
    import pandas as pd

    from ..experts.policies import REPLAY_ONLY
    from ..experts.policies import policies as known

    if isinstance(policies, str) and policies == "all":
        live = known().query("live and name != 'static'")["name"]
        asked = live.tolist()
    else:
        asked = [policies] if isinstance(policies, str) else list(policies)
    asked = [policy for policy in asked if policy not in REPLAY_ONLY]
    if not asked:
        raise StudyError("belady_gap compares policies with min and min_forced; name another one.")
    table = policy_table(
        recording, [*asked, *REPLAY_ONLY], capacities=capacities, phase=phase, others=others,
        reset=reset, by=by, documents=documents, experts=experts,
    )  # fmt: skip
    keys = ["run", "document", "domain", *(["layer"] if by else []), "capacity"]
    wide = {name: part.set_index(keys) for name, part in table.groupby("policy")}
    bounds = {name: wide[name]["loads"] for name in REPLAY_ONLY}
    parts = []
    for name, mine in wide.items():
        if name in REPLAY_ONLY:
            continue
        part = mine[["policy", "needed", "loads"]].copy()
        part["loads_min_forced"], part["loads_min"] = bounds["min_forced"], bounds["min"]
        parts.append(part.reset_index())
    order = [getattr(policy, "name", policy) for policy in asked]
    whole = pd.concat(sorted(parts, key=lambda part: order.index(part["policy"].iloc[0])))
    return _split(whole, [*(["layer"] if by else []), "policy", "capacity"], level)


PARTS = {
    "gap": ("loads", "loads_min"),
    "admission": ("loads_min_forced", "loads_min"),
    "victim": ("loads", "loads_min_forced"),
}
"""Each part is the first less the second."""


def _split(runs: pd.DataFrame, keys: list[str], level: float) -> pd.DataFrame:
    """Sums over documents, with intervals."""
    from ..quality.intervals import clustered

    sums = ["needed", "loads", "loads_min_forced", "loads_min"]
    runs = runs[runs["needed"] > 0].reset_index(drop=True)
    # Runs of one document are one cluster, whatever the order in which they come.
    result = runs.groupby(keys, sort=False, as_index=False)[sums].sum()
    for name, (more, less) in PARTS.items():
        runs[name] = (runs[more] - runs[less]) / runs["needed"]
        told = clustered(runs, name, keys, weights="needed", level=level)
        told = result[keys].merge(told, on=keys, how="left")
        result[name] = (result[more] - result[less]) / result["needed"]
        result[f"{name}_low"], result[f"{name}_high"] = told["low"], told["high"]
    gap = (result["loads"] - result["loads_min"]).astype("float64")
    gap = gap.where(gap != 0)
    result["admission_share"] = (result["loads_min_forced"] - result["loads_min"]) / gap
    result["victim_share"] = 1 - result["admission_share"]
    runs["distance"] = runs["loads"] - runs["loads_min"]
    some = runs[runs["distance"] > 0].copy()
    some["share"] = (some["loads_min_forced"] - some["loads_min"]) / some["distance"]
    low = runs.groupby(keys, sort=False)["distance"].min().reindex(result.set_index(keys).index)
    if len(some):
        told = clustered(some, "share", keys, weights="distance", level=level, limits=(0, 1))
        told = result[keys].merge(told, on=keys, how="left")
        for bound in ("low", "high"):
            result[f"admission_share_{bound}"] = told[bound].where(low.to_numpy() >= 0)
    else:
        result["admission_share_low"] = result["admission_share_high"] = np.nan
    groups = runs.drop_duplicates([*keys, "domain", "document"]).groupby(keys, sort=False)
    result["documents"] = groups.size().reindex(result.set_index(keys).index).to_numpy()
    return result


def skew_and_recency(
    recording: Any,
    *,
    capacities: Iterable[int | float] | None = None,
    phase: str = "decode",
    reset: Literal["run"] | None = None,
    within: Literal["domain", "run"] | None = None,
    documents: Any = None,
    experts: Any = None,
    shuffles: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Splits LRU's hits into what skew gives and what the order of tokens gives.

    Three routings of as many tokens, each played to an empty bank: *uniform*, every token's experts
    drawn without regard to anything; *shuffled*, the recording's own tokens in random order, each
    with its experts in all layers, so that some experts are still wanted more than others; *real*.

    - *skew* is shuffled − uniform: hits because some experts are favourites;
    - *recency* is real − shuffled: hits because tokens want what those before them wanted.

    Tokens are shuffled among those of the phase, over all runs, so that the text's subject counts
    as recency. With `within="domain"` they stay in their domain and its favourites count as skew;
    with `within="run"` the document's do, and only the order inside it is recency. Events of other
    phases are left out.

    Args:
        recording: As for `moelab.curves`.
        capacities: Slots a layer; by default all.
        phase: Events that count. Those of "prefill" hold several tokens and are moved whole.
        reset: "run" empties the bank before each run; shuffled tokens fill runs of the same
            lengths.
        within: What tokens stay in.
        documents: Document and domain of each run, for `within="domain"`.
        experts: Experts a layer; see `moelab.curves`.
        shuffles: Shuffled and uniform routings, over which their hits are averaged.
        seed: Of both.

    Returns:
        A row a layer and capacity, then rows with layer −1 for all together: `layer`, `capacity`,
        `experts`, `slots`; shares of the routed slots that hit `uniform`, `shuffled`, `real`
        (float64); `skew`, `recency`; `skew_se`, `recency_se`, the standard errors that come from
        the number of shuffles (not of documents; NaN with one); `chance`, capacity ÷ experts.

    Raises:
        StudyError: If there are fewer than two such events, if layers have not the same events, or
            an option is not known.
    """
    import pandas as pd

    if isinstance(shuffles, bool) or not isinstance(shuffles, int) or shuffles < 1:
        raise StudyError(f"shuffles must be an int of 1 or more, got {shuffles!r}.")
    if within not in (None, "domain", "run") or reset not in (None, "run"):
        raise StudyError(
            f"within must be None, 'domain' or 'run' and reset None or 'run', got {within!r} and "
            f"{reset!r}."
        )
    if phase not in EVENT_PHASES[1:]:
        raise StudyError(f"phase must be one of {', '.join(EVENT_PHASES[1:])}; got {phase!r}.")
    code = EVENT_PHASES.index(phase)
    given = None if capacities is None else numbers_of(capacities)
    orders: list[np.ndarray] = []
    runs: np.ndarray | None = None
    parts = []
    for stream in streams_of(recording, experts):
        real, _, fresh = events_of(stream, code, "exclude", reset == "run")
        if runs is None:
            runs = real.run
            if len(runs) < 2:
                raise StudyError(f"There are {len(runs)} events of phase {phase!r}: nothing to mix")
            orders = _orders(recording, runs, within, documents, shuffles, seed)
        if not np.array_equal(runs, real.run):
            raise StudyError(
                f"Layer {real.layer} has not the events that the layer before has: the recording "
                "was cut short. See moelab.routing.recovery.recover."
            )
        sizes = capacities_of(stream, given)
        rng = np.random.default_rng([seed, 1, real.layer])
        others = [_hits(real.events(order), fresh, sizes) for order in orders]
        even = [_hits(_uniform(real, int(rng.integers(2**31))), fresh, sizes) for _ in orders]
        parts.append(
            pd.DataFrame(
                {
                    "layer": real.layer,
                    "capacity": sizes,
                    "experts": real.experts,
                    "slots": int(real.slots.sum()),
                    "real": _hits(real, fresh, sizes),
                    **{f"shuffled {i}": values for i, values in enumerate(others)},
                    **{f"uniform {i}": values for i, values in enumerate(even)},
                }
            )
        )
    if not parts:
        raise StudyError("There is no layer to count.")
    return _shares(pd.concat(parts, ignore_index=True), shuffles)


def _shares(frame: pd.DataFrame, shuffles: int) -> pd.DataFrame:
    """Turns hits into shares, by layer and for all layers together."""
    import pandas as pd

    layers = frame["layer"].nunique()
    common = frame.groupby("capacity")["layer"].transform("nunique") == layers
    grouped = frame[common].groupby("capacity", as_index=False)
    summed = grouped.sum().assign(layer=ALL_LAYERS, experts=grouped["experts"].max()["experts"])
    both = pd.concat([frame, summed], ignore_index=True)
    slots = both["slots"].to_numpy()[:, None]
    mixed = both[[f"shuffled {i}" for i in range(shuffles)]].to_numpy() / slots
    even = both[[f"uniform {i}" for i in range(shuffles)]].to_numpy() / slots
    real = both["real"].to_numpy() / slots[:, 0]
    result = both[["layer", "capacity", "experts", "slots"]].astype(
        {"layer": "int16", "capacity": "int32", "experts": "int32", "slots": "int64"}
    )
    result["uniform"], result["shuffled"], result["real"] = even.mean(1), mixed.mean(1), real
    result["skew"] = result["shuffled"] - result["uniform"]
    result["recency"] = result["real"] - result["shuffled"]
    result["skew_se"] = result["recency_se"] = np.nan
    if shuffles > 1:
        result["recency_se"] = mixed.std(axis=1, ddof=1) / shuffles**0.5
        spread = mixed.var(axis=1, ddof=1) + even.var(axis=1, ddof=1)
        result["skew_se"] = np.sqrt(spread / shuffles)
    result["chance"] = result["capacity"] / result["experts"]
    return result


def _hits(played: LayerStream, fresh: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns LRU's hits in routed slots at each capacity."""
    group = np.zeros(len(fresh), np.int32)
    found = counts(played, group, fresh, 1, sizes, ("lru",))["lru"]
    hits: np.ndarray = found.total[1, 0] - found.missed[1, 0]
    return hits


def _orders(
    recording: Any, runs: np.ndarray, within: str | None, documents: Any, shuffles: int, seed: int
) -> list[np.ndarray]:
    """Draws orders of the events, the same for all layers."""
    if within == "run":
        part = runs
    elif within == "domain":
        told = documents_in(recording, documents, np.unique(runs).tolist())
        code = {domain: i for i, domain in enumerate({one.domain for one in told})}
        by_run = {one.run: code[one.domain] for one in told}
        part = np.array([by_run[run] for run in runs.tolist()])
    else:
        part = np.zeros(len(runs), np.int64)
    rng = np.random.default_rng([seed, 0])
    orders = []
    for _ in range(shuffles):
        order = np.arange(len(runs))
        for one in np.unique(part):
            places = np.flatnonzero(part == one)
            order[places] = rng.permutation(places)
        orders.append(order)
    return orders


def _uniform(played: LayerStream, seed: int) -> LayerStream:
    """Returns events of the same sizes with experts drawn without regard to anything."""
    drawn = _draw(played.start, played.experts, seed)
    return LayerStream(
        played.layer, played.experts, played.top_k, played.run, played.phase, played.start, drawn,
        played.slots, played.mass,
    )  # fmt: skip


@compiled
def _draw(start: np.ndarray, experts: int, seed: int) -> np.ndarray:
    np.random.seed(seed)  # noqa: NPY002 numba's own generator, apart from numpy's
    names = np.arange(experts).astype(np.int32)
    found = np.empty(start[-1], np.int32)
    for event in range(len(start) - 1):
        size = start[event + 1] - start[event]
        for i in range(size):
            j = i + np.random.randint(experts - i)  # noqa: NPY002
            names[i], names[j] = names[j], names[i]
        found[start[event] : start[event + 1]] = np.sort(names[:size])
    return found
