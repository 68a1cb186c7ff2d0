"""The verdict on one curve: is a break left when any smooth curve is fitted, which, and where.

What is claimed when is said in `cliff`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ..quality.resampling import largest_t, resampled
from ..quality.spread import freedom, influence
from .curve import Curve
from .shapes import Design, Ramp, best, design, gap_interval, parts, predicted, slope_interval

if TYPE_CHECKING:
    import pandas as pd

FALSE_ALARMS = 0.05
"""Level of the test against all smooth curves."""
RESAMPLES = 2000
"""Draws of the largest contrast, and of documents for a step's interval."""
BREAKS = {"kink": 1, "step": 1, "ramp": 2}
"""Breaks of each kind; the first one is said where another does not predict better."""
FITS = (
    "model", "breaks", "low_break", "high_break", "error", "error_unseen", "gain_unseen", "gain_se",
)  # fmt: skip
"""Columns of `Judged.fits`."""
_FOLDS = 6


@dataclass(frozen=True)
class Judged:
    """What `judged` found, in units of x and y."""

    verdict: Literal["cliff", "no cliff"]
    p: float
    breaks: list[float]
    interval: tuple[float, float]
    model: str
    ramp: Ramp | None
    smooth: NDArray[np.float64]
    broken: NDArray[np.float64]
    fits: pd.DataFrame | None


def judged(
    curve: Curve, level: float, *, resamples: int = RESAMPLES, seed: int = 0, hasty: bool = False
) -> Judged:
    """Judges a curve of enough points and documents; see the module's text.

    Args:
        curve: The documents' values.
        level: Of the interval.
        resamples: Draws.
        seed: Of the draws and folds.
        hasty: Makes no fits where the test alone decides that there is no cliff. The verdict is
            the same.
    """
    plan = design(curve.x)
    nan = np.full(len(curve.x), np.nan)
    none = (float("nan"), float("nan"))
    # Falling curves are what the shapes are made for.
    sign = -1.0 if float((plan.t - plan.t.mean()) @ curve.mean) > 0 else 1.0
    turned = Curve(curve.x, sign * curve.values, curve.weights, curve.strata, curve.left_out)
    p = _chance(plan, turned, resamples, seed)
    if hasty and not p < FALSE_ALARMS:
        return Judged("no cliff", p, [], none, "", None, nan, nan, None)
    ramps = {kind: best(plan, turned.mean, kind) for kind in BREAKS}
    fits, gains = _fits(plan, turned, ramps, seed)
    model = "kink"
    for other in ("step", "ramp"):
        if ramps[other] is not None and (
            ramps[model] is None or _above(gains[other] - gains[model], curve.weights)
        ):
            model = other
    ramp = ramps[model]
    smooth = sign * predicted(plan, turned.mean, None)
    if ramp is None:
        return Judged("no cliff", p, [], none, model, None, smooth, nan, fits)
    broken = sign * predicted(plan, turned.mean, ramp)
    gain = float(gains[model] @ curve.weights)
    if not (p < FALSE_ALARMS and gain > 0):
        return Judged("no cliff", p, [], none, model, ramp, smooth, broken, fits)
    places, ends = _located(plan, turned, ramp, level, resamples, seed)
    first, width = curve.x[0], curve.x[-1] - curve.x[0]
    low, high = (float(first + width * min(max(end, 0.0), 1.0)) for end in ends)
    breaks = [float(first + width * place) for place in places]
    return Judged("cliff", p, breaks, (low, high), model, ramp, smooth, broken, fits)


def _chance(plan: Design, curve: Curve, resamples: int, seed: int) -> float:
    """Returns the p value of the largest contrast."""
    from scipy import stats

    if not len(plan.contrasts):
        return 1.0
    data = curve.contrasts(plan.contrasts)
    moves = influence(data)
    df = np.full(len(plan.contrasts), freedom(curve.contrasts(plan.contrasts[:1]))[0])
    # Rounding of values that do not differ between documents is no evidence.
    least = 1e-9 * float(np.abs(curve.values).max())
    se = np.sqrt((moves**2).sum(0) + least**2)
    if least == 0:
        return 1.0
    t = data.means / se
    worst = largest_t(moves, df, sides=1, resamples=resamples, seed=seed)
    top = float(stats.t.cdf(t, df).max())
    if worst is None:
        return 1 - top
    return float((1 + (worst >= top).sum()) / (1 + len(worst)))


