"""What each policy misses on each document, so that policies can be compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import StudyError
from ..experts.policies import REPLAY_ONLY, policies
from .counts import Others
from .curves import curves
from .documents import documents_in
from .events import steps_of
from .recording import Recording
from .replay import replay
from .streams import EVENT_PHASES, WHOLE, event_phases
from .trace import read_trace

if TYPE_CHECKING:
    import pandas as pd

FROM_CURVES = ("lru", *REPLAY_ONLY)
"""Policies whose misses one pass gives; `tests/test_curves.py` shows that the replay agrees."""
SUMS = ("slots", "misses", "needed", "loads")


def policy_table(
    recording: Recording | pd.DataFrame | Any,
    policies: str | Iterable[Any] = "all",
    *,
    capacities: Iterable[int | float],
    phase: str = "decode",
    others: Others = "advance",
    reset: Literal["run"] | None = "run",
    by: Literal["layer"] | None = None,
    documents: Any = None,
    experts: Any = None,
) -> pd.DataFrame:
    """Gives the misses of each policy on each document, at each capacity.

    Every document meets the same bank under every policy, so differences between policies are
    paired by document: `moelab.quality.intervals.paired(table, "miss_ratio", "policy", ("lfru",
    "lru"), weights="slots")`. The bank is empty at first.

    MIN minimises the loads of all events that are played. Where prompts are played and not counted
    (`others="advance"`), it is a bound for all of them together, and strictly for the counted ones
    only with `others="exclude"`.

    Args:
        recording: As for `moelab.curves`, but for layers.
        policies: Names from `moelab.policies()` or policies of one's own; "all" for every policy
            but `static`, which keeps what a bank has at first, and here that is nothing.
        capacities: Slots a layer: ints count experts, floats are shares.
        phase: Events that count, see `moelab.curves`.
        others: What the other events do, see `moelab.curves`.
        reset: "run" empties the bank before each run, so that documents know nothing of each
            other; None keeps it.
        by: "layer" gives rows by layer; otherwise layers are summed.
        documents: Document and domain of each run; see `moelab.routing.trace.export_trace`. By
            default what the recording says, or the run's number.
        experts: Experts a layer, or by layer; see `moelab.curves`.

    Returns:
        A row a document, policy and capacity: `run` (int32), `document`, `domain`, with
        `by="layer"` `layer`, `policy`, `capacity` (int32), `slots`, `misses` (routed slots),
        `needed`, `loads` (distinct experts an event; int64), `miss_ratio` (float64).

    Raises:
        StudyError: If there is no such event, or no policy.
        PolicyError: If a policy is not known.
        CapacityError: If a capacity does not fit.
    """
    import pandas as pd

    chosen = _policies(policies)
    sizes = list(capacities)
    options: Any = {"phase": phase, "others": others, "reset": reset}
    quick = [name for name in chosen if isinstance(name, str) and name in FROM_CURVES]
    # Also where no policy comes from it: this checks the arguments, and says what `experts` are.
    found = curves(
        recording, capacities=sizes, by="run", bounds=quick not in ([], ["lru"]), experts=experts,
        **options,
    ).by_layer  # fmt: skip
    held = found.drop_duplicates("layer").set_index("layer")["experts"].to_dict()
    low, high = min(held.values()), max(held.values())
    if low < high and any(isinstance(size, float) for size in sizes):
        raise StudyError(
            f"Layers have from {low} to {high} experts, so that a share is another capacity in "
            "each, and they cannot be summed. Give capacities as ints."
        )
    slots = sorted({_slots(size, high) for size in sizes})
    parts = [found[found["policy"].isin(quick)]]
    slow = [policy for policy in chosen if policy not in quick]
    if slow:
        frame = _frame(recording)
        parts += [_replayed(frame, policy, slots, held, **options) for policy in slow]
    keys = ["run", "layer", "policy", "capacity"]
    table = pd.concat([part[[*keys, *SUMS]].astype({"policy": str}) for part in parts])
    # In the order in which policies were given; a layer's capacity where shares made it differ.
    if by is None:
        keys.remove("layer")
    table = table.groupby(keys, sort=False, as_index=False)[list(SUMS)].sum()
    told = documents_in(recording, documents, table["run"].unique().tolist())
    for place, name in ((1, "document"), (2, "domain")):
        table.insert(place, name, table["run"].map({d.run: getattr(d, name) for d in told}))
    order = {getattr(p, "name", p): i for i, p in enumerate(chosen)}
    table = table.sort_values(
        ["policy", "capacity", "run", *(["layer"] if by else [])],
        key=lambda c: c.map(order) if c.name == "policy" else c,
        kind="stable",
        ignore_index=True,
    )
    table["miss_ratio"] = table["misses"] / table["slots"]
    return table.astype({"run": "int32", "capacity": "int32", **dict.fromkeys(SUMS, "int64")})


def policy_summary(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Sums a policy table over documents, with intervals over them.

    Args:
        table: What `policy_table` gave.
        level: Of each interval by itself.

    Returns:
        A row a policy and capacity: `policy`, `capacity`, `miss_ratio`, `se`, `low`, `high`
        (float64; NaN with one document), `slots`, `documents` (int64).
    """
    from ..quality.intervals import clustered

    told = clustered(
        table, "miss_ratio", ["policy", "capacity"], weights="slots", level=level, limits=(0, 1)
    )
    return told.rename(columns={"mean": "miss_ratio", "tokens": "slots"})


