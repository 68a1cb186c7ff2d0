"""Pictures of single tokens: coloured text, and the experts of one token at every layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import StudyError
from .checks import require
from .style import INK, MUTED, SEQUENCE, axes, finish, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TEXT_SCALE = "YlGnBu"
"""From light to dark, so that text can stand on it."""
CHOSEN = "#d1495b"


def coloured_text(
    texts: Sequence[str],
    values: Any,
    *,
    label: str,
    chosen: int | None = None,
    marked: Collection[int] = (),
    width: int = 84,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws text, each token on a ground of its value's colour.

    Args:
        texts: The tokens; a line end breaks the line.
        values: A figure a token; NaN leaves it without colour.
        label: What the colour stands for, with its unit.
        chosen: The token that is framed.
        marked: Tokens that are underlined.
        width: Characters a line.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Raises:
        StudyError: If there are not as many values as texts, or none.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    figures = np.asarray(values, float)
    if len(figures) != len(texts) or not len(texts):
        raise StudyError(f"{len(texts)} texts and {len(figures)} values are no coloured text.")
    known = figures[np.isfinite(figures)]
    low, high = np.quantile(known, [0.02, 0.98]) if len(known) else (0.0, 1.0)
    scale = Normalize(float(low), float(high) if high > low else float(low) + 1)
    places = _set(texts, width)
    lines = max(line for pieces in places for line, _, _ in pieces) + 1
    with styled():
        ax = axes(ax, 0.083 * width + 0.3, 0.2 * lines + 0.8)
        for token, pieces in enumerate(places):
            value = figures[token]
            ground = (1.0, 1.0, 1.0, 1.0)
            if np.isfinite(value):
                ground = colormaps[TEXT_SCALE](0.02 + 0.86 * float(np.clip(scale(value), 0, 1)))
            dark = np.isfinite(value) and float(np.dot(ground[:3], (0.2126, 0.7152, 0.0722))) < 0.48
            for line, column, piece in pieces:
                framed = token == chosen
                cell = Rectangle(
                    (column, line), len(piece), 0.92, facecolor=ground,
                    edgecolor=CHOSEN if framed else "none", linewidth=1.8 if framed else 0,
                    zorder=3 if framed else 1,
                )  # fmt: skip
                ax.add_patch(cell)
                if token in marked:
                    ax.plot(
                        [column, column + len(piece)], [line + 0.93] * 2, color=CHOSEN, lw=2,
                        zorder=2, solid_capstyle="butt",
                    )  # fmt: skip
                for place, letter in enumerate(piece):
                    ax.text(
                        column + place + 0.5, line + 0.46, letter, ha="center", va="center",
                        family="monospace", fontsize=8.5, parse_math=False, zorder=4,
                        color="white" if dark else INK if np.isfinite(value) else MUTED,
                    )  # fmt: skip
        ax.set(xlim=(0, width), ylim=(lines, 0))
        ax.grid(False)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
        bar = ax.figure.colorbar(
            ScalarMappable(scale, _cut(colormaps[TEXT_SCALE])), ax=ax, location="top",
            shrink=0.4, anchor=(0.0, 0.0), aspect=32, pad=0.01,
        )  # fmt: skip
        bar.set_label(label, color=INK, fontsize=9, loc="left")
        bar.outline.set_visible(False)
    return finish(ax, None, note)


def token_experts(
    slots: pd.DataFrame,
    *,
    title: str = "Experts of a token",
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws the experts of one token at every layer.

    Args:
        slots: Rows of a recording's `routing` of one token: `layer`, `rank`, `expert`, `weight`,
            `hit`.
        title: Of the chart.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Returns:
        The Axes: layers down, ranks across; each cell has the expert's id, colour is the gate
        weight, a cross says that it was not in memory.

    Raises:
        SchemaError: If the frame lacks a column or has no rows.
        StudyError: If the rows are of several tokens.
    """
    require(slots, numbers=["layer", "rank", "expert", "hit"], gaps=["weight"], called="slots")
    if slots.duplicated(["layer", "rank"]).any():
        raise StudyError("The rows are of several tokens: a layer and rank stands in them twice.")
    layers = sorted(slots["layer"].unique())
    width = int(slots["rank"].max()) + 1
    weights = np.full((len(layers), width), np.nan)
    for row in slots.itertuples():
        weights[layers.index(row.layer), int(row.rank)] = row.weight
    top = float(np.nanmax(weights)) if np.isfinite(weights).any() else 1.0
    with styled():
        ax = axes(ax, 0.85 * width + 2.2, 0.3 * len(layers) + 1.4)
        image = ax.imshow(weights, aspect="auto", cmap=SEQUENCE, vmin=0, vmax=top)
        ax.grid(False)
        for row in slots.itertuples():
            y, x = layers.index(row.layer), int(row.rank)
            weight = weights[y, x]
            light = np.isnan(weight) or weight > 0.6 * top
            ax.annotate(
                f"{row.expert:g}" + ("" if row.hit else " ✗"), (x, y), ha="center", va="center",
                fontsize=8.5, color=INK if light else "white",
            )  # fmt: skip
        ax.set_xticks(range(width), [str(rank) for rank in range(width)])
        ax.set_yticks(range(len(layers)), [f"{layer:g}" for layer in layers])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("rank   (cells: expert; ✗ not in memory)")
        ax.set_ylabel("layer")
        ax.set_title(title, parse_math=False)
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
        bar.set_label("gate weight", color=INK)
        bar.outline.set_visible(False)
    return finish(ax, slots, note)


def _set(texts: Sequence[str], width: int) -> list[list[tuple[int, int, str]]]:
    """Sets tokens in lines: of each, its pieces as (line, column, text)."""
    line = column = 0
    places = []
    for text in texts:
        pieces: list[tuple[int, int, str]] = []
        for number, part in enumerate(text.split("\n")):
            if number:
                line, column = line + 1, 0
            while part:
                if column >= width or (column and column + len(part) > width and len(part) < 24):
                    line, column = line + 1, 0
                piece, part = part[: width - column], part[width - column :]
                pieces.append((line, column, piece))
                column += len(piece)
        places.append(pieces)
    return places


def _cut(colours: Any) -> Any:
    """Returns the part of the colour map that text can stand on."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(colours(np.linspace(0.02, 0.88, 128)))