def _fits(
    plan: Design, curve: Curve, ramps: dict[str, Ramp | None], seed: int
) -> tuple[pd.DataFrame, dict[str, NDArray[np.float64]]]:
    """Fits all models, cross-validated over documents; and each document's gain over smooth."""
    import pandas as pd

    documents = len(curve.values)
    random = np.random.default_rng(seed)
    order = np.argsort(curve.strata + random.uniform(0, 0.5, documents))
    fold = np.empty(documents, np.int64)
    fold[order] = np.arange(documents) % min(_FOLDS, documents)
    names = ("straight", "smooth", *BREAKS)
    wrong = {name: np.full(documents, np.nan) for name in names}
    share = curve.weights / curve.weights.sum()
    for number in range(fold.max() + 1):
        out = fold == number
        part = curve.weights[~out]
        mean = part @ curve.values[~out] / part.sum()
        for name in names:
            # The break is looked for anew, without the documents that it is to predict.
            ramp = ramps.get(name)
            if ramp is not None:
                ramp = best(plan, mean, name)
            fit = _fit(plan, mean, name, ramp)
            wrong[name][out] = ((curve.values[out] - fit) ** 2).mean(1)
    gains, rows = {}, []
    first, width = curve.x[0], curve.x[-1] - curve.x[0]
    mean = curve.mean
    for name in names:
        ramp = ramps.get(name)
        gains[name] = wrong["smooth"] - wrong[name]
        there = name not in ramps or ramp is not None
        fit = _fit(plan, mean, name, ramp)
        gain = float(share @ gains[name])
        rows.append(
            {
                "model": name,
                "breaks": BREAKS.get(name, 0),
                "low_break": first + width * ramp.low if ramp and ramp.kind != "kink" else np.nan,
                "high_break": first + width * ramp.high if ramp else np.nan,
                "error": float(((mean - fit) ** 2).mean()) if there else np.nan,
                "error_unseen": float(share @ wrong[name]) if there else np.nan,
                "gain_unseen": gain if there else np.nan,
                "gain_se": _se(gains[name], share) if there else np.nan,
            }
        )
    return pd.DataFrame(rows), gains


def _fit(
    plan: Design, mean: NDArray[np.float64], name: str, ramp: Ramp | None
) -> NDArray[np.float64]:
    if name == "straight":
        return np.asarray(np.polyval(np.polyfit(plan.t, mean, 1), plan.t))
    return predicted(plan, mean, ramp)


def _se(values: NDArray[np.float64], share: NDArray[np.float64]) -> float:
    off = values - share @ values
    n = len(values)
    return float(np.sqrt(((share * off) ** 2).sum() * n / (n - 1)))


def _above(gain: NDArray[np.float64], weights: NDArray[np.float64]) -> bool:
    share = weights / weights.sum()
    return bool(share @ gain > 2 * _se(gain, share))


def _located(
    plan: Design, curve: Curve, ramp: Ramp, level: float, resamples: int, seed: int
) -> tuple[list[float], tuple[float, float]]:
    from scipy import stats

    mean = curve.mean
    if ramp.kind == "step":
        w = resampled(curve.strata, resamples=resamples, seed=seed) * curve.weights
        means = w @ curve.values / w.sum(1, keepdims=True)
        smooth, _ = parts(plan, mean, ramp)
        return [(ramp.low + ramp.high) / 2], gap_interval(plan, means - smooth, level)
    df = freedom(curve.contrasts(plan.contrasts[:1]))[0]
    edge = stats.t.ppf((1 + level) / 2, df)
    least = 1e-9 * float(np.abs(curve.values).max())

    def same(contrasts: NDArray[np.float64]) -> NDArray[np.bool_]:
        data = curve.contrasts(contrasts)
        se = np.sqrt((influence(data) ** 2).sum(0) + least**2)
        return np.asarray(np.abs(data.means) <= edge * se)

    lower, place, low, high = slope_interval(plan.t, ramp, mean, same)
    breaks = [place] if ramp.kind == "kink" else [lower, place]
    return breaks, (low, high)
