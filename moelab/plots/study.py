"""Charts of the study: pins, prices, policies, forecasts, locality and balance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import StudyError
from .checks import require
from .curves import NAMES
from .layers import balance, by_layer, locality, working_set
from .scales import floor_below, log_axis, plain_ticks
from .style import (
    ACTION_STYLES,
    DIVERGING,
    GRID,
    INK,
    MUTED,
    POLICY_STYLES,
    axes,
    beside,
    finish,
    looks,
    percent,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "balance",
    "by_layer",
    "forecast",
    "locality",
    "pin_transfer",
    "policies",
    "price_by_weight",
    "working_set",
]


def pin_transfer(
    frame: pd.DataFrame,
    *,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws what pins learned on one domain gain on another, against no pins at the same capacity.

    Args:
        frame: A row a pair: `train` and `test` (domains), `gain` (difference of the hit rates,
            pinned less unpinned; .01 is one hit point), and where there are intervals `low` and
            `high`.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Returns:
        The Axes: domains learned on down, domains judged on across. Every cell has its sign; a
        gain whose interval holds 0 is in brackets; pins judged on their own domain have a frame.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If a pair stands in it twice.
    """
    from matplotlib.patches import Rectangle

    require(frame, ["train", "test"], numbers=["gain"])
    bands = [name for name in ("low", "high") if name in frame]
    require(frame, gaps=bands)
    if frame.duplicated(["train", "test"]).any():
        raise StudyError(
            "The frame has several rows of one train and test domain; choose one capacity, policy "
            "and number of pins first."
        )
    rows = list(dict.fromkeys(map(str, frame["train"])))
    columns = list(dict.fromkeys(map(str, frame["test"])))
    columns = [n for n in rows if n in columns] + [n for n in columns if n not in rows]
    gains = np.full((len(rows), len(columns)), np.nan)
    unsure = np.zeros(gains.shape, bool)
    for row in frame.itertuples():
        y, x = rows.index(str(row.train)), columns.index(str(row.test))
        gains[y, x] = 100 * float(row.gain)
        if len(bands) == 2:
            unsure[y, x] = not (float(row.low) > 0 or float(row.high) < 0)
    reach = max(float(np.nanmax(np.abs(gains))), 0.1)
    with styled():
        ax = axes(ax, 0.95 * len(columns) + 2.6, 0.55 * len(rows) + 1.7)
        ax.grid(False)
        image = ax.imshow(gains, aspect="auto", cmap=DIVERGING, vmin=-reach, vmax=reach)
        for (y, x), gain in np.ndenumerate(gains):
            if np.isnan(gain):
                continue
            text = "0" if abs(gain) < 0.05 else f"{gain:+.1f}".replace("-", "−")
            ax.annotate(
                f"({text})" if unsure[y, x] else text, (x, y), ha="center", va="center",
                fontsize=9, color="white" if abs(gain) > 0.62 * reach else INK,
            )  # fmt: skip
            if rows[y] == columns[x]:
                cell = Rectangle(
                    (x - 0.48, y - 0.47), 0.96, 0.94, fill=False, edgecolor=INK, lw=1.4
                )
                ax.add_patch(cell)
        ax.set_xticks(range(len(columns)), columns, color=INK)
        ax.set_yticks(range(len(rows)), rows, color=INK)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("judged on" + ("   (in brackets: the interval holds 0)" if bands else ""))
        ax.set_ylabel("pins learned on")
        ax.set_title(f"What {_setting(frame)} in hits, against no pins")
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
        bar.set_label("hit points", color=INK)
        bar.outline.set_visible(False)
    return finish(ax, frame, note)


def _setting(frame: pd.DataFrame) -> str:
    """Says how many pins at which capacity, where the frame knows and there is one of each."""
    top, capacity = (
        frame[name].iloc[0] if name in frame and frame[name].nunique() == 1 else None
        for name in ("top", "capacity")
    )
    told = "pins gain" if top is None else f"{top:g} pins a layer gain"
    return told if capacity is None else f"{told} at capacity {capacity:g}"


