"""Tokens and experts as HTML: what the widgets show, and what they leave behind without widgets."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from .passage import shown

if TYPE_CHECKING:
    import pandas as pd

SHADES = 8
"""Steps of the colour scale: fewer than an eye tells apart."""
CHOSEN = "#d1495b"
MUTED = "#767676"
MONO = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:13px"


def palette() -> list[tuple[str, str]]:
    """Returns the background and text colours of the scale, from low to high.

    From light to dark, so that it reads in grey; the text is black or white, whichever is further
    from its ground.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = []
    for step in np.linspace(0.02, 0.88, SHADES):
        red, green, blue, _ = colormaps["YlGnBu"](step)
        light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
        scale.append((to_hex((red, green, blue)), "#000000" if light > 0.18 else "#ffffff"))
    return scale


def shades(values: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Returns each value's step of the scale, -1 for none, and the ends of the scale.

    The ends are those of nearly all values: one that stands out must not hide the rest.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return np.full(len(values), -1), (0.0, 1.0)
    low, high = (float(v) for v in np.quantile(known, [0.02, 0.98]))
    if high - low < 1e-9:
        low, high = float(known.min()), float(known.max())
    if known.min() >= 0 and known.max() <= 1:
        low, high = np.floor(low * 10) / 10, np.ceil(high * 10) / 10
    width = max(high - low, 1e-9)
    steps = np.clip((values - low) / width * SHADES, 0, SHADES - 1)
    return np.where(np.isfinite(values), steps, -1).astype(int), (float(low), float(high))


def text_html(
    texts: Sequence[str],
    steps: Sequence[int] | np.ndarray,
    *,
    titles: Sequence[str] = (),
    chosen: int | None = None,
    marked: Collection[int] = (),
) -> str:
    """Returns coloured text.

    Args:
        texts: The tokens' texts, as they were decoded; escaped here.
        steps: Each token's step of the scale, -1 for no colour.
        titles: What is shown when the pointer is over a token.
        chosen: The token that is framed.
        marked: Tokens that are underlined.
    """
    scale = palette()
    spans = []
    for place, text in enumerate(texts):
        step = int(steps[place])
        ground, ink = scale[step] if step >= 0 else ("#ffffff", MUTED)
        style = f"background:{ground};color:{ink}"
        if place in marked:
            style += f";border-bottom:3px solid {CHOSEN}"
        if place == chosen:
            style += f";outline:2px solid {CHOSEN}"
        title = f' title="{escape(titles[place], quote=True)}"' if len(titles) else ""
        ends = "\n" * text.count("\n")
        spans.append(f'<span style="{style}"{title}>{escape(shown(text))}</span>{ends}')
    return (
        f'<div style="{MONO};white-space:pre-wrap;line-height:1.75;color:#000;background:#fff;'
        f'padding:6px">{"".join(spans)}</div>'
    )


def legend_html(meaning: str, ends: tuple[float, float], *, share: bool) -> str:
    """Returns the colour scale with its ends."""
    low, high = (f"{v:.0%}" if share else f"{v:.2g}" for v in ends)
    cells = "".join(
        f'<span style="display:inline-block;width:16px;height:11px;background:{ground}"></span>'
        for ground, _ in palette()
    )
    return (
        f'<div style="font-size:12px;color:{MUTED}">{escape(meaning)}: {low} {cells} {high}</div>'
    )


def token_html(title: str, text: str, slots: pd.DataFrame, facts: str = "") -> str:
    """Returns a table of a token's experts: a row a layer, by falling weight.

    Args:
        title: Where the token stands.
        text: The token's text, as it was decoded.
        slots: Its routed slots: `layer`, `rank`, `expert`, `weight`, `hit`, and `outcome` and
            `computed` where they are there.
        facts: More on the token, as text.
    """
    head = (
        f'<div><b style="{MONO};white-space:pre;background:#eee">{escape(shown(text))}</b> '
        f'<span style="color:{MUTED}">{escape(title)}{escape(facts)}</span></div>'
    )
    if slots.empty:
        return head + "<div>No routed slots: its layers hold all of their experts.</div>"
    top = float(np.nanmax([*slots["weight"].to_numpy(float), 1e-9]))
    rows = []
    for layer, part in slots.groupby("layer", sort=True):
        cells = "".join(_slot_html(row, top) for row in part.itertuples())
        rows.append(f'<tr><th style="text-align:right;padding:0 8px">{layer}</th>{cells}</tr>')
    note = (
        "layer, then expert and gate weight; the bar is the weight; "
        "grey: in memory, red and ✗: not in memory"
    )
    return (
        f'{head}<table style="border-collapse:collapse;font-size:12px">{"".join(rows)}</table>'
        f'<div style="font-size:11px;color:{MUTED}">{note}</div>'
    )


def _slot_html(row: object, top: float) -> str:
    hit, weight = bool(getattr(row, "hit")), float(getattr(row, "weight"))  # noqa: B009
    outcome = str(getattr(row, "outcome", "hit" if hit else "miss"))
    computed, expert = getattr(row, "computed", None), getattr(row, "expert")  # noqa: B009
    told = f"expert {expert}, weight {weight:.3f}, {outcome}"
    if computed is not None and computed not in (expert, -1):
        told += f", computed by {computed}"
    share = 0 if np.isnan(weight) else round(100 * weight / top)
    colour = "#c9c9c9" if hit else "#eba4ad"
    mark = "" if hit else " ✗"
    number = "" if np.isnan(weight) else f"{weight:.2f}".lstrip("0")
    return (
        f'<td title="{escape(told, quote=True)}" style="padding:1px 5px;border:1px solid #eee;'
        f"white-space:nowrap;text-align:left;color:#000;"
        f'background:linear-gradient(90deg,{colour} {share}%,#fff {share}%)">'
        f"<b>{expert}</b> {number}{mark}</td>"
    )


def expert_html(layer: int, expert: int, found: pd.DataFrame, tokens: int, most: int = 12) -> str:
    """Returns what there is to say of an expert: how often it is chosen, and by which tokens.

    Args:
        layer: Its layer.
        expert: Its id.
        found: The tokens that chose it: `text`, `weight`, `hit`.
        tokens: Tokens that there are.
        most: Texts to show at most.
    """
    head = f"<div><b>expert {expert} of layer {layer}</b> "
    if found.empty:
        return f'{head}<span style="color:{MUTED}">no token chose it</span></div>'
    grouped = found.groupby("text")["weight"].agg(["size", "mean"])
    grouped = grouped.sort_values(["size", "mean"], ascending=False).head(most)
    rows = "".join(
        f'<tr><td style="{MONO};white-space:pre;text-align:left">{escape(shown(str(text)))}</td>'
        f'<td style="text-align:right">{row["size"]:.0f}</td>'
        f'<td style="text-align:right">{row["mean"]:.2f}</td></tr>'
        for text, row in grouped.iterrows()
    )
    return (
        f'{head}<span style="color:{MUTED}">chosen by {len(found):,} of {tokens:,} tokens '
        f"({len(found) / tokens:.1%}), in memory {found['hit'].mean():.0%} of the time, mean "
        f"weight {found['weight'].mean():.2f}</span></div>"
        '<table style="border-collapse:collapse;font-size:12px"><tr>'
        '<th style="text-align:left">token</th><th>times</th><th>weight</th></tr>'
        f"{rows}</table>"
    )


class Static:
    """HTML that shows itself in a notebook, without widgets or scripts."""

    def __init__(self, html: str) -> None:
        self.html = html

    def _repr_html_(self) -> str:
        return self.html

    def __str__(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"<Static: {len(self.html):,} characters of HTML; str() gives them>"
