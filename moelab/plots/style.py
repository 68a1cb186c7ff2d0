"""How moelab's charts look: quiet, the same everywhere, readable in grey and when colour-blind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

INK = "#222222"
MUTED = "#767676"
GRID = "#e4e4e4"
PHASE_COLOURS = {"prefill": "#7a9cc6", "decode": "#d1495b", "padding": "#bbbbbb"}
"""One colour a phase, told apart by lightness as well."""
PHASE_MARKERS = {"prefill": "s", "decode": "o", "padding": "x"}
SEQUENCE = "viridis"
"""Colour map for amounts."""
DIVERGING = "PuOr"
"""Colour map for gains and losses: orange and violet differ for every kind of sight, and the
signs that are written on the cells tell them apart in grey."""

LAB_MODEL = "lab"
LAB_NOTE = "tiny model (29 M): shapes and methods transfer, positions and sizes do not"
"""What stands under every chart of the lab model."""


class Look(NamedTuple):
    """Colour, line and marker of a series: told apart without colour too."""

    colour: str
    line: Any
    marker: str


ACTION_STYLES = {
    "load": Look("#222222", "-", "o"),
    "low_bit": Look("#1b7f79", "-", "s"),
    "substitute": Look("#3b6fb6", "-", "^"),
    "reroute": Look("#8d6cab", "--", "v"),
    "drop": Look("#d1495b", "-", "D"),
    "wrong_slot": Look("#8a8a8a", ":", "X"),
    "whole_2bit": Look("#b07d12", "-.", "P"),
    "whole_3bit": Look("#b07d12", (0, (1, 1)), "p"),
    "pruned": Look("#6b4f3a", (0, (6, 2)), "h"),
}
"""Each action's look, and that of the comparators: the whole model at fewer bits, and without its
least used experts."""

POLICY_STYLES = {
    "lru": Look("#3b6fb6", "-", "o"),
    "lfu": Look("#1b7f79", "-", "s"),
    "lfu_da": Look("#56a3a0", "--", "s"),
    "lfru": Look("#d1495b", "-", "D"),
    "lcp": Look("#b07d12", "-.", "P"),
    "fifo": Look("#8a8a8a", "--", "X"),
    "sieve": Look("#8d6cab", "--", "v"),
    "s3_fifo": Look("#6b4f3a", "-.", "h"),
    "arc": Look("#4a4a4a", ":", "p"),
    "least_stale": Look("#c77daa", ":", "<"),
    "static": Look("#5f6f52", (0, (6, 2)), ">"),
    "best_static": Look("#5f6f52", "-.", ">"),
    "min": Look("#222222", "-", "*"),
    "min_forced": Look("#222222", (0, (4, 2)), "*"),
}
"""Each replacement policy's look; the bounds are black."""

_OTHERS = [
    Look("#3b6fb6", "-", "o"),
    Look("#d1495b", "--", "s"),
    Look("#1b7f79", "-.", "^"),
    Look("#b07d12", ":", "D"),
    Look("#8d6cab", (0, (5, 1, 1, 1)), "v"),
    Look("#6b4f3a", (0, (6, 2)), "P"),
    Look("#4a4a4a", (0, (1, 1)), "X"),
    Look("#56a3a0", (0, (3, 1)), "h"),
]

RC: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style to what is drawn inside, and to nothing else."""
    import matplotlib as mpl

    with mpl.rc_context(RC):
        yield


def axes(ax: Any, width: float, height: float) -> Any:
    """Returns `ax`, or new Axes of that size in inches."""
    import matplotlib.pyplot as plt

    if ax is not None:
        return ax
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def looks(names: list[str], known: dict[str, Look] | None = None) -> dict[str, Look]:
    """Gives each series a look of its own.

    Args:
        names: The series, in order.
        known: Looks of names that have one. Others get the next look that is not taken.
    """
    known = known or {}
    given = {name: known[name] for name in names if name in known}
    free = [look for look in _OTHERS if look.colour not in {g.colour for g in given.values()}]
    free = free or _OTHERS
    others = [name for name in names if name not in given]
    given.update({name: free[i % len(free)] for i, name in enumerate(others)})
    return {name: given[name] for name in names}


def finish(ax: Axes, frame: pd.DataFrame | None, note: str | None) -> Axes:
    """Puts the note under a chart; every function of this package ends with it.

    The rule is one for all charts. With `note=None` the lab model's charts say that it is tiny:
    those whose frame has `attrs["model"] == "lab"`. `note="lab"` puts that note under any
    chart, another text puts that text, and `""` puts none.
    """
    if note is None and frame is not None and frame.attrs.get("model") == LAB_MODEL:
        note = LAB_MODEL
    if note == LAB_MODEL:
        return lab_model_note(ax)
    if note:
        _under(ax, note)
    return ax


def lab_model_note(ax: Axes) -> Axes:
    """Says under a chart that it is of the lab model, and what does not transfer."""
    _under(ax, LAB_NOTE)
    return ax


def _under(ax: Any, text: str) -> None:
    # Below whatever stands lowest: the axis' label, or its ticks where there is no label.
    lowest = ax.xaxis.label if ax.get_xlabel() else ax.xaxis
    ax.annotate(
        text, (0, 0), xycoords=("axes fraction", lowest), xytext=(0, -5),
        textcoords="offset points", va="top", fontsize=8, style="italic", color=MUTED,
        annotation_clip=False, gid="note",
    )  # fmt: skip


def percent(decimals: int = 0) -> Any:
    """Returns a tick formatter for shares."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=decimals)


def beside(ax: Axes, **options: Any) -> None:
    """Puts the legend to the right of the chart, where it hides nothing."""
    ax.legend(
        **{
            "loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0,
            "alignment": "left", "handlelength": 3.2, "fontsize": 9, **options,
        }
    )  # fmt: skip


def above(ax: Axes, **options: Any) -> None:
    """Draws the legend in one row above the chart, at the right of its title."""
    ax.legend(
        **{
            "loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 9, "fontsize": 9,
            "borderaxespad": 0.2, "columnspacing": 1.3, "handletextpad": 0.5, **options,
        }
    )  # fmt: skip


def label_line(ax: Axes, y: float, text: str) -> None:
    """Names a horizontal line at its right end, above it."""
    ax.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(-2, 3),
        textcoords="offset points", ha="right", color=MUTED, fontsize=8.5,
    )  # fmt: skip