def _policies(asked: Any) -> list[Any]:
    if isinstance(asked, str):
        asked = [asked] if asked != "all" else [n for n in policies()["name"] if n != "static"]
    chosen = list(asked)
    if not chosen:
        raise StudyError("policies is empty: name at least one, or say 'all'.")
    names = [getattr(policy, "name", policy) for policy in chosen]
    if len(set(names)) < len(names):
        raise StudyError(f"policies has one twice: {', '.join(map(str, names))}.")
    return chosen


def _frame(source: Any) -> pd.DataFrame:
    """Returns a source's routing."""
    if isinstance(source, str | Path):
        source = read_trace(source)
    frame: pd.DataFrame = source.routing if hasattr(source, "routing") else source
    return frame


def _replayed(
    frame: pd.DataFrame,
    policy: Any,
    sizes: Sequence[int],
    experts: dict[int, int],
    *,
    phase: str,
    others: str,
    reset: str | None,
) -> pd.DataFrame:
    """Replays a policy at each capacity; sums what counts by run and layer."""
    import pandas as pd

    step, steps = steps_of(frame)
    code, codes = EVENT_PHASES.index(phase), event_phases(frame, step, len(steps))
    here = (codes == code) | (codes == WHOLE) | (code == WHOLE)
    counted = steps[here].astype({name: frame[name].dtype for name in ("run", "step")})
    if others == "exclude":
        frame = frame[here[step]]
    # A bank for each run is a bank for each "layer" where every run has layers of its own.
    span = max(experts) + 1
    kind = frame["layer"].dtype
    if reset == "run":
        runs, names = pd.factorize(frame["run"])
        frame = frame.assign(layer=runs * span + frame["layer"].to_numpy().astype(np.int64))
        experts = {run * span + k: n for run in range(len(names)) for k, n in experts.items()}
    present = frame["layer"].unique().tolist()
    parts = []
    for size in sizes:
        # One expert more than there are: told the true number, a replay takes a bank of that size
        # for a stock layer, which loads nothing, and here the bank is empty at first.
        result = replay(
            frame, policy, capacity=size, experts={layer: experts[layer] + 1 for layer in present}
        )
        events = result.events.merge(counted, on=["run", "step"], how="inner")
        events = events.assign(
            layer=(events["layer"] % span).astype(kind),
            misses=events["slots"] - events["hits"],
            loads=events["missed"],
            capacity=size,
            policy=result.policy,
        )
        grouped = events.groupby(["run", "layer", "policy", "capacity"], sort=False)
        parts.append(grouped[list(SUMS)].sum().reset_index())
    return pd.concat(parts, ignore_index=True)


def _slots(size: int | float, experts: int) -> int:
    """Returns slots as `moelab.replay` counts them."""
    return int(size) if not isinstance(size, float) else math.floor(size * experts + 0.5)
