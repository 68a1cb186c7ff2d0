"""Charts of miss ratios by capacity: replacement policies between their bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import StudyError
from .checks import require
from .style import INK, MUTED, POLICY_STYLES, axes, beside, finish, looks, percent, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NAMES = {
    "best_static": "best fixed set, in hindsight",
    "min": "MIN, may refuse to admit (bound)",
    "min_forced": "MIN, must admit (bound)",
}
BOUNDS = ("best_static", "min_forced", "min")


def miss_ratio(
    frame: pd.DataFrame,
    *,
    layer: int | str = "all",
    experts: int | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws miss ratio against capacity, a curve a policy, with the bounds and uniform routing.

    Args:
        frame: Miss-ratio curves: `layer`, `capacity` (experts a layer), `policy`, `miss_ratio`;
            `low` and `high` where there are intervals. The policies `min` and `min_forced` are
            drawn as bounds.
        layer: Which rows: a layer, or `"all"` for those of all layers together (`"all"` or -1 in
            the frame).
        experts: Experts a layer that the model has: scales the axis, and gives the line of
            uniform routing, under which every policy that admits hits C of E. None takes the
            column `experts`, if it is there.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If it has no such layer, or several rows of one policy and capacity.
    """
    require(frame, ["layer", "policy"], numbers=["capacity", "miss_ratio"])
    bands = [name for name in ("low", "high") if name in frame]
    require(frame, gaps=bands)
    rows = _of_layer(frame, layer)
    if rows.duplicated(["policy", "capacity"]).any():
        raise StudyError(
            "The frame has several rows of one policy, capacity and layer; choose one phase, "
            "domain or recording first."
        )
    if experts is None and "experts" in rows:
        experts = int(rows["experts"].max())
    with styled():
        ax = axes(ax, 8.4, 4.2)
        policies = [str(name) for name in dict.fromkeys(rows["policy"])]
        # Bounds last: the legend goes from what a bank can reach to the lowest bound.
        policies.sort(key=lambda name: BOUNDS.index(name) if name in BOUNDS else -1)
        styles = looks(policies, POLICY_STYLES)
        width = rows["capacity"].nunique()
        if experts:
            ax.plot(
                [0, experts], [1, 0], color=MUTED, linestyle=(0, (1, 2)), linewidth=1.4,
                label="uniform routing",
            )  # fmt: skip
        for policy in policies:
            look, curve = styles[policy], rows[rows["policy"] == policy].sort_values("capacity")
            bound = policy in BOUNDS
            if len(bands) == 2:
                ax.fill_between(
                    curve["capacity"], curve["low"], curve["high"], color=look.colour, alpha=0.14,
                    linewidth=0,
                )  # fmt: skip
            # A marker at some eight places, not one an expert.
            ax.plot(
                curve["capacity"], curve["miss_ratio"], color=look.colour, linestyle=look.line,
                marker="" if bound else look.marker, markersize=5, markevery=max(width // 8, 1),
                linewidth=1.2 if bound else 1.7, label=NAMES.get(policy, policy),
            )  # fmt: skip
        _fill_out_of_reach(ax, rows)
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(percent())
        ax.set_xlim(0, experts or rows["capacity"].max())
        ax.set_ylabel("routed experts that miss")
        of = f", of {experts}" if experts else ""
        ax.set_xlabel(f"capacity, experts a layer in memory{of}")
        which = "all layers" if layer in ("all", -1) else f"layer {layer}"
        ax.set_title(f"Misses by capacity, {which}")
        beside(ax, title="policy", title_fontsize=9)
    return finish(ax, frame, note)


def _of_layer(frame: pd.DataFrame, layer: int | str) -> pd.DataFrame:
    """Returns the rows of a layer; "all" and -1 both stand for all layers together."""
    names = {str(layer), "all", "-1"} if layer in ("all", -1) else {str(layer)}
    rows = frame[frame["layer"].astype(str).isin(names)]
    if rows.empty:
        known = ", ".join(map(str, dict.fromkeys(frame["layer"])))
        raise StudyError(f"There is no layer {layer!r} in the frame, only {known}.")
    return rows


def _fill_out_of_reach(ax: Axes, rows: pd.DataFrame) -> None:
    """Shades what no policy can reach: under the lowest bound that the frame has."""
    for bound in ("min", "min_forced"):
        curve = rows[rows["policy"] == bound].sort_values("capacity")
        if not curve.empty:
            x, y = curve["capacity"].to_numpy(float), curve["miss_ratio"].to_numpy(float)
            ax.fill_between(x, np.zeros_like(y), y, color=INK, alpha=0.06, linewidth=0, zorder=0.5)
            return
