"""Charts of routing beside what chance alone would give: balance, locality, working sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import StudyError
from .checks import require
from .style import (
    ACTION_STYLES,
    MUTED,
    axes,
    beside,
    finish,
    label_line,
    looks,
    percent,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BALANCE = {
    "cv": "coefficient of variation of expert use",
    "gini": "Gini coefficient of expert use",
    "entropy": "entropy of expert use ÷ log₂ experts",
}
LOCALITY = {
    "same_first": "tokens with the previous token's first choice",
    "any_shared": "tokens that share an expert with the one before",
    "overlap": "a token's experts that the one before chose too",
}
AGREEMENT = {
    "agreement": "experts shared with the full model",
    "overlap": "experts shared with the full model",
    "same_first": "tokens with the full model's first expert",
}
SHARES = frozenset({"gini", "entropy", *LOCALITY})


def by_layer(
    frame: pd.DataFrame,
    value: str,
    *,
    label: str,
    title: str,
    by: str | None = None,
    share: bool = False,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws a figure by layer, a curve a group, and chance where the frame has it.

    Args:
        frame: `layer`, the column `value`, and where they are there `<value>_low` and
            `<value>_high` (or `low` and `high`) for the band, and `<value>_chance` (or `chance`).
        value: The column to draw.
        label: Of the vertical axis, with the unit.
        title: Of the chart.
        by: Column that tells curves apart; None draws one.
        share: Whether the figure is a share, which is written in percent.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If it has several rows of one layer and group.
    """
    require(frame, [by] if by else [], gaps=[value], numbers=["layer"])
    low, high, chance = (
        next((name for name in (f"{value}_{end}", end) if name in frame), None)
        for end in ("low", "high", "chance")
    )
    require(frame, gaps=[name for name in (low, high, chance) if name])
    if frame.duplicated([*([by] if by else []), "layer"]).any():
        raise StudyError(
            f"The frame has several rows of one layer{f' and {by}' if by else ''}; choose one "
            "phase, domain or setting first."
        )
    layers = sorted(frame["layer"].unique())
    place = {layer: i for i, layer in enumerate(layers)}
    groups = (
        {str(k): g for k, g in frame.groupby(by, observed=True, sort=False)} if by else {"": frame}
    )
    with styled():
        ax = axes(ax, 8 if by else 7, 3.6)
        styles = looks(list(groups), ACTION_STYLES)
        for name, rows in groups.items():
            look, rows = styles[name], rows.sort_values("layer")
            x = rows["layer"].map(place)
            if low and high:
                ax.fill_between(
                    x, rows[low], rows[high], color=look.colour, alpha=0.14, linewidth=0
                )
            ax.plot(
                x, rows[value], color=look.colour, linestyle=look.line, marker=look.marker,
                markersize=5, label=name or None,
            )  # fmt: skip
        if chance:
            # Groups have unlike numbers of tokens, so chance may differ between them a little.
            expected = frame.groupby("layer")[chance].mean()
            ax.plot(
                [place[layer] for layer in expected.index], expected, color=MUTED,
                linestyle=(0, (1, 2)), linewidth=1.4, label="chance",
            )  # fmt: skip
        ax.set_xticks(range(len(layers)), [f"{layer:g}" for layer in layers])
        if len(layers) > 24:
            every = -(-len(layers) // 16)
            ax.set_xticks(range(0, len(layers), every), [f"{n:g}" for n in layers[::every]])
        bottom, top = ax.get_ylim()
        if share:
            # From 0, unless everything lies in the upper half, where differences would be lost.
            ax.set_ylim(0 if bottom < 0.5 else bottom, min(1.005, top + 0.02))
            ax.yaxis.set_major_formatter(percent())
        else:
            ax.set_ylim(bottom=min(0.0, bottom))
        ax.set_xlabel("layer")
        ax.set_ylabel(label)
        ax.set_title(title)
        if by or chance:
            beside(ax, title=by, title_fontsize=9)
    return finish(ax, frame, note)


def balance(
    frame: pd.DataFrame,
    metric: str = "entropy",
    *,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws how evenly each layer uses its experts, a curve a domain.

    Args:
        frame: As `moelab.metrics.balance` gives it, of one phase.
        metric: `"cv"`, `"gini"` or `"entropy"`.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.
    """
    return by_layer(
        frame, _known(metric, BALANCE), label=BALANCE[metric], by=_domain(frame), ax=ax, note=note,
        title="How evenly each layer uses its experts", share=metric in SHARES,
    )  # fmt: skip


def locality(
    frame: pd.DataFrame,
    metric: str = "overlap",
    *,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws how much a token's routing repeats the one before, a curve a domain.

    Args:
        frame: As `moelab.metrics` gives it, of one phase: `layer`, the metric, its `_chance`.
        metric: `"same_first"`, `"any_shared"` or `"overlap"`.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.
    """
    return by_layer(
        frame, _known(metric, LOCALITY), label=LOCALITY[metric], by=_domain(frame), ax=ax,
        note=note, title="How much routing repeats from token to token", share=True,
    )  # fmt: skip


def agreement(
    frame: pd.DataFrame,
    metric: str | None = None,
    *,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws how far a constrained run routes as the full model does, by layer, with chance.

    Args:
        frame: A comparison's `routing_agreement` (`layer`, `agreement`, `low`, `high`, `chance`),
            or `moelab.metrics`' saturation of one phase (`layer`, `overlap`, `chance`,
            `same_first`); `action` or `domain` where there are several.
        metric: `"agreement"`, `"overlap"` or `"same_first"`; None takes the first that is there.
            Chance is known of the first two.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.
    """
    there = getattr(frame, "columns", ())
    if metric is None:
        metric = "overlap" if "overlap" in there and "agreement" not in there else "agreement"
    by = next(
        (n for n in ("action", "on_miss", "domain") if n in there and frame[n].nunique() > 1), None
    )  # fmt: skip
    if metric == "same_first" and len(there):
        frame = frame.drop(columns=["chance", "low", "high"], errors="ignore")
    return by_layer(
        frame, _known(metric, AGREEMENT), label=AGREEMENT[metric], by=by, ax=ax, note=note,
        title="Routing agreement with the full model", share=True,
    )  # fmt: skip


def working_set(
    frame: pd.DataFrame,
    *,
    experts: int | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws how many distinct experts a stretch of tokens needs.

    Args:
        frame: As `moelab.metrics` gives it, of one phase: `n` (tokens), `distinct` (experts of a
            layer), `chance` (uniform routing) where it is there, `domain` and `layer` where there
            are several. The mean over layers is drawn, a curve a domain; or, of one domain, a
            curve a layer.
        experts: Experts a layer that the model has; drawn as a line.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If it has several phases.
    """
    require(frame, numbers=["n", "distinct"])
    if "phase" in frame and frame["phase"].nunique() > 1:
        raise StudyError("The frame has several phases, which are not pooled; choose one.")
    by = next(
        (n for n in ("domain", "layer") if n in frame and frame[n].nunique() > 1), None
    )  # fmt: skip
    groups = (
        {f"{by} {k}" if by == "layer" else str(k): g for k, g in frame.groupby(by, sort=False)}
        if by
        else {"routed": frame}
    )
    with styled():
        ax = axes(ax, 8, 4)
        styles = looks(list(groups))
        for name, rows in groups.items():
            mean = rows.groupby("n")["distinct"].mean()
            ax.plot(
                mean.index, mean, color=styles[name].colour, linestyle=styles[name].line,
                marker=styles[name].marker, markersize=5, label=name,
            )  # fmt: skip
        if "chance" in frame:
            chance = frame.groupby("n")["chance"].mean()
            ax.plot(
                chance.index, chance, color=MUTED, linestyle=(0, (1, 2)), linewidth=1.4,
                label="uniform routing",
            )  # fmt: skip
        if experts:
            ax.axhline(experts, color=MUTED, linewidth=0.9)
            label_line(ax, experts, f"all {experts}")
        ax.set_xscale("log", base=2)
        windows = sorted(frame["n"].unique())
        ax.set_xticks(windows, [f"{n:g}" for n in windows])
        ax.minorticks_off()
        ax.set_ylim(0, (experts or frame["distinct"].max()) * 1.1)
        ax.set_xlabel("tokens in a row")
        ax.set_ylabel("distinct experts, of a layer")
        ax.set_title("Working set: distinct experts by stretch of text")
        beside(ax, title=by, title_fontsize=9)
    return finish(ax, frame, note)


def _known(metric: str, names: dict[str, str]) -> str:
    if metric not in names:
        raise StudyError(f"metric must be one of {', '.join(names)}, got {metric!r}.")
    return metric


def _domain(frame: pd.DataFrame) -> str | None:
    several = "domain" in getattr(frame, "columns", ()) and frame["domain"].nunique() > 1
    return "domain" if several else None
