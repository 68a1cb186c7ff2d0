"""The chart of a curve that was searched for a cliff."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .style import INK, MUTED, axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..study.cliff import Cliff

SMOOTH, BROKEN, BAND = "#3b6fb6", "#d1495b", "#f0d9a8"


def cliff(found: Cliff, *, ax: Axes | None = None) -> Axes:
    """Draws the mean curve, the best smooth fit and, of a cliff, the broken fit and its interval.

    Args:
        found: What `moelab.cliff` gave.
        ax: Where to draw; None makes new Axes.
    """
    with styled():
        ax = axes(ax, 6.4, 4.0)
        curve = found.curve
        x = curve[found.x]
        if found.breaks:
            ax.axvspan(*found.interval, color=BAND, alpha=0.6, linewidth=0,
                       label=f"{found.level:.0%} interval of the break")  # fmt: skip
            for place in found.breaks:
                ax.axvline(place, color=BROKEN, linewidth=0.9, linestyle=":")
            ax.plot(x, curve["broken"], color=BROKEN, linewidth=1.6, label="smooth and a break")
        if curve["smooth"].notna().any():
            ax.plot(x, curve["smooth"], color=SMOOTH, linewidth=1.4, linestyle="--",
                    label="best smooth curve")  # fmt: skip
        ax.plot(x, curve["mean"], color=INK, linestyle="none", marker="o", markersize=4.5,
                label=f"mean of {found.documents} documents")  # fmt: skip
        ax.set_xlabel("capacity, experts a layer" if found.x == "capacity" else found.x)
        units = {"ln_ppl_ratio": "ln perplexity ratio, nats a token", "kl_mean": "KL, nats a token"}
        ax.set_ylabel(units.get(found.y, found.y))
        title = f"Verdict: {found.verdict}"
        if found.breaks:
            title += " at " + " and ".join(f"{place:.3g}" for place in found.breaks)
        ax.set_title(title)
        ax.legend(fontsize=8, labelcolor=MUTED)
    return ax
