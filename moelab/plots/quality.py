"""Charts of quality against the full model: what a sweep's points cost, by memory and capacity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import StudyError
from ..quality.intervals import clustered
from .checks import require
from .cliff import cliff
from .damage import arms, damage_shares, kl_by_position, kl_quantiles
from .layers import agreement
from .scales import (
    METRICS,
    Metric,
    draw_noise_floor,
    floor_below,
    log_axis,
    plain_ticks,
    ratio_axis,
    share_axis,
    worst,
)
from .style import ACTION_STYLES, INK, MUTED, Look, axes, beside, finish, looks, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "agreement",
    "arms",
    "capacity",
    "capacity_within",
    "cliff",
    "damage_shares",
    "frontier",
    "kl_by_position",
    "kl_quantiles",
]

SETTINGS = ("policy", "pins", "kv_bits")
"""Settings beside the miss action; where several of one occur, each has its own curve."""

EXACT_CACHE = "KV full"

VARIANTS = ["-", "--", ":", "-.", (0, (6, 2)), (0, (1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "h"]

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def frontier(
    frame: pd.DataFrame,
    metric: str = "kl_mean",
    *,
    noise_floor: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws quality against total bytes, a curve an action.

    Args:
        frame: A sweep's rows, one a point and prompt: `on_miss`, `bytes`, `prompt`, `tokens` and
            the metric's column; `domain` as strata, `policy`, `pins` and `kv_bits` where there.
            The comparators `whole_2bit` and `pruned` are actions of their own.
        metric: A key of `plots.scales.METRICS`; the mean over all tokens is drawn, with the 95%
            band over documents of `quality.intervals`.
        noise_floor: What two exact runs differ by, in the metric's unit; None takes it from the
            rows of `load`.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If it mixes splits, or prompts of the metric cannot be pooled.
    """
    require(frame, numbers=["bytes"])
    step, unit = next(pair for pair in UNITS if frame["bytes"].max() >= pair[0] or pair[0] == 1)
    chart = _points(frame, metric, "bytes")
    chart["x"] = chart["bytes"] / step
    with styled():
        ax = axes(ax, 8.6, 4.4)
        _draw(ax, chart, METRICS[metric], noise_floor)
        ax.set_xlabel(f"in memory: experts, low-bit copies, trunk and KV cache, {unit}")
        ax.set_title(f"{METRICS[metric].title} against memory, by what happens on a miss")
    return finish(ax, frame, note)


