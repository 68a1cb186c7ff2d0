"""Linear regression of a mean or a quantile, with documents as the unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StudyError
from ..quality.resampling import resampled

Array = NDArray[np.float64]

FOLDS = 10
"""Groups of documents that are left out in turn where no test frame is given."""

Solver = Callable[[Any, Any, Any], Any]
"""Gets design, response and weights; returns coefficients."""


def solver_of(quantile: float | None) -> Solver:
    """Returns what fits the mean (None) or a quantile."""
    return least_squares if quantile is None else lambda x, y, w: quantile_fit(x, y, w, quantile)


def least_squares(x: Array, y: Array, weights: Array) -> Array:
    """Returns the coefficients that minimise the weighted squares; the shortest of equal ones."""
    root = np.sqrt(weights)
    return np.asarray(np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0])


def quantile_fit(x: Array, y: Array, weights: Array, quantile: float) -> Array:
    """Returns the coefficients of a weighted quantile regression, by its dual linear programme.

    max y'a with X'a = (1 − q) X'w and 0 ≤ a ≤ w; the coefficients are the multipliers of the
    equalities (Koenker, Quantile Regression, 2005, §6).
    """
    from scipy.optimize import linprog

    used = weights > 0
    x, y, w = x[used], y[used], weights[used]
    scale = np.abs(x).max(0)
    scale[scale == 0] = 1.0
    z = x / scale
    found = linprog(
        -y, A_eq=z.T, b_eq=(1 - quantile) * (z.T @ w), bounds=np.stack([0 * w, w], 1),
        method="highs",
    )  # fmt: skip
    if not found.success:
        raise StudyError(f"The quantile regression has no solution: {found.message}")
    return np.asarray(-found.eqlin.marginals / scale)


def losses_of(quantile: float | None) -> Callable[[Any], Any]:
    """Returns the loss of each residual that such a fit minimises."""
    if quantile is None:
        return np.square
    return lambda r: np.where(r >= 0, quantile * r, (quantile - 1) * r)


QUANTILE_DRAWS = 200
"""Resamples of documents for the coefficients of a quantile regression."""


def interval(
    x: Array,
    y: Array,
    beta: Array,
    documents: NDArray[np.int64],
    strata: NDArray[np.int64],
    quantile: float | None,
    seed: int,
) -> tuple[Array, Array]:
    """Returns the ends of the coefficients' 95% intervals over documents.

    Args:
        x: Design, (rows, terms).
        y: Response, (rows,).
        beta: The fit.
        documents: Number of each row's document.
        strata: Stratum of each document.
        quantile: Which quantile was fitted; None for the mean.
        seed: Of the draws, for a quantile.
    """
    from scipy import stats

    count = int(documents.max()) + 1
    if quantile is not None:  # the jackknife does not hold for quantiles
        weights = resampled(strata, resamples=QUANTILE_DRAWS, seed=seed)
        drawn = np.array([quantile_fit(x, y, w[documents], quantile) for w in weights])
        ends = np.quantile(drawn, [0.025, 0.975], axis=0)
        return np.asarray(ends[0]), np.asarray(ends[1])
    left = np.array([least_squares(x, y, (documents != d) * 1.0) for d in range(count)])
    # Centred on the whole fit: the conservative one of the jackknives (CR3).
    se = np.sqrt((count - 1) / count * ((left - beta) ** 2).sum(0))
    reach = stats.t.ppf(0.975, count - 1) * se
    return np.asarray(beta - reach), np.asarray(beta + reach)


def left_out(x: Array, y: Array, documents: NDArray[np.int64], solve: Solver, seed: int) -> Array:
    """Predicts each document from a fit to others."""
    count = int(documents.max()) + 1
    fold = np.random.default_rng(seed).permutation(count) % min(FOLDS, count)
    predicted = np.empty(len(y))
    for number in np.unique(fold):
        out = fold[documents] == number
        predicted[out] = x[out] @ solve(x, y, (~out) * 1.0)
    return predicted
