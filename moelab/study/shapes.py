"""Smooth curves, breaks, and what tells one from the other.

A curve over tested capacities x is *smooth* here if it is a sum, with weights from 0 on, of

- a constant (of either sign) and a straight fall,
- falls that bend upward, and ever less so to the right: (b − x)₊² for any b. These make up every
  curve that falls, is convex, and whose slope is concave: straight lines, exp(−x/τ), 1/x, any
  falling power, (E − x)^p with p ≥ 2, and all sums of them;
- their mirror images, falls that bend downward: −(x − b)₊²;
- S-shaped falls 1/(1 + exp((x − b)/w)) that take at least half of the tested range from 90% to
  10% of their height: w = range/2/4.39.

A *break* is a ramp between two places, r(x) = clip((b₂ − x)/(b₂ − b₁), 0, 1), times a height above
0: a *kink* (b₁ at or below the lowest capacity: straight up from b₂ on), a *step* (b₁ and b₂
tested capacities side by side) or, with two breaks, a ramp with level ground on both sides.

Smooth curves form a convex cone N. Let v = r − P_N(r) be what is left of a ramp when the smooth
curve next to it is taken away. By the projection theorem ⟨v, f⟩ ≤ 0 for **every** smooth f, so a
mean curve m with ⟨v, m⟩ > 0 is not smooth, whatever smooth curve one had in mind: no family of
curves is fitted, and none can be too poor. Where the break is, is another question: the one with
which a smooth curve fits best, by least squares.

Rising curves are turned over first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WIDEST = 0.5
"""Share of the tested range over which an S-shaped fall counts as smooth, from 90% to 10%."""
_TEN_TO_NINETY = 2 * np.log(9)
_DIM = 0.05
"""A ramp of which smooth curves explain all but this share cannot be told from them."""
_TESTED, _LOOKED_AT = 6, 24
"""Places of a kink between two tested capacities that are tested, and among which one is found."""
_FITTED = {"kink": 5, "step": 3, "ramp": 5}
"""Candidates of each kind that are fitted: those that the rest of the smooth fit shows most."""


@dataclass(frozen=True)
class Ramp:
    """A candidate for a break; places run from 0 at the lowest x to 1 at the highest."""

    kind: str
    """kink, step or ramp."""
    low: float
    high: float

    def at(self, t: Array) -> Array:
        """Returns its values, from 1 on the left to 0 on the right."""
        if self.kind == "step":
            return np.asarray(t < self.high - 1e-12, dtype=np.float64)
        return np.clip((self.high - t) / (self.high - self.low), 0.0, 1.0)


@dataclass(frozen=True)
class Design:
    """What there is to know about a set of tested x before any y is seen.

    Attributes:
        t: The x, scaled to 0 … 1, (points,).
        smooth: Generators of the smooth curves, all with weights from 0 on, (points, generators).
        ramps: The candidates for a break.
        shapes: Their values, (ramps, points).
        contrasts: v/‖v‖ of each, (ramps, points).
        norms: ‖v‖ of each, (ramps,).
    """

    t: Array
    smooth: Array
    ramps: tuple[Ramp, ...]
    shapes: Array
    contrasts: Array
    norms: Array


def design(x: Array) -> Design:
    """Prepares the contrasts for tested x, ascending, at least four; made once for each set."""
    t = (x - x[0]) / (x[-1] - x[0])
    return _design(tuple(np.round(t, 12).tolist()))


@lru_cache(maxsize=64)
def _design(places: tuple[float, ...]) -> Design:
    t = np.array(places)
    smooth = smooth_basis(t)
    ramps, contrasts, norms = [], [], []
    for ramp in _candidates(t):
        shape = ramp.at(t)
        rest = shape - smooth @ weights(smooth, shape)
        norm = np.linalg.norm(rest)
        if norm > _DIM * np.linalg.norm(shape - shape.mean()):
            ramps.append(ramp)
            contrasts.append(rest / norm)
            norms.append(norm)
    shapes = np.array([ramp.at(t) for ramp in ramps]).reshape(-1, len(t))
    return Design(
        t, smooth, tuple(ramps), shapes, np.array(contrasts).reshape(-1, len(t)), np.array(norms)
    )  # fmt: skip


def smooth_basis(t: Array) -> Array:
    """Gives curves of which every smooth one is a sum with weights from 0 on: (points, curves)."""
    bending = _convex(t)
    mirrored = -_convex(-t[::-1])[::-1]
    middle = np.linspace(-0.25, 1.25, 31)
    width = WIDEST / _TEN_TO_NINETY
    sigmoid = 1 / (1 + np.exp((t[:, None] - middle) / width))
    falls = np.concatenate([bending, mirrored, sigmoid], axis=1)
    falls = falls / np.abs(falls).max(0)
    ones = np.ones((len(t), 1))
    return np.concatenate([ones, -ones, falls], axis=1)


def weights(basis: Array, y: Array) -> Array:
    """Least squares with weights from 0 on."""
    from scipy.optimize import nnls

    return np.asarray(nnls(basis, y, maxiter=50 * basis.shape[1])[0])


def _convex(t: Array) -> Array:
    """Generators of the sequences whose divided differences have the signs of such a curve's.

    First ones below 0, second ones above, third ones below: a cone with as many generators as
    there are such conditions, the columns of the inverse. It holds every sampled (b − x)₊² and so
    all of their sums, exactly.
    """
    points = len(t)
    rows = [-_divided(t, range(i, i + 4)) for i in range(points - 3)]
    rows += [_divided(t, range(points - 3, points)), -_divided(t, range(points - 2, points))]
    rows.append(np.eye(points)[-1])
    return np.asarray(np.linalg.inv(np.array(rows))[:, :-1])


def _divided(t: Array, places: range) -> Array:
    out = np.zeros(len(t))
    for i in places:
        out[i] = 1 / np.prod([t[i] - t[j] for j in places if j != i])
    return out


def _candidates(t: Array) -> list[Ramp]:
    inner = range(1, len(t) - 1)
    kinks = [t[i] + (t[i + 1] - t[i]) * k / _TESTED for i in inner for k in range(_TESTED)]
    out = [Ramp("kink", 0.0, float(b)) for b in kinks]
    # A step beside the first or last point is one point apart from a smooth curve: no evidence.
    out += [Ramp("step", float(t[i]), float(t[i + 1])) for i in inner if i + 1 in inner]
    out += [
        Ramp("ramp", float(t[i]), float(t[j])) for i in inner for j in inner if j >= i + 2
    ]  # fmt: skip
    return out


def predicted(plan: Design, mean: Array, ramp: Ramp | None) -> Array:
    """Fits a smooth curve, with a ramp of height from 0 on if one is given: (points,)."""
    smooth, height = parts(plan, mean, ramp)
    return smooth if ramp is None else smooth + height * ramp.at(plan.t)


def parts(plan: Design, mean: Array, ramp: Ramp | None) -> tuple[Array, float]:
    """Fits as `predicted`, and gives the smooth part, (points,), and the height of the ramp."""
    basis = plan.smooth
    if ramp is None:
        return np.asarray(basis @ weights(basis, mean)), 0.0
    found = weights(np.concatenate([basis, ramp.at(plan.t)[:, None]], axis=1), mean)
    return np.asarray(basis @ found[:-1]), float(found[-1])


def best(plan: Design, mean: Array, kind: str) -> Ramp | None:
    """Finds the break of a kind with which a smooth curve fits best, by least squares.

    Returns:
        The break; None if no candidate is left over when the smooth curve is fitted.
    """
    rest = mean - predicted(plan, mean, None)
    score = plan.shapes @ rest / plan.norms
    least = 1e-9 * float(np.abs(mean).max())
    order = [p for p in np.argsort(-score) if plan.ramps[p].kind == kind and score[p] > least]
    tried = [plan.ramps[p] for p in order[: _FITTED[kind]]]
    if not tried:
        return None

    def wrong(ramp: Ramp) -> float:
        return float(((mean - predicted(plan, mean, ramp)) ** 2).sum())

    found = min(tried, key=wrong)
    if found.kind == "kink":
        gap = float(np.diff(plan.t)[int((plan.t <= found.high + 1e-12).sum()) - 1])
        reach = _LOOKED_AT // _TESTED
        moves = gap / _LOOKED_AT * np.arange(1 - reach, reach)
        found = min((Ramp("kink", 0.0, float(found.high + move)) for move in moves), key=wrong)
    return found


def slope_interval(
    t: Array, ramp: Ramp, mean: Array, test: Any, *, places: int = 800
) -> tuple[float, float, float, float]:
    """Gives the place of a kink, or of a ramp's upper end, with its interval.

    The model is a straight line, an exponential and the kink; for a ramp, a straight line and both
    ends. The exponential's rate, or the lower end, may be any that the data do not refuse.
    A place is in the interval if the contrast that would move the kink from there is not different
    from 0; the interval is the stretch of such places around the one that fits best. The contrast
    has mean 0 at the true place, so a t-test of it over documents needs no large numbers.

    Args:
        t: Scaled x, (points,).
        ramp: What was found.
        mean: The mean curve, (points,).
        test: Takes contrasts (places, points), gives True where one is not different from 0.
        places: Places tried.

    Returns:
        The ramp's lower end (for a kink, its candidate's), best place, low and high.
    """
    line = np.stack([np.ones_like(t), t], axis=1)
    edges = np.linspace(t[0], t[-1], places + 2)[1:-1]
    step = edges[1] - edges[0]
    kinks = np.maximum(edges[:, None] - t, 0)
    tried = []
    for low, extra, nuisance in _beside(t, ramp):
        base, _ = np.linalg.qr(np.concatenate([line, extra], axis=1))
        flat = kinks - (kinks @ base) @ base.T
        norm = np.linalg.norm(flat, axis=1)
        unit = flat / np.maximum(norm, 1e-12)[:, None]
        # Only a kink that falls: its height must be from 0 on. And above a ramp's lower end.
        fits = (norm > 1e-6) & (edges > low)
        gain = np.where(fits, np.maximum(unit @ mean, 0) ** 2, 0.0)
        loss = float(((mean - base @ (base.T @ mean)) ** 2).sum() - gain.max())
        tried.append((loss, low, base, unit, int(gain.argmax()), nuisance))
    least, lower, _, _, chosen, _ = min(tried, key=lambda one: one[0])
    left, right = chosen, chosen
    for loss, low, base, unit, place, nuisance in tried:
        other = _apart(nuisance[None], base, unit[place])
        if loss > least and np.linalg.norm(other) > 1e-6 and not test(other)[0]:
            continue
        moves = _apart((t < edges[:, None]).astype(np.float64), base, unit)
        fine = (np.linalg.norm(moves, axis=1) < 1e-6) | test(moves)
        if not fine[place]:
            continue
        start = end = place
        while start > 0 and fine[start - 1] and edges[start - 1] > low:
            start -= 1
        while end < places - 1 and fine[end + 1]:
            end += 1
        left, right = min(left, start), max(right, end)
    return (
        lower,
        float(edges[chosen]),
        float(edges[left] - step / 2),
        float(edges[right] + step / 2),
    )


def _apart(moves: Array, base: Array, unit: Array) -> Array:
    """Takes from each row what the base (orthonormal columns) and its kink explain."""
    moves = moves - (moves @ base) @ base.T
    return np.asarray(moves - (moves * unit).sum(-1, keepdims=True) * unit)


def _beside(t: Array, ramp: Ramp) -> list[tuple[float, Array, Array]]:
    """What stands in the model beside a straight line and the kink.

    Returns:
        Lower end, columns, and the change of the curve with the rate or the lower end.
    """
    if ramp.kind == "kink":
        curves = [(rate, np.exp(-rate * t)) for rate in (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 11.0)]
        return [(ramp.low, curve[:, None], t * curve) for _, curve in curves]
    # The lower end may be up to one tested place away from the candidate's.
    place = int(np.abs(t - ramp.low).argmin())
    lows = np.linspace(t[max(place - 1, 0)], t[place + 1], 22)[1:-1]
    return [
        (float(low), np.maximum(low - t, 0)[:, None], (t < low).astype(np.float64)) for low in lows
    ]


def gap_interval(plan: Design, means: Array, level: float) -> tuple[float, float]:
    """Gives the interval for a step from resampled mean curves less the smooth curve of the fit.

    In each draw the step lies between two tested capacities, where it fits best beside a straight
    line, and every place between them counts alike: the data cannot say where. The interval leaves
    out the same share at both ends.

    Args:
        plan: The design.
        means: (resamples, points).
        level: Of the interval.

    Returns:
        Low and high, scaled as x is.
    """
    steps = [place for place, ramp in enumerate(plan.ramps) if ramp.kind == "step"]
    line, _ = np.linalg.qr(np.stack([np.ones_like(plan.t), plan.t], axis=1))
    shapes = plan.shapes[steps]
    shapes = shapes - (shapes @ line) @ line.T
    chosen = (means @ (shapes / np.linalg.norm(shapes, axis=1, keepdims=True)).T).argmax(1)
    share = np.bincount(chosen, minlength=len(steps)) / len(means)
    lows = np.array([plan.ramps[place].low for place in steps])
    highs = np.array([plan.ramps[place].high for place in steps])

    def quantile(q: float) -> float:
        before = 0.0
        for low, high, part in zip(lows, highs, share, strict=True):
            if part > 0 and before + part >= q - 1e-12:
                return float(low + (high - low) * min(max((q - before) / part, 0.0), 1.0))
            before += part
        return float(highs[-1])

    return quantile((1 - level) / 2), quantile((1 + level) / 2)
