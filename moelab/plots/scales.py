"""Axes of charts of quality: how each metric is shown, where zero is, and the noise floor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .style import INK, percent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Metric(NamedTuple):
    """How a metric is drawn."""

    label: str
    """Of the axis, with the unit."""
    title: str
    scale: str
    """"log" (zeros at a floor), "ratio" (a log ratio, drawn as the ratio), "share" or "plain"."""
    ideal: float | None
    """Its value where nothing is lost; None where that depends on the texts."""
    source: str
    """The column whose mean over tokens it is made from."""
    limits: tuple[float, float] | None = None
    """Outside which it cannot lie: bands are cut there."""
    exponential: bool = False
    """Whether it is e to the mean."""


METRICS = {
    "kl_mean": Metric(
        "KL(full ∥ constrained), nats a token", "KL", "log", 0.0, "kl_mean", (0.0, np.inf)
    ),
    "ln_ppl_ratio": Metric(
        "perplexity ÷ the full model's", "Perplexity", "ratio", 0.0, "ln_ppl_ratio"
    ),
    "same_top1": Metric(
        "tokens with the full model's first choice",
        "Same first choice",
        "share",
        1.0,
        "same_top1",
        (0.0, 1.0),
    ),
    "nll": Metric("negative log-likelihood, nats a token", "Log-likelihood", "plain", None, "nll"),
    "ppl": Metric("perplexity", "Perplexity", "plain", None, "nll", exponential=True),
}
"""Metrics that are means over tokens, so that prompts can be pooled. Quantiles cannot."""


def floor_below(values: Any) -> float:
    """Returns where a log axis shows zero: a third of a decade or more below what is positive."""
    array = np.asarray(values, float)
    positive = array[np.isfinite(array) & (array > 0)]
    if not len(positive):
        return 1e-6
    return float(10 ** np.floor(np.log10(positive.min() / 2)))


def log_axis(ax: Axes, values: Any, floor: float, which: str = "y") -> None:
    """Makes an axis logarithmic, with 0 written at the floor.

    Args:
        ax: The chart.
        values: What must be seen.
        floor: Where 0 is shown; see `floor_below`.
        which: `"x"` or `"y"`.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    array = np.asarray(values, float)
    top = float(np.nanmax(np.append(array, floor * 10)))
    axis = ax.yaxis if which == "y" else ax.xaxis
    ax.set(**{f"{which}scale": "log", f"{which}lim": (floor / 1.8, top * 2)})
    first, last = int(np.round(np.log10(floor))), int(np.floor(np.log10(top * 2)))
    every = max((last - first) // 6, 1)
    steps = (1, 3) if last - first < 4 else (1,)
    ticks = [floor, *(s * 10.0**n for n in range(first, last + 1, every) for s in steps)]
    ticks = [tick for tick in dict.fromkeys(ticks) if tick == floor or 2 * floor < tick < 2 * top]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda at, _: "0" if np.isclose(at, floor) else short_number(at))
    )


def ratio_axis(ax: Axes, values: Any) -> None:
    """Makes the y axis one of ratios, logarithmic where they span much."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    array = np.asarray(values, float)
    array = array[np.isfinite(array)]
    low, high = min(float(array.min()), 1.0), max(float(array.max()), 1.0)
    written = FuncFormatter(lambda y, _: f"×{y:.4g}")
    if high / low < 1.5:
        margin = max((high - low) * 0.08, 1e-4)
        ax.set_ylim(low - margin, high + margin)
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.yaxis.set_major_formatter(written)
        return
    ax.set_yscale("log")  # which sets its own ticks
    ax.yaxis.set_major_formatter(written)
    ax.set_ylim(low / 1.1, high * 1.15)
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5)
    ticks = [s * 10.0**n for n in range(-3, 7) for s in steps]
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks if low / 1.1 <= t <= high * 1.15]))
    ax.yaxis.set_minor_locator(NullLocator())


def share_axis(ax: Axes, values: Any) -> None:
    """Makes the y axis one of percent, up to 100."""
    array = np.asarray(values, float)
    low = float(np.nanmin(array))
    ax.set_ylim(max(low - 0.06 * (1 - low) - 0.005, -0.02), 1 + 0.05 * (1 - low) + 0.004)
    ax.yaxis.set_major_formatter(percent(0 if low < 0.95 else 1))


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Writes numbers at a logarithmic axis as one would by hand: 0.02, 0.05, 0.1."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    wide = high / low > 40
    steps: tuple[float, ...] = (1,) if high / low > 3000 else (1, 3) if wide else (1, 2, 5)
    if high / low < 4:
        steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [s * 10.0**n for n in powers for s in steps]
    axis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))


def draw_noise_floor(ax: Axes, metric: Metric, value: float | None, at: float | None) -> None:
    """Draws where two exact runs differ, or says in the legend that it was not measured.

    Args:
        ax: The chart, before its legend is made.
        metric: What the chart is of.
        value: The noise floor, in the metric's unit; None where it is not known.
        at: Where it lies on the axis; None for at its value.
    """
    if value is None:
        ax.plot([], [], linestyle="none", label="noise floor: not measured", gid="noise")
        return
    if metric.ideal is None:
        text = f"exact runs: {short_number(value)}"
    elif value == metric.ideal:
        text = "noise floor: none,\nexact runs are equal"
    else:
        shown = f"{value:.2%}" if metric.scale == "share" else short_number(value)
        text = f"noise floor: {shown},\nexact against exact"
    ax.axhline(
        value if at is None else at, color=INK, linewidth=1, linestyle=(0, (5, 3)), gid="noise",
        zorder=1.5, label=text,
    )  # fmt: skip


def worst(frame: pd.DataFrame, metric: Metric) -> float | None:
    """Returns how far the exact runs of a pooled frame are from the full model; None without any.

    Args:
        frame: A row a point with `series` and `mean`, as drawn. With a quantised cache a run is
            no longer the full model's.
        metric: What `mean` is of.
    """
    exact = frame.loc[frame["series"].isin(["load", "load, KV full"]), "mean"]
    if exact.empty:
        return None
    if metric.ideal is None:
        return float(exact.mean())
    return float(exact.iloc[int((exact - metric.ideal).abs().to_numpy().argmax())])


def short_number(value: float) -> str:
    """Returns a number as one writes it at an axis: `0.02`, `3`, `1,000`, `10⁻⁵`."""
    if 1e3 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    mantissa, power = f"{value:.1e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    number = mantissa.removesuffix(".0")
    return f"10{raised}" if number == "1" else f"{number}×10{raised}"
