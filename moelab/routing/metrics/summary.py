"""All routing metrics of a recording at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .balance import balance, counts
from .consistency import segment_f1
from .demand import missed_mass
from .frames import Experts, frame_of
from .locality import repeats, working_set

if TYPE_CHECKING:
    import pandas as pd

_KEY = ["domain", "phase", "layer"]


def summary(routing: Any, *, n: int = 16, experts: Experts = None) -> pd.DataFrame:
    """Puts the metrics that have one figure a layer side by side, each with its chance value.

    Args:
        routing: A recording, its `routing`, or what `labelled` gives.
        n: Length of the windows of `distinct` and `srp`, in tokens.
        experts: Experts of the layers; None for what the recording says, else the highest id + 1.

    Returns:
        A row a domain, phase and layer: `tokens`, and the columns of `balance`, `repeats`,
        `working_set` (as `distinct`), `segment_f1` (`srp`) and `missed_mass` (the mean `share`, as
        `missed`; NaN where weights are not known), each followed by `…_chance`.

    Raises:
        SchemaError: If the frame is not as moelab writes it.
    """
    counted = counts(routing, experts=experts)
    result = counted[[*_KEY, "tokens"]].drop_duplicates(ignore_index=True)
    alone = result.empty
    parts = {
        "balance": balance(counted, experts) if not alone else None,
        "repeats": repeats(routing, experts=experts),
        "distinct": working_set(routing, [n], experts=experts),
        "srp": segment_f1(routing, [n], experts=experts),
    }
    if alone:
        return result
    for name, part in parts.items():
        assert part is not None
        part = part.rename(columns={"chance": f"{name}_chance"})
        part = part.drop(columns=[c for c in _ASIDE if c in part.columns])
        result = result.merge(part, on=_KEY, how="left")
    if "weight" in (frame := frame_of(routing)).columns and not frame["weight"].isna().any():
        mass = missed_mass(routing, experts=experts)
        mass = mass.groupby(_KEY, as_index=False)[["share", "chance"]].mean()
        result = result.merge(
            mass.rename(columns={"share": "missed", "chance": "missed_chance"}), on=_KEY, how="left"
        )
    return result


_ASIDE = ("pairs", "n", "windows", "m", "threshold", "size")
"""Columns that say how a figure was made."""
