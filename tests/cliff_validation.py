"""How often `moelab.cliff` claims a cliff where there is none, and how well it finds real ones.

`python -m tests.cliff_validation --out results` writes `cliff-validation.md` and
`cliff-validation.csv`: some 20,000 simulated sweeps, minutes on one core. The tests run a few.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moelab.study.curve import Curve
from moelab.study.verdict import judged

Array = NDArray[np.float64]

SMOOTH: dict[str, Callable[[Array], Array]] = {
    "flat": lambda x: 0 * x,
    "straight": lambda x: 1 - x / 64,
    "exp(−x/12)": lambda x: np.exp(-x / 12),
    "1/x": lambda x: 4 / x,
    "(1 − x/64)²": lambda x: (1 - x / 64) ** 2,
    "bends down": lambda x: 1 - (x / 64) ** 2,
    "S over half the range": lambda x: 1 / (1 + np.exp((x - 36) / (28 / 4.394))),
}
MAIN = ("flat", "straight", "exp(−x/12)", "1/x")
"""Shapes that are run with each noise; the others with even noise."""

CLIFFS: dict[str, Callable[[Array, float], Array]] = {
    "step": lambda x, b: 0.5 * (x < b) + 0.2 * (1 - x / 64),
    "step on exp(−x/12)": lambda x, b: 0.5 * (x < b) + 0.3 * np.exp(-x / 12),
    "kink": lambda x, b: np.maximum(b - x, 0) / b,
    "kink on exp(−x/12)": lambda x, b: 0.7 * np.maximum(b - x, 0) / b + 0.3 * np.exp(-x / 12),
    "ramp of 12": lambda x, b: np.clip((b - x) / 12, 0, 1),
    "ramp of 20": lambda x, b: np.clip((b - x) / 20, 0, 1),
}
SPREADS = {
    "step": (0.05, 0.1, 0.2, 0.3),
    "step on exp(−x/12)": (0.05, 0.1, 0.2, 0.3),
    "kink": (0.0125, 0.025, 0.05, 0.1),
    "kink on exp(−x/12)": (0.0125, 0.025, 0.05),
    "ramp of 12": (0.05, 0.1, 0.2),
    "ramp of 20": (0.05, 0.1, 0.2),
}
"""Standard deviations of a document at a point, where the curve falls by about 1."""

NOISES: dict[str, Callable[[np.random.Generator, int, Array], Array]] = {
    "even": lambda rng, n, x: rng.normal(size=(n, len(x))),
    "heteroscedastic": lambda rng, n, x: rng.normal(size=(n, len(x))) * (0.2 + 2 * np.exp(-x / 12)),
    "correlated": lambda rng, n, x: (
        0.5 * rng.normal(size=(n, len(x)))
        + rng.normal(size=(n, 1))
        + rng.normal(size=(n, 1)) * (1 - x / 64)
    ),
    "skewed": lambda rng, n, x: np.exp(rng.normal(size=(n, len(x)))) - np.exp(0.5),
}
"""Even; larger at few experts; a level and a slope of each document's own; lognormal."""


def capacities(rng: np.random.Generator, least: int = 6) -> Array:
    """Draws 6 to 12 capacities of 64, ascending: with even gaps, or any."""
    points = int(rng.integers(least, 13))
    if rng.uniform() < 0.5:
        return np.linspace(8, 64, points)
    between = rng.choice(np.arange(10, 63, 2), points - 2, replace=False)
    return np.array([8, *np.sort(between), 64], dtype=np.float64)