def price_by_weight(
    frame: pd.DataFrame,
    model: Any = None,
    *,
    bins: int = 10,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws the price of single misses against the missed expert's gate weight.

    Args:
        frame: `Prices.frame`, a row a forced miss: `weight` (gate weight; rows without one are
            left out), `price` (KL summed to the window's end, nats), `action` where there are
            several.
        model: The fit to draw: a `PriceModel`, of whose predictions the medians of the same groups
            are drawn, or a function from gate weights to prices; None draws none.
        bins: Groups of as many misses each, of which the median is drawn.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If no miss has a weight above 0.
    """
    require(frame, numbers=["price"], gaps=["weight"])
    rows = frame[frame["weight"] > 0]
    if rows.empty:
        raise StudyError("No row has a weight above 0, so there is no logarithm to draw.")
    actions = (
        {str(k): g for k, g in rows.groupby("action", observed=True, sort=False)}
        if "action" in rows
        else {"misses": rows}
    )
    positive = rows.loc[rows["price"] > 0, "price"]
    floor = floor_below([*positive.quantile([0.01]), 0]) if len(positive) else 1e-6
    with styled():
        ax = axes(ax, 8.2, 4.4)
        styles = looks(list(actions), ACTION_STYLES)
        for name, part in actions.items():
            look = styles[name]
            price = part["price"].clip(lower=floor)
            faint = min(0.5, 120 / len(part) + 0.12)
            ax.scatter(
                part["weight"], price, s=9, color=look.colour, alpha=faint,
                linewidths=0, marker=look.marker, rasterized=len(part) > 5000,
            )  # fmt: skip
            x, y = _medians(part["weight"].to_numpy(), price.to_numpy(), bins)
            ax.plot(
                x, y, color=look.colour, linestyle=look.line, marker=look.marker, markersize=6.5,
                markeredgecolor="white", linewidth=1.8,
                label=f"{name}: medians of {len(x)} groups",
            )  # fmt: skip
        if hasattr(model, "predict"):
            mine = rows[rows["action"] == model.action] if "action" in rows else rows
            told = np.exp(np.asarray(model.predict(mine), float))
            x, y = _medians(mine["weight"].to_numpy(), np.clip(told, floor, None), bins)
            ax.plot(x, y, color=INK, linewidth=1.6, linestyle=(0, (4, 2)), label="the fit's")
        elif model is not None:
            span = np.geomspace(rows["weight"].min(), rows["weight"].max(), 60)
            fit = np.clip(np.asarray(model(span), float), floor, None)
            ax.plot(span, fit, color=INK, linewidth=1.6, linestyle=(0, (4, 2)), label="fit")
        ax.set_xscale("log")
        log_axis(ax, rows["price"], floor)
        plain_ticks(ax.xaxis, float(rows["weight"].min()), float(rows["weight"].max()))
        ax.set_xlabel("gate weight of the missed expert")
        ax.set_ylabel("price: KL to the window's end, nats")
        ax.set_title("Price of a single miss by gate weight")
        beside(ax)
    return finish(ax, frame, note)


def _medians(x: Any, y: Any, bins: int) -> tuple[list[float], list[float]]:
    """Returns the medians of groups of as many points each, by rising x."""
    order = np.argsort(x, kind="stable")
    groups = np.array_split(order, min(bins, len(order)))
    return [float(np.median(x[g])) for g in groups], [float(np.median(y[g])) for g in groups]


def policies(
    frame: pd.DataFrame,
    *,
    experts: int | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws the miss rates of policies by capacity, with intervals and the bounds.

    Args:
        frame: A row a policy and capacity: `policy`, `capacity` (experts a layer), `miss_ratio`,
            `low`, `high` (NaN where there is no interval), and `best` (bool) where it is known
            which cannot be told apart from the best. The policies `min` and `min_forced` are
            drawn as bounds.
        experts: Experts a layer that the model has; gives the shares.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If a policy and capacity stand in it twice, or there are only bounds.
    """
    require(frame, ["policy"], numbers=["capacity", "miss_ratio"], gaps=["low", "high"])
    if frame.duplicated(["policy", "capacity"]).any():
        raise StudyError("The frame has several rows of one policy and capacity; choose one split.")
    bound = frame["policy"].isin(["min", "min_forced"])
    real = frame[~bound]
    if real.empty:
        raise StudyError("The frame has bounds only and no policy.")
    names = list(real.groupby("policy", observed=True)["miss_ratio"].mean().sort_values().index)
    capacities = sorted(frame["capacity"].unique(), reverse=True)
    styles = looks([str(name) for name in names], POLICY_STYLES)
    height = len(names) + 1
    with styled():
        ax = axes(ax, 8.2, 0.19 * height * len(capacities) + 1.5)
        centres = []
        for group, capacity in enumerate(capacities):
            top = group * height
            centres.append(top + (len(names) - 1) / 2)
            if group % 2:
                ax.axhspan(top - 1, top + len(names), color=GRID, alpha=0.45, linewidth=0, zorder=0)
            for kind, line in (("min", "-"), ("min_forced", (0, (3, 2)))):
                at = frame[(frame["policy"] == kind) & (frame["capacity"] == capacity)]
                if not at.empty:
                    ax.vlines(
                        at["miss_ratio"], top - 0.6, top + len(names) - 0.4, color=INK,
                        linestyle=line, linewidth=1.3,
                        label="_" if group else NAMES[kind],
                    )  # fmt: skip
            for place, name in enumerate(names):
                at = real[(real["policy"] == name) & (real["capacity"] == capacity)]
                for row in at.itertuples():
                    look = styles[str(name)]
                    open_marker = bool(getattr(row, "best", True)) is False
                    ax.plot(
                        [row.low, row.high], [top + place] * 2, color=look.colour, linewidth=1.8
                    )  # fmt: skip
                    ax.plot(
                        [row.miss_ratio], [top + place], color=look.colour, linestyle="none",
                        marker=look.marker, markersize=6.5,
                        markerfacecolor="white" if open_marker else look.colour,
                        label=None if group else str(name),
                    )  # fmt: skip
        ax.set_ylim(len(capacities) * height - 1, -1)
        ax.set_yticks(
            centres,
            [f"{c:g}" + (f" ({c / experts:.0%})" if experts else "") for c in capacities],
            color=INK,
        )
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")
        ax.xaxis.set_major_formatter(percent())
        ax.set_xlim(left=0)
        ax.set_ylabel("capacity, experts a layer")
        ax.set_xlabel("routed experts that miss")
        ax.set_title("Misses by policy and capacity")
        told = "\n(filled: cannot be told\napart from the best)" if "best" in frame else ""
        beside(ax, title=f"policy{told}", title_fontsize=9)
    return finish(ax, frame, note)


def forecast(
    frame: pd.DataFrame,
    *,
    unit: str = "tokens/s",
    tolerance: float = 0.15,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws predicted against measured figures.

    Args:
        frame: A row a live run: `predicted`, `measured` (the same unit, above 0), `model` where
            there are several.
        unit: Of both.
        tolerance: Relative error whose band is drawn.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If a figure is not above 0.
    """
    require(frame, numbers=["predicted", "measured"])
    if (frame[["predicted", "measured"]] <= 0).any(axis=None):
        raise StudyError("predicted and measured must be above 0; a figure of 0 has no ratio.")
    groups = (
        {str(k): g for k, g in frame.groupby("model", observed=True, sort=False)}
        if "model" in frame
        else {"runs": frame}
    )
    both = frame[["predicted", "measured"]].to_numpy(float)
    low, high = both.min() / 1.3, both.max() * 1.3
    error = float(np.median(np.abs(both[:, 0] / both[:, 1] - 1)))
    with styled():
        ax = axes(ax, 6.6, 4.6)
        span = np.array([low, high])
        ax.fill_between(
            span, span * (1 - tolerance), span * (1 + tolerance), color=MUTED, alpha=0.16,
            linewidth=0, label=f"within {tolerance:.0%}",
        )  # fmt: skip
        ax.plot(span, span, color=INK, linewidth=1, label="as measured")
        styles = looks(list(groups))
        for name, rows in groups.items():
            ax.plot(
                rows["measured"], rows["predicted"], color=styles[name].colour, linestyle="none",
                marker=styles[name].marker, markersize=6, markeredgecolor="white",
                markeredgewidth=0.5, label=name,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        for axis in (ax.xaxis, ax.yaxis):
            plain_ticks(axis, low, high)
        ax.set_xlabel(f"measured, {unit}")
        ax.set_ylabel(f"predicted, {unit}")
        ax.set_title(f"Forecast against live runs: median error {error:.0%}")
        beside(ax)
    return finish(ax, frame, note)
