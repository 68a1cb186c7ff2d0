"""Fits seconds to what they were spent on: least absolute relative deviations, no part negative."""

from __future__ import annotations

import numpy as np

from ..errors import StudyError

RESAMPLES = 30


def fitted_parts(
    x: np.ndarray, y: np.ndarray, run: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fits parts, none negative, by least absolute relative deviations.

    Deviations are taken relative to the fit, not to what was observed, which would favour the
    quick observations. Then all parts are multiplied by the median over runs of a run's seconds
    over its fitted ones: interruptions are in every long run, and a sum of medians has none.

    Args:
        x: What there was of each part, float64 (observations, parts).
        y: Seconds, float64 (observations,), above 0.
        run: Which run each observation is of, int64 (observations,); None for one each.

    Returns:
        The parts, float64 (parts,); their 5% and 95% quantiles over resampled runs, (parts, 2);
        the median of |fit − y| / y.
    """
    groups = np.arange(len(y)) if run is None else np.unique(run, return_inverse=True)[1]
    found = _fitted(x, y, groups)
    random = np.random.default_rng(0)
    # Observations of one run resemble each other, so that whole runs are drawn.
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    again = []
    for drawn in random.integers(0, len(members), (RESAMPLES, len(members))).tolist():
        rows = np.concatenate([members[group] for group in drawn])
        named = np.repeat(np.arange(len(drawn)), [len(members[group]) for group in drawn])
        again.append(_fitted(x[rows], y[rows], named))
    ranges = np.quantile(again, [0.05, 0.95], axis=0).T
    return found, ranges, float(np.median(np.abs(x @ found - y) / y))


def _fitted(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    found = _least_deviations(x, y, y)
    for _ in range(2):
        found = _least_deviations(x, y, np.maximum(x @ found, y / 100))
    there = np.unique(groups)
    took = np.bincount(groups, y)[there]
    told = np.bincount(groups, x @ found)[there]
    return found * float(np.median(took / np.maximum(told, took / 100)))


def _least_deviations(x: np.ndarray, y: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Minimises Σ |x·parts − y| / unit, no part negative."""
    from scipy.optimize import linprog

    scale = np.maximum(np.abs(x).max(axis=0), 1e-12)
    a = x / scale / unit[:, None]
    n, k = a.shape
    # min Σ (u + v) with a·b + u − v = y / unit and b, u, v ≥ 0.
    eye = np.eye(n)
    cost = np.concatenate([np.zeros(k), np.ones(2 * n)])
    done = linprog(cost, A_eq=np.hstack([a, eye, -eye]), b_eq=y / unit, method="highs")
    if done.x is None:
        raise StudyError(f"The seconds could not be fitted: {done.message}")
    parts: np.ndarray = np.maximum(done.x[:k], 0) / scale
    return parts
