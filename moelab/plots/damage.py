"""Charts of why a constrained run differs from the full model: which tokens, when, through what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import StudyError
from ..quality.intervals import clustered
from .checks import require
from .scales import METRICS, draw_noise_floor, floor_below, log_axis, short_number
from .style import (
    ACTION_STYLES,
    INK,
    MUTED,
    Look,
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

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
"""Those that llama.cpp's perplexity tool prints too."""


def kl_by_position(
    tokens: pd.DataFrame,
    *,
    by: str | None = None,
    bins: int = 16,
    noise_floor: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws KL against how far a token lies behind the exact prefix.

    Args:
        tokens: A comparison's `tokens`, one row a judged token: `document`, `position`, `kl`.
        by: Column that tells curves apart, such as `"on_miss"` or `"domain"`; None draws one.
        bins: Stretches of about as many tokens each, over which the mean is taken.
        noise_floor: What two exact runs differ by, nats a token; None says that it was not
            measured.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
    """
    extra = [by] if by else []
    require(tokens, ["document", *extra], numbers=["position", "kl"], called="tokens")
    keys = ["document", *extra]
    first = tokens.groupby(keys, observed=True)["position"].transform("min")
    behind = (tokens["position"] - first).to_numpy() + 1
    edges = np.unique(np.round(np.linspace(0, behind.max(), min(bins, behind.max()) + 1)))
    place = np.searchsorted(edges, behind, side="left") - 1
    centre = (edges[:-1] + 1 + edges[1:]) / 2
    frame = tokens.assign(_x=centre[place], _curve=tokens[by].astype(str) if by else "all tokens")
    strata = "domain" if "domain" in tokens and by != "domain" else None
    points = clustered(frame, "kl", ["_curve", "_x"], strata=strata, limits=(0.0, np.inf))
    floor = floor_below(np.append(points[["mean"]].to_numpy(), noise_floor or 0.0))
    with styled():
        ax = axes(ax, 8, 3.8)
        styles = looks(list(dict.fromkeys(points["_curve"])), ACTION_STYLES)
        for name, rows in points.groupby("_curve", sort=False):
            look, rows = styles[str(name)], rows.sort_values("_x")
            low, mean, high = (rows[c].clip(lower=floor) for c in ("low", "mean", "high"))
            ax.fill_between(rows["_x"], low, high, color=look.colour, alpha=0.14, linewidth=0)
            ax.plot(
                rows["_x"], mean, color=look.colour, linestyle=look.line, marker=look.marker,
                markersize=4.5, label=str(name),
            )  # fmt: skip
        log_axis(ax, points[["mean", "high"]].to_numpy(), floor)
        draw_noise_floor(
            ax, METRICS["kl_mean"], noise_floor, floor if noise_floor == 0 else noise_floor
        )
        ax.set_xlabel("tokens behind the exact prefix")
        ax.set_ylabel("KL(full ∥ constrained), nats a token")
        ax.set_title("KL by position, mean and 95% band over documents")
        beside(ax, title=by, title_fontsize=9)
    return finish(ax, tokens, note)


def kl_quantiles(
    tokens: pd.DataFrame,
    *,
    by: str | None = None,
    noise_floor: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws the distribution of KL over tokens, with the tail that a mean hides.

    Args:
        tokens: A comparison's `tokens`: `kl`.
        by: Column that tells curves apart, such as `"on_miss"` or `"domain"`; None draws one.
        noise_floor: What two exact runs differ by, nats a token; None says that it was not
            measured.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Returns:
        The Axes: across, the share of tokens with less KL, stretched towards 100%. A curve ends
        where one token is left, as far as so many tokens can say.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    require(tokens, [by] if by else [], numbers=["kl"], called="tokens")
    curves = (
        {str(k): v["kl"].to_numpy() for k, v in tokens.groupby(by, observed=True, sort=False)}
        if by
        else {"all tokens": tokens["kl"].to_numpy()}
    )
    # The scale begins below the smallest quartile that is positive, not at the smallest rounding.
    shown = [float(np.quantile(kl, q)) for kl in curves.values() for q in (0.25, *QUANTILES, 1)]
    floor = floor_below([*shown, noise_floor or 0.0])
    least = min(1 / len(kl) for kl in curves.values())
    with styled():
        ax = axes(ax, 8, 4)
        styles = looks(list(curves), ACTION_STYLES)
        for name, kl in curves.items():
            look = styles[name]
            share = 1 - np.geomspace(0.9, 1 / len(kl), 120)
            ax.plot(
                1 / (1 - share), np.clip(np.quantile(kl, share), floor, None), color=look.colour,
                linestyle=look.line,
            )  # fmt: skip
            marked = [q for q in QUANTILES if 1 - q >= 1 / len(kl)]
            ax.plot(
                [1 / (1 - q) for q in marked], np.clip(np.quantile(kl, marked), floor, None),
                color=look.colour, linestyle="none", marker=look.marker, markersize=6,
            )  # fmt: skip
            ax.plot(
                [], [], color=look.colour, linestyle=look.line, marker=look.marker, markersize=6,
                label=f"{name} (mean {kl.mean():.2g}, max {kl.max():.2g})",
            )  # fmt: skip
        log_axis(ax, [kl.max() for kl in curves.values()], floor)
        draw_noise_floor(
            ax, METRICS["kl_mean"], noise_floor, floor if noise_floor == 0 else noise_floor
        )
        ax.set_xscale("log")
        ticks = [*QUANTILES, 0.9999, 0.99999]
        kept = [q for q in ticks if 1 - q >= least * 0.99]
        ax.xaxis.set_major_locator(FixedLocator([1 / (1 - q) for q in kept]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([f"{100 * q:g}%" for q in kept])
        ax.set_xlim(1.1, 1 / least * 1.15)
        ax.set_xlabel("share of tokens with less KL")
        ax.set_ylabel("KL(full ∥ constrained), nats")
        ax.set_title("KL by quantile of tokens: how much lies in the tail")
        beside(ax, title=by, title_fontsize=9)
    return finish(ax, tokens, note)


ARMS = {
    "constrained": ("constrained, as it runs", Look("#d1495b", "-", "D")),
    "imposed": ("with the full model's routing", Look("#3b6fb6", "-", "o")),
    "own": ("each token from the full model's past", Look("#1b7f79", "-", "s")),
}
SHARES = {
    "rerouting": ("through other routing", Look("#3b6fb6", "-", "o")),
    "inherited": ("inherited from earlier tokens", Look("#1b7f79", "-", "s")),
}


def arms(
    frame: pd.DataFrame,
    *,
    noise_floor: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws KL of the constrained run and of the arms that are without part of its damage.

    Args:
        frame: A comparison's `arms` (`document`, `domain`, `arm`, `kl`: a row a judged token), of
            which each domain and all together are drawn; or what `mean_by_arm` gives (`arm`,
            `mean`, `low`, `high`), where `action` or `domain` may tell several groups apart.
        noise_floor: What two exact runs differ by, nats a token; None says that it was not
            measured.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Returns:
        The Axes: groups down, KL across, an arm a mark with its 95% interval over documents. How
        far left of the first mark another one lies is the damage that does not come from the
        misses themselves, or not from the token's own.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If an arm stands in it twice.
    """
    if "mean" in getattr(frame, "columns", ()):
        require(frame, ["arm"], numbers=["mean"], gaps=["low", "high"], called="the frame of arms")
        rows = frame.assign(_group=_groups(frame))
    else:
        called = "the frame of arms"
        require(frame, ["document", "domain", "arm"], numbers=["kl"], called=called)
        rows = _with_all(
            clustered(frame, "kl", ["domain", "arm"], limits=(0.0, np.inf)),
            clustered(frame, "kl", ["arm"], limits=(0.0, np.inf)),
        )
    floor = floor_below(np.append(rows["mean"].to_numpy(), noise_floor or 0.0))
    with styled():
        ax = _dots(ax, rows, "arm", ARMS, floor)
        log_axis(ax, rows[["mean", "high"]].to_numpy(), floor, "x")
        if noise_floor is None:
            ax.plot([], [], linestyle="none", label="noise floor: not measured", gid="noise")
        else:
            at = noise_floor if noise_floor > 0 else floor
            told = short_number(noise_floor) if noise_floor > 0 else "none,\nexact runs are equal"
            ax.axvline(
                at, color=INK, linewidth=1, linestyle=(0, (5, 3)), gid="noise",
                label=f"noise floor: {told}",
            )  # fmt: skip
        ax.set_xlabel("KL(full ∥ constrained), nats a token (95% over documents)")
        ax.set_title("What the damage comes from")
        beside(ax)
    return finish(ax, frame, note)


def damage_shares(frame: pd.DataFrame, *, ax: Axes | None = None, note: str | None = None) -> Axes:
    """Draws which share of the damage comes through other routing, and which is inherited.

    The two are two cuts through the same damage, so they are not stacked.

    Args:
        frame: As `moelab.quality.arms.shares` gives it: `domain`, `share`, `mean`, `low`, `high`;
            with `action` where there are several, of one domain each. Rows without damage (NaN)
            are left out.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If no row has a share, or one stands in it twice.
    """
    require(frame, ["domain", "share"], gaps=["mean", "low", "high"], called="the frame of shares")
    rows = frame.assign(_group=_groups(frame))
    if rows["mean"].isna().all():
        raise StudyError("No row has a share: nothing was damaged.")
    with styled():
        ax = _dots(ax, rows, "share", SHARES, None)
        ax.axvline(0, color=INK, linewidth=0.9)
        ax.xaxis.set_major_formatter(percent())
        ax.set_xlim(min(0.0, ax.get_xlim()[0]), max(1.0, ax.get_xlim()[1]))
        ax.set_xlabel("share of the summed KL (95% over documents)")
        ax.set_title("How much of the damage is not the miss itself")
        beside(ax)
    return finish(ax, frame, note)


def _groups(frame: pd.DataFrame) -> list[str]:
    """Names the group of each row: by the first column that tells several apart."""
    for name in ("action", "on_miss", "domain"):
        if name in frame and frame[name].nunique() > 1:
            return [str(value) for value in frame[name]]
    return ["all"] * len(frame)


def _with_all(points: pd.DataFrame, every: pd.DataFrame) -> pd.DataFrame:
    """Puts the rows of all domains behind those of each, unless there is one domain alone."""
    import pandas as pd

    points = points.assign(_group=points["domain"].astype(str))
    if points["domain"].nunique() == 1:
        return points
    return pd.concat([points, every.assign(_group="all")], ignore_index=True)


def _dots(
    ax: Any,
    rows: pd.DataFrame,
    column: str,
    names: dict[str, tuple[str, Look]],
    floor: float | None,
) -> Any:
    """Draws a mark with its interval for each group and value of a column."""
    if rows.duplicated(["_group", column]).any():
        raise StudyError(
            f"The frame has several rows of one {column} and group; choose one domain, capacity or "
            "action first."
        )
    groups = list(dict.fromkeys(map(str, rows["_group"])))
    values = [v for v in names if (rows[column] == v).any()]
    ax = axes(ax, 8, 0.42 * len(groups) + 1.6)
    for place, value in enumerate(values):
        told, look = names[value]
        part = rows[(rows[column] == value) & rows["mean"].notna()]
        y = np.array([groups.index(str(d)) for d in part["_group"]], float)
        y += (place - (len(values) - 1) / 2) * 0.22
        mean, low, high = (
            part[c].clip(lower=floor).to_numpy(float) for c in ("mean", "low", "high")
        )
        ax.hlines(y, low, high, color=look.colour, linewidth=1.8)
        ax.plot(
            mean, y, color=look.colour, linestyle="none", marker=look.marker, markersize=6,
            label=told,
        )  # fmt: skip
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_yticks(range(len(groups)), groups, color=INK)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    if len(groups) > 1 and groups[-1] == "all":
        ax.axhline(len(groups) - 1.5, color=MUTED, linewidth=0.8)
    return ax