def capacity(
    frame: pd.DataFrame,
    metric: str = "kl_mean",
    *,
    noise_floor: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws quality against capacity, a curve an action.

    At one capacity the actions hold different numbers of bytes: `frontier` compares them fairly.

    Args:
        frame: As for `frontier`, with `capacity` (experts a layer) in place of `bytes`.
        metric: As for `frontier`.
        noise_floor: As for `frontier`.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If it mixes splits, or prompts of the metric cannot be pooled.
    """
    require(frame, numbers=["capacity"])
    chart = _points(frame, metric, "capacity")
    chart["x"] = chart["capacity"]
    with styled():
        ax = axes(ax, 8.6, 4.4)
        _draw(ax, chart, METRICS[metric], noise_floor)
        ax.set_xticks(sorted(chart["capacity"].unique()))
        ax.set_xlabel("capacity, experts a layer in memory")
        ax.set_title(f"{METRICS[metric].title} against capacity, by what happens on a miss")
    return finish(ax, frame, note)


def capacity_within(
    frame: pd.DataFrame,
    *,
    experts: int | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws the smallest capacity that stays within each tolerance, by action.

    Args:
        frame: A row an action and tolerance: `on_miss`, `tolerance` (share by which perplexity
            may rise), `capacity` (experts a layer; NaN where no capacity that was tried will do).
        experts: Experts a layer that the model has; gives the shares.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows, or names a cell twice.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    require(frame, ["on_miss"], numbers=["tolerance"], gaps=["capacity"])
    if frame.duplicated(["on_miss", "tolerance"]).any():
        raise StudyError(
            "The frame has several rows of one on_miss and tolerance; choose one policy and pins."
        )
    actions = [str(name) for name in dict.fromkeys(frame["on_miss"])]
    tolerances = sorted(frame["tolerance"].unique())
    whole = experts or float(np.nanmax([*frame["capacity"], 1]))
    with styled():
        shades = colormaps["Blues"]
        ax = axes(ax, 1.5 * len(tolerances) + 2.2, 0.5 * len(actions) + 1.6)
        ax.grid(False)
        for row in frame.itertuples():
            x, y = tolerances.index(row.tolerance), actions.index(str(row.on_miss))
            none = bool(np.isnan(row.capacity))
            depth = 0.0 if none else 0.85 - 0.75 * float(row.capacity) / whole
            cell = Rectangle(
                (x - 0.48, y - 0.46), 0.96, 0.92, facecolor="white" if none else shades(depth),
                edgecolor=MUTED if none else "none", linestyle=":", linewidth=0.8,
            )  # fmt: skip
            ax.add_patch(cell)
            text = "none found" if none else f"{row.capacity:g}"
            if experts and not none:
                text += f"  ({row.capacity / experts:.0%})"
            ax.annotate(
                text, (x, y), ha="center", va="center", fontsize=9,
                color=MUTED if none else "white" if depth > 0.6 else INK,
            )  # fmt: skip
        ax.set(xlim=(-0.5, len(tolerances) - 0.5), ylim=(len(actions) - 0.5, -0.5))
        ax.set_xticks(range(len(tolerances)), [f"within {t:.0%}" for t in tolerances])
        ax.set_yticks(range(len(actions)), actions, color=INK)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        of = f", of {experts}" if experts else ""
        ax.set_xlabel(f"perplexity against the full model's; cells: experts a layer{of}")
        ax.set_title("Smallest capacity within a tolerance")
    return finish(ax, frame, note)


def _points(frame: pd.DataFrame, metric: str, x: str) -> pd.DataFrame:
    """Pools prompts: a row a series and x, with `action`, `series`, `mean`, `low`, `high`."""
    if metric not in METRICS:
        raise StudyError(
            f"metric must be one of {', '.join(METRICS)} (means over tokens, which prompts can be "
            f"pooled for), got {metric!r}."
        )
    chosen = METRICS[metric]
    require(frame, ["on_miss", "prompt"], numbers=[x, "tokens", chosen.source])
    if "split" in frame and frame["split"].nunique() > 1:
        raise StudyError(
            f"The frame mixes the splits {', '.join(map(str, frame['split'].unique()))}. Figures "
            "are of one split: filter the frame first."
        )
    rows = frame.reset_index(drop=True).assign(
        action=frame["on_miss"].astype(str).to_numpy()
    )  # fmt: skip
    rows["series"] = _series(rows)
    if x == "bytes" and "capacity" in rows:
        # A point is one place, also where prompts of unlike lengths have caches of unlike sizes.
        rows["bytes"] = rows.groupby(["series", "capacity"])["bytes"].transform("mean")
    points = clustered(
        rows,
        chosen.source,
        ["action", "series", x],
        cluster="prompt",
        strata="domain" if "domain" in rows else None,
        weights="tokens",
        limits=chosen.limits,
    )
    if chosen.exponential:
        points[["mean", "low", "high"]] = np.exp(points[["mean", "low", "high"]])
    return points


def _series(rows: pd.DataFrame) -> list[str]:
    """Names each row's curve: its action, and those settings of which that action has several.

    Exact runs differ by their cache's bits alone: policy and pins change their speed, not a logit.
    """
    names = rows["action"].astype(object).copy()
    for action, part in rows.groupby("action", sort=False):
        for setting in SETTINGS if action != "load" else ("kv_bits",):
            if setting in part and part[setting].nunique(dropna=False) > 1:
                told = part[setting].map(lambda value, setting=setting: _said(setting, value))
                names.loc[part.index] += ", " + told.astype(object)
    return [str(name) for name in names]


def _said(setting: str, value: Any) -> str:
    if setting == "pins":
        return "no pins" if value in ("", "none") else f"pins {value}"
    if setting == "kv_bits":
        return EXACT_CACHE if value is None or np.isnan(value) else f"KV {value:g} bits"
    return str(value)


def _styles(points: pd.DataFrame) -> dict[str, Look]:
    """A colour an action; where an action has several curves, a line and marker each."""
    actions = looks(list(dict.fromkeys(points["action"])), ACTION_STYLES)
    styles = {}
    for action, rows in points.groupby("action", sort=False):
        names = list(dict.fromkeys(rows["series"]))
        for place, name in enumerate(names):
            look = actions[str(action)]
            if len(names) > 1:
                line, marker = VARIANTS[place % len(VARIANTS)], MARKERS[place % len(MARKERS)]
                look = Look(look.colour, line, marker)
            styles[name] = look
    return styles


def _draw(ax: Axes, points: pd.DataFrame, metric: Metric, noise_floor: float | None) -> None:
    """Draws the curves with their bands, the scale and the noise floor."""
    noise = worst(points, metric) if noise_floor is None else float(noise_floor)
    shown = points[["mean", "low", "high"]].to_numpy(float)
    floor = None
    if metric.scale == "log":
        positive = shown if noise is None else np.append(shown, noise)
        floor = floor_below(positive)
    if metric.scale == "ratio":
        shown = np.exp(shown)
    mean, low, high = (np.clip(column, floor, None) for column in shown.T)
    for name, look in _styles(points).items():
        places = np.flatnonzero((points["series"] == name).to_numpy())
        places = places[np.argsort(points["x"].to_numpy()[places], kind="stable")]
        x = points["x"].to_numpy(float)[places]
        exact = name in ("load", f"load, {EXACT_CACHE}")
        label = f"{name} (exact)" if exact else name
        ax.fill_between(
            x, low[places], high[places], color=look.colour, alpha=0.14, linewidth=0
        )  # fmt: skip
        if len(places) == 1:  # a band without width
            ax.vlines(x, low[places], high[places], color=look.colour, linewidth=1.4)
        ax.plot(
            x, mean[places], color=look.colour, linestyle=look.line, marker=look.marker,
            markersize=5.5, label=label, clip_on=False,
            markerfacecolor="white" if exact else look.colour,
        )  # fmt: skip
    if floor is not None:
        log_axis(ax, high[np.isfinite(high)] if np.isfinite(high).any() else mean, floor)
        at = floor if noise == 0 else noise
    elif metric.scale == "ratio":
        ratio_axis(ax, np.concatenate([mean, low, high]))
        at = None if noise is None else float(np.exp(noise))
    else:
        at = noise
        every = np.concatenate([mean, low, high])
        every = every[np.isfinite(every)]
        if metric.scale == "share":
            share_axis(ax, every)
        elif every.max() > 8 * every.min() > 0:
            ax.set_yscale("log")
            plain_ticks(ax.yaxis, every.min() / 1.2, every.max() * 1.2)
    draw_noise_floor(ax, metric, noise, at)
    ax.set_ylabel(metric.label)
    bands = "" if np.isnan(low).all() else "\n(band: 95%, over documents)"
    beside(ax, title=f"on a miss{bands}", title_fontsize=9)
