"""Chart of a curve and whether it has a cliff."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import require
from .scales import METRICS, draw_noise_floor
from .style import INK, MUTED, axes, beside, finish, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "capacity": "capacity, experts a layer in memory",
    "bytes": "bytes in memory",
    "ln_ppl_ratio": "ln of the perplexity ratio, nats a token",
    "kl_mean": "KL(full ∥ constrained), nats a token",
    "nll": "negative log-likelihood, nats a token",
    "same_top1": "share of tokens with the full model's first choice",
}


def cliff(
    found: Any,
    *,
    title: str | None = None,
    noise_floor: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws a curve, the smooth fit, the fit with a break, and the break with its interval.

    Args:
        found: A `moelab.study.cliff.Cliff`: of its `curve` (x, `mean`, `smooth`, `broken`, and
            `low` and `high` where there are intervals), `breaks`, `interval`, `level`, `verdict`.
        title: What the curve is of, before the verdict.
        noise_floor: What two exact runs differ by, in the unit of y; None says that it was not
            measured.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        SchemaError: If the curve lacks a column or has no rows.
    """
    curve, x = found.curve, found.x
    require(curve, numbers=[x, "mean"], gaps=["smooth", "broken"], called="the cliff's curve")
    curve = curve.sort_values(x)
    at = curve[x].to_numpy(float)
    with styled():
        ax = axes(ax, 8.2, 4)
        if found.breaks:
            low, high = found.interval
            if np.isfinite([low, high]).all():
                ax.axvspan(
                    low, high, color=MUTED, alpha=0.2, linewidth=0,
                    label=f"{found.level:.0%} interval of the break",
                )  # fmt: skip
            for number, place in enumerate(found.breaks):
                ax.axvline(
                    place, color=INK, linewidth=1.3, linestyle=(0, (2, 2)),
                    label="_" if number else f"break at {_listed(found.breaks)}",
                )  # fmt: skip
        if {"low", "high"} <= set(curve.columns):
            ax.vlines(at, curve["low"], curve["high"], color=INK, linewidth=1.2)
        for name, colour, line, label in (
            ("smooth", "#3b6fb6", "-", "best smooth curve"),
            ("broken", "#d1495b", (0, (5, 2)), "best curve with a break"),
        ):
            if curve[name].notna().any():
                ax.plot(at, curve[name], color=colour, linestyle=line, label=label)
        ax.plot(
            at, curve["mean"], color=INK, linestyle="none", marker="o", markersize=5,
            label=f"mean of {found.documents} documents",
        )  # fmt: skip
        if found.y in METRICS:
            draw_noise_floor(ax, METRICS[found.y], noise_floor, None)
        ax.set_xlabel(LABELS.get(x, x))
        ax.set_ylabel(LABELS.get(found.y, found.y))
        said = found.verdict
        if found.breaks:
            said += f" at {_listed(found.breaks)}"
            if np.isfinite(found.interval).all():
                said += f" ({found.interval[0]:.4g} to {found.interval[1]:.4g})"
        ax.set_title(f"{title}: {said}" if title else said[0].upper() + said[1:])
        beside(ax)
    return finish(ax, found.curve, note)


def _listed(places: list[float]) -> str:
    return " and ".join(f"{place:.4g}" for place in places)
