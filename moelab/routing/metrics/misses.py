"""Misses and expert use, by whatever columns one likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def miss_rates(routing: pd.DataFrame, by: Sequence[str] | str | None = ()) -> pd.DataFrame:
    """Gives misses in the three ways in which they can be counted.

    The three differ, and published figures seldom say which they mean: a rare expert that misses
    is one of many routed slots, one of few distinct experts, and may carry little weight.

    - `slots`: routed slots that missed ÷ routed slots;
    - `distinct`: distinct experts that missed ÷ distinct experts, both counted within each event
      (a step at a layer) and summed over events;
    - `mass`: gate weight of missed slots ÷ gate weight of all slots.

    Args:
        routing: A recording's `routing`.
        by: Columns to group by, such as `"layer"` or `["phase", "layer"]`; none for overall.

    Returns:
        A row a group: the group's keys; `routed`, `hits`, `misses` (slots, int64); `slots`,
        `distinct`, `mass` (shares, float64).
    """
    import pandas as pd

    keys = [by] if isinstance(by, str) else list(by or ())
    frame = routing[["run", "step", "layer", "expert", "weight", "hit", *_new(keys)]].copy()
    frame["miss"] = ~frame["hit"]
    frame["missed_weight"] = frame["weight"].where(frame["miss"], 0.0).astype("float64")
    frame["weight"] = frame["weight"].astype("float64")
    if not keys:
        frame["all"] = "all"
    group = keys or ["all"]
    slots = frame.groupby(group, observed=True).agg(
        routed=("miss", "size"),
        misses=("miss", "sum"),
        weight=("weight", "sum"),
        missed_weight=("missed_weight", "sum"),
    )
    event = list(dict.fromkeys([*group, "run", "step", "layer", "expert"]))
    distinct = frame.groupby(event, observed=True, as_index=False)["miss"].any()
    counted = distinct.groupby(group, observed=True)["miss"].agg(["size", "sum"])
    result = pd.DataFrame(
        {
            "routed": slots["routed"],
            "hits": slots["routed"] - slots["misses"],
            "misses": slots["misses"],
            "slots": slots["misses"] / slots["routed"],
            "distinct": counted["sum"] / counted["size"],
            "mass": slots["missed_weight"] / slots["weight"],
        }
    ).reset_index()
    return result if keys else result.drop(columns="all")


def expert_shares(routing: pd.DataFrame) -> pd.DataFrame:
    """Returns how often each expert was chosen in each layer.

    Args:
        routing: A recording's `routing`.

    Returns:
        Layers (rows) by experts (columns): the share of a layer's routed slots, summing to 1 in a
        row. Experts that were never chosen and lie between chosen ones are there, with 0.
    """
    counts = routing.groupby(["layer", "expert"]).size().unstack(fill_value=0)
    width = 0 if counts.empty else int(counts.columns.max()) + 1
    counts = counts.reindex(columns=range(width), fill_value=0)
    return counts.div(counts.sum(axis=1), axis=0)


def _new(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key not in ("run", "step", "layer", "expert", "weight", "hit")]
