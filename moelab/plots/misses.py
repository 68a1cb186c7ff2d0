"""Charts of what a miss action costs: perplexity against the exact run, by capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .checks import require
from .scales import METRICS, draw_noise_floor
from .style import ACTION_STYLES, INK, MUTED, axes, finish, looks, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BANDS = ("#1b4f72", "#5b9bc8", "#f0d9a8", "#ffffff")
"""From safe to unsafe, from dark to light, so that they are told apart in grey as well."""

UNSAFE = "#b03a2e"
"""Text and frame of a cell that is not shown to be within any tolerance."""


def cost_by_capacity(
    summary: pd.DataFrame,
    *,
    experts: int,
    tolerances: Sequence[float] = (0.05, 0.2),
    noise_floor: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws perplexity against the exact run's, a line an action.

    Args:
        summary: A row an action and capacity: `action`, `capacity` (experts a layer), `mean`,
            `low`, `high`: nats a token that the true token is less likely than in the exact run,
            with its interval; as `quality.intervals.clustered` gives them.
        experts: Experts a layer that the model has.
        tolerances: Shares by which perplexity may rise; drawn as lines.
        noise_floor: What two exact runs differ by, nats a token; None says that it was not
            measured.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    require(summary, ["action"], numbers=("capacity", "mean"), gaps=("low", "high"))
    styles = looks([str(a) for a in summary["action"].unique()], ACTION_STYLES)
    with styled():
        ax = axes(ax, 8, 4.4)
        for tolerance in tolerances:
            ax.axhline(1 + tolerance, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
            ax.annotate(
                f"+{tolerance:.0%}", (1.005, 1 + tolerance), xycoords=("axes fraction", "data"),
                va="center", color=MUTED, fontsize=8,
            )  # fmt: skip
        ax.axhline(1, color=INK, linewidth=0.9)
        at = None if noise_floor is None else float(np.exp(noise_floor))
        for action, rows in summary.groupby("action", observed=True, sort=False):
            colour, line, marker = styles[str(action)]
            ordered = rows.sort_values("capacity")
            x = ordered["capacity"]
            ax.fill_between(
                x, np.exp(ordered["low"]), np.exp(ordered["high"]), color=colour, alpha=0.13,
                linewidth=0,
            )  # fmt: skip
            ax.plot(
                x, np.exp(ordered["mean"]), color=colour, linestyle=line, marker=marker,
                markersize=5, label=str(action),
            )  # fmt: skip
        ax.set_yscale("log")
        top = float(np.exp(summary[["mean", "high"]].max().max()))
        ticks = [t for t in (0.8, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if t < 1.3 * top]
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"×{y:g}"))
        values = sorted(summary["capacity"].unique())
        ax.set_xticks(values, [f"{c}\n{c / experts:.0%}" for c in values])
        ax.invert_xaxis()
        ax.set_xlabel(f"experts a layer in memory, of {experts}")
        ax.set_ylabel("perplexity ÷ the exact run's")
        draw_noise_floor(ax, METRICS["ln_ppl_ratio"], noise_floor, at)
        ax.set_title("Perplexity by what happens on a miss")
        ax.legend(loc="upper left", title="on a miss", alignment="left")
    return finish(ax, summary, note)


def safe_capacities(
    summary: pd.DataFrame,
    *,
    tolerances: tuple[float, float, float] = (0.01, 0.05, 0.2),
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws which action is safe at which capacity, as a table of coloured cells.

    A cell counts as within a tolerance only if its interval's upper end is.

    Args:
        summary: As for `cost_by_capacity`.
        tolerances: Ascending shares by which perplexity may rise.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.
    """
    from matplotlib.patches import Patch, Rectangle

    require(summary, ["action"], numbers=("capacity", "mean"), gaps=("low", "high"))
    actions = list(dict.fromkeys(summary["action"]))
    capacities = sorted(summary["capacity"].unique(), reverse=True)
    with styled():
        ax = axes(ax, 1.05 * len(capacities) + 2.6, 0.5 * len(actions) + 1.5)
        ax.grid(False)
        for row in summary.itertuples():
            x, y = capacities.index(row.capacity), actions.index(row.action)
            band = int(np.searchsorted(np.log1p(tolerances), row.high))
            cell = Rectangle(
                (x - 0.48, y - 0.46), 0.96, 0.92, facecolor=BANDS[band], edgecolor=UNSAFE,
                linewidth=0.9 if band == 3 else 0,
            )  # fmt: skip
            ax.add_patch(cell)
            ax.annotate(
                f"×{np.exp(row.mean):.2f}", (x, y), ha="center", va="center",
                color=("white", INK, INK, UNSAFE)[band], fontsize=9,
            )  # fmt: skip
        ax.set(xlim=(-0.5, len(capacities) - 0.5), ylim=(len(actions) - 0.5, -0.5))
        ax.set_xticks(range(len(capacities)), [str(c) for c in capacities])
        ax.set_yticks(range(len(actions)), actions, color=INK)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("experts a layer in memory; cells: perplexity ÷ the exact run's")
        ax.set_title("Which action is within which tolerance", pad=24)
        low, middle, high = (f"{t:.0%}" for t in tolerances)
        names = [f"within {low}", f"within {middle}", f"within {high}", "worse, or not shown"]
        ax.legend(
            handles=[
                Patch(facecolor=c, label=n, edgecolor=UNSAFE, linewidth=0.9 * (c == BANDS[3]))
                for c, n in zip(BANDS, names, strict=True)
            ],
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, fontsize=8, handlelength=1,
            columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip
    return finish(ax, summary, note)
