"""How moelab's charts look: quiet, the same everywhere, readable in print and when colour-blind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK = "#222222"
MUTED = "#767676"
GRID = "#e4e4e4"
PHASE_COLOURS = {"prefill": "#7a9cc6", "decode": "#d1495b", "padding": "#bbbbbb"}
"""One colour a phase, told apart by lightness as well."""
SEQUENCE = "viridis"
"""Colour map for amounts."""

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
