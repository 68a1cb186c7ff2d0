"""Draws: of the largest t of several groups, and of documents with replacement.

Where several groups are compared, the moves of all groups under the same left-out document give
their correlation, and simultaneous bounds come from draws of the largest t (multivariate t).

Documents are drawn as the bootstrap for few of them must: of n in a stratum n − 1 are drawn, and
their weight is stretched by n/(n − 1) (Rao and Wu, JASA 83, 1988), so that the spread is right for
few documents as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import StudyError
from .spread import quantiles

if TYPE_CHECKING:
    Array = NDArray[np.float64]

RESAMPLES = 4000
"""Draws, where draws are needed."""


def largest(
    moves: Array,
    df: Array,
    level: float,
    *,
    sides: int = 2,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Array:
    """Gives each group's factor on its standard error, so that all bounds hold at once.

    Args:
        moves: As `influence` gives them, (documents, groups).
        df: Degrees of freedom, (groups,).
        level: Chance that all hold.
        sides: 1 or 2.
        resamples: Draws.
        seed: Of the draws.

    Returns:
        Factors, (groups,): all the same where the degrees of freedom are.
    """
    from scipy import stats

    worst = largest_t(moves, df, sides=sides, resamples=resamples, seed=seed)
    if worst is None:
        return quantiles(level, df, sides)
    return np.asarray(stats.t.ppf(np.quantile(worst, level), df))


def largest_t(
    moves: Array, df: Array, *, sides: int = 2, resamples: int = RESAMPLES, seed: int = 0
) -> Array | None:
    """Draws the largest t of all groups where nothing differs from 0.

    Returns:
        In each draw, the chance that a single t of those degrees of freedom is below the largest
        one, (resamples,); None if no group has a spread. Groups without one do not count.
    """
    from scipy import stats

    if sides not in (1, 2):
        raise StudyError(f"sides must be 1 or 2, got {sides!r}.")
    se = np.sqrt((moves**2).sum(0))
    live = (se > 0) & np.isfinite(se) & np.isfinite(df)
    if not live.any():
        return None
    random = np.random.default_rng(seed)
    normal = random.standard_normal((resamples, len(moves))) @ (moves[:, live] / se[live])
    # One chi-square a draw: the groups' standard errors come from the same documents.
    freed = df[live]
    kinds = np.unique(freed)
    if len(kinds) == 1:
        drawn = [random.chisquare(kinds[0], resamples)]
    else:
        share = random.uniform(size=resamples)
        drawn = [stats.chi2.ppf(share, one) for one in kinds]
    worst = np.zeros(resamples)
    for one, chi in zip(kinds, drawn, strict=True):
        scale = np.sqrt(chi / one)
        picked = normal if len(kinds) == 1 else normal[:, freed == one]
        top = picked.max(1)
        if sides == 2:
            top = np.maximum(top, -picked.min(1))
        top = top / scale
        worst = np.maximum(worst, stats.t.cdf(top, one))
    return worst


def resampled(strata: NDArray[np.int64], *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Gives the weight of each document in each draw: (resamples, documents), float64.

    Within a stratum of n documents, n − 1 are drawn with replacement and weigh n/(n − 1) each. A
    document that is alone in its stratum always weighs 1.
    """
    random = np.random.default_rng(seed)
    out = np.ones((resamples, len(strata)))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        n = len(rows)
        if n > 1:
            out[:, rows] = random.multinomial(n - 1, np.full(n, 1 / n), resamples) * (n / (n - 1))
    return out