def sweep(rng: np.random.Generator, x: Array, truth: Array, noise: str, spread: float) -> Curve:
    """Simulates documents, 8 to 36 in one to six domains, of unlike lengths."""
    documents = int(rng.integers(8, 37))
    values = truth + spread * NOISES[noise](rng, documents, x)
    tokens = rng.integers(64, 257, documents).astype(np.float64)
    strata = np.arange(documents) % int(rng.integers(1, min(6, documents // 3) + 1))
    return Curve(x, values, tokens, strata, 0)


def false_alarms(
    each: int, seed: int = 0, shapes: tuple[str, ...] = tuple(SMOOTH), spread: float = 0.2
) -> pd.DataFrame:
    """Counts cliffs that are claimed of smooth curves: a row a shape and noise."""
    rows = []
    for number, shape in enumerate(shapes):
        for noise in NOISES if shape in MAIN else ("even",):
            rng = np.random.default_rng([seed, number, list(NOISES).index(noise)])
            claimed = 0
            for one in range(each):
                x = capacities(rng)
                curve = sweep(rng, x, SMOOTH[shape](x), noise, spread)
                claimed += judged(curve, 0.9, seed=one, hasty=True).verdict == "cliff"
            low, high = wilson(claimed, each)
            rows.append((shape, noise, spread, each, claimed, claimed / each, low, high))
    names = ["shape", "noise", "spread", "simulations", "claimed", "share", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def found(
    each: int, seed: int = 1, kinds: tuple[str, ...] = tuple(CLIFFS), noise: str = "even"
) -> pd.DataFrame:
    """Looks for real cliffs: a row a kind and spread, with power and the interval's coverage."""
    rows = []
    for number, kind in enumerate(kinds):
        for spread in SPREADS[kind]:
            rng = np.random.default_rng([seed, number, round(1e4 * spread)])
            inside, widths, gaps, right = [], [], [], 0
            for one in range(each):
                # Points enough on both sides: elsewhere nothing can be seen, and is not claimed.
                points = int(rng.integers(8, 13))
                x = np.linspace(8, 64, points)
                place = float(rng.uniform(24, 46))
                curve = sweep(rng, x, CLIFFS[kind](x, place), noise, spread)
                got = judged(curve, 0.9, seed=one, hasty=True)
                if got.verdict == "cliff":
                    low, high = got.interval
                    inside.append(low <= place <= high)
                    widths.append(high - low)
                    gaps.append((high - low) / (x[1] - x[0]))
                    right += got.ramp is not None and got.ramp.kind == kind.split()[0]
            claimed = len(inside)
            low, high = wilson(sum(inside), claimed)
            share = sum(inside) / claimed if claimed else float("nan")
            rows.append(
                (kind, noise, spread, each, claimed, claimed / each, right / max(claimed, 1),
                 sum(inside), share, low, high, float(np.median(widths or [np.nan])),
                 float(np.median(gaps or [np.nan])))
            )  # fmt: skip
    names = [
        "kind", "noise", "spread", "simulations", "claimed", "power", "kind_right", "covered",
        "coverage", "low", "high", "width", "gaps",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Gives Wilson's 95% interval of a share."""
    if not of:
        return float("nan"), float("nan")
    share = hits / of
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    reach = z * np.sqrt(share * (1 - share) / of + z**2 / (4 * of**2)) / (1 + z**2 / of)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def page(alarms: pd.DataFrame, real: pd.DataFrame, seconds: float) -> str:
    """Writes the page."""
    lines = [
        "# How far `moelab.cliff` can be believed",
        "",
        "Simulated sweeps: 8 to 36 documents of 64 to 256 tokens in one to six domains. Smooth "
        "curves have 6 to 12 capacities from 8 to 64, half of them with uneven gaps; real cliffs "
        "8 to 12 with even gaps and the break anywhere between 24 and 46. Curves fall by about 1; "
        "the spread is a document's standard deviation at a point, which the kind of noise scales.",
        "",
        "Command: `python -m tests.cliff_validation --out results` "
        f"({seconds:.0f} s of processor time here; numbers in `cliff-validation.csv`).",
        "",
        "## False alarms: cliffs claimed of smooth curves",
        "",
        f"To be under 5% for each. Worst: {alarms['share'].max():.1%}; all together "
        f"{alarms['claimed'].sum()} of {alarms['simulations'].sum()}.",
        "",
        "| curve | noise | simulations | claimed | share | 95% interval |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.shape} | {r.noise} | {r.simulations} | {r.claimed} | {r.share:.1%} | "
        f"{r.low:.1%} to {r.high:.1%} |"
        for r in alarms.itertuples()
    ]
    lines += [
        "",
        "## Real cliffs: how often they are found, and whether the 90% interval holds the break",
        "",
        "Coverage is of the cliffs that were claimed, since no others get an interval. A gap is "
        "the distance between two tested capacities. For kinks and steps the interval is what it "
        "says. A step lies between two tested capacities, and the data cannot say where: its "
        "interval is at least the middle 90% of that gap. For ramps (two breaks; the interval is "
        "for the upper one) it is not: a ramp hardly wider than a gap is taken for a step, and the "
        "interval then lies beside its upper end.",
        "",
        "| cliff | spread | simulations | found | right kind | coverage | 95% interval of it | "
        "median width, gaps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.kind} | {r.spread:g} | {r.simulations} | {r.power:.0%} | {r.kind_right:.0%} | "
        f"{r.coverage:.1%} | {r.low:.1%} to {r.high:.1%} | {r.gaps:.2f} |"
        for r in real.itertuples()
    ]
    for kind in real["kind"].unique():
        some = real[real["kind"] == kind]
        share = some["covered"].sum() / max(some["claimed"].sum(), 1)
        low, high = wilson(int(some["covered"].sum()), int(some["claimed"].sum()))
        lines.append(
            f"{'' if kind != real['kind'].iloc[0] else chr(10)}- {kind}, all spreads: coverage "
            f"{share:.1%} ({low:.1%} to {high:.1%}) of {some['claimed'].sum()} claims."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the whole study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the page and numbers")
    parser.add_argument("--nulls", type=int, default=1000, help="simulations a smooth curve")
    parser.add_argument("--cliffs", type=int, default=250, help="simulations a real cliff")
    given = parser.parse_args()
    began = time.process_time()
    alarms = false_alarms(given.nulls)
    real = found(given.cliffs)
    seconds = time.process_time() - began
    given.out.mkdir(parents=True, exist_ok=True)
    both = pd.concat([alarms.assign(part="smooth"), real.assign(part="cliff")])
    both.to_csv(given.out / "cliff-validation.csv", index=False, float_format="%.6g")
    (given.out / "cliff-validation.md").write_text(page(alarms, real, seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
