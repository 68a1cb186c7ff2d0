"""Charts of a recording: which experts are used, and how often they were in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import StudyError
from .checks import require
from .style import (
    GRID,
    INK,
    MUTED,
    PHASE_COLOURS,
    PHASE_MARKERS,
    SEQUENCE,
    above,
    axes,
    finish,
    label_line,
    percent,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def expert_map(
    routing: pd.DataFrame,
    *,
    experts: int | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws how often each layer chose each expert.

    Args:
        routing: A recording's `routing`.
        experts: Experts a layer; None takes the highest id seen.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Returns:
        The Axes: layers down, experts across, colour the multiple of what uniform routing would
        give.
    """
    from ..routing.metrics import expert_shares

    require(routing, numbers=("layer", "expert"), called="routing")
    shares = expert_shares(routing)
    if experts is not None:
        shares = shares.reindex(columns=range(experts), fill_value=0.0)
    multiples = shares.to_numpy() * shares.shape[1]
    with styled():
        ax = axes(ax, 9, 0.34 * len(shares) + 1.3)
        top = max(float(np.quantile(multiples, 0.99)), 1.0)
        image = ax.imshow(multiples, aspect="auto", cmap=SEQUENCE, vmin=0, vmax=top)
        ax.grid(False)
        ax.set_yticks(range(len(shares)), [str(layer) for layer in shares.index])
        ax.set_xlabel("expert")
        ax.set_ylabel("layer")
        ax.set_title("Which experts each layer chose")
        bar = ax.figure.colorbar(image, ax=ax, pad=0.015, extend="max")
        bar.set_label("× uniform routing", color=INK)
        bar.outline.set_visible(False)
    return finish(ax, routing, note)


def hit_rate_by_layer(
    routing: pd.DataFrame,
    *,
    uniform: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws each layer's hit rate, a point a phase.

    Args:
        routing: A recording's `routing`.
        uniform: Share of the experts in memory: what uniform routing would hit; drawn as a line.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.
    """
    require(routing, ["phase"], numbers=("layer", "hit"), called="routing")
    rates = (
        routing[routing["phase"] != "padding"]
        .groupby(["phase", "layer"], observed=True)["hit"]
        .mean()
        .unstack("phase")
    )
    with styled():
        ax = axes(ax, 7, 3.2)
        if uniform is not None:
            ax.axhline(uniform, color=MUTED, linestyle="--", linewidth=1)
            label_line(ax, uniform, "uniform routing")
        for phase in rates.columns:
            ax.plot(
                range(len(rates)),
                rates[phase],
                marker=PHASE_MARKERS[str(phase)],
                color=PHASE_COLOURS[str(phase)],
                label=str(phase),
            )
        ax.set_xticks(range(len(rates)), [str(layer) for layer in rates.index])
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(percent())
        ax.set_xlabel("layer")
        ax.set_ylabel("routed slots that hit")
        ax.set_title("Hit rate by layer")
        above(ax)
    return finish(ax, routing, note)


def hit_rate_over_time(
    tokens: pd.DataFrame,
    *,
    window: int = 16,
    uniform: float | None = None,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws the hit rate of each token in the order in which they ran, and its running mean.

    The experts of a prompt's chunk are judged together, against the bank as it was before it.

    Args:
        tokens: A recording's `tokens`.
        window: Tokens in the running mean.
        uniform: Share of the experts in memory; drawn as a line.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.
    """
    require(tokens, ["phase"], numbers=("hits", "misses"), called="tokens")
    frame = tokens[tokens["phase"] != "padding"].reset_index(drop=True)
    rate = frame["hits"] / (frame["hits"] + frame["misses"])
    # Prompts and answers by themselves: a mean across the border would show a slope that is none.
    stretch = (frame["phase"] != frame["phase"].shift()).cumsum()
    with styled():
        ax = axes(ax, 9, 3.2)
        for phase in ("prefill", "decode"):
            chosen = (frame["phase"] == phase).to_numpy()
            ax.scatter(
                frame.index[chosen],
                rate[chosen],
                s=11,
                marker=PHASE_MARKERS[phase],
                alpha=0.6,
                linewidths=0,
                color=PHASE_COLOURS[phase],
                label=phase,
            )
        for number, part in rate.groupby(stretch):
            mean = part.rolling(window, min_periods=1, center=True).mean()
            label = f"mean of {window}" if number == 1 else None
            ax.plot(mean.index, mean, color=INK, linewidth=1.6, label=label)
        if uniform is not None:
            ax.axhline(uniform, color=MUTED, linestyle="--", linewidth=1, label="uniform routing")
        ax.set_ylim(0, 1)
        ax.set_xlim(-0.5, max(len(frame) - 0.5, 0.5))
        ax.yaxis.set_major_formatter(percent())
        ax.set_xlabel("token")
        ax.set_ylabel("routed slots that hit")
        ax.set_title("Hit rate over time")
        above(ax)
    return finish(ax, tokens, note)


def domain_experts(
    routing_by_domain: Mapping[str, pd.DataFrame],
    layer: int,
    *,
    experts: int,
    ax: Axes | None = None,
    note: str | None = None,
) -> Axes:
    """Draws which experts of one layer each domain uses.

    Args:
        routing_by_domain: A `routing` frame for each domain.
        layer: The layer.
        experts: Experts of that layer.
        ax: Where to draw; None makes new Axes.
        note: Text under the chart; see `plots.style.finish`.

    Returns:
        The Axes: domains down, experts across, ordered by the domain that uses each the most.
    """
    if not routing_by_domain:
        raise StudyError("routing_by_domain is empty, so there is nothing to draw.")
    for name, frame in routing_by_domain.items():
        require(frame, numbers=("layer", "expert"), called=f"routing_by_domain[{name!r}]")
        if not (frame["layer"] == layer).any():
            known = sorted(frame["layer"].unique().tolist())
            raise StudyError(f"There is no layer {layer} in the routing of {name!r}, only {known}.")
    shares = np.stack(
        [
            np.bincount(frame.loc[frame["layer"] == layer, "expert"], minlength=experts)
            / max(int((frame["layer"] == layer).sum()), 1)
            for frame in routing_by_domain.values()
        ]
    )
    owner = shares.argmax(axis=0)
    order = np.lexsort((-shares.max(axis=0), owner))
    with styled():
        ax = axes(ax, 9, 0.36 * len(shares) + 1.3)
        top = max(float(np.quantile(shares * experts, 0.99)), 1.0)
        image = ax.imshow(
            shares[:, order] * experts, aspect="auto", cmap=SEQUENCE, vmin=0, vmax=top
        )
        ax.grid(False)
        ax.set_yticks(range(len(shares)), list(routing_by_domain))
        ax.set_xticks([])
        for edge in np.flatnonzero(np.diff(owner[order])):
            ax.axvline(edge + 0.5, color=GRID, linewidth=0.8)
        ax.set_xlabel(f"the {experts} experts of layer {layer}, by the domain that uses each most")
        ax.set_title(f"Which experts each domain uses, layer {layer}")
        bar = ax.figure.colorbar(image, ax=ax, pad=0.015, extend="max")
        bar.set_label("× uniform", color=INK)
        bar.outline.set_visible(False)
    return finish(ax, next(iter(routing_by_domain.values())), note)
