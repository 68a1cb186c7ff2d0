"""How far a mean would be from itself with other documents: its standard error, by jackknife.

Leave out one document at a time, give its weight to the others of its stratum, and see how far the
mean moves (the stratified jackknife for clusters; Wolter, Introduction to Variance Estimation,
2007, §4.5). The degrees of freedom are those of Bell and McCaffrey (Survey Methodology 28, 2002),
under which a few long documents count as the few that they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import StudyError
from .clusters import Clusters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def influence(data: Clusters) -> Array:
    """Says how far each mean moves when a document is left out: (documents, groups).

    Scaled so that the sum over documents of the product of two columns is the covariance of two
    means, and of a column's squares its variance. A stratum with one document cannot say how
    documents of its kind differ: where other strata can, that document is left out without a
    substitute, which errs on the wide side; where none can, the column is NaN.
    """
    sums, sizes, means = data.sums, data.sizes, data.means
    there = sizes > 0
    off = sums - means * sizes
    out = np.zeros_like(sums)
    total = sizes.sum(0)
    known = np.zeros(sums.shape[1], bool)
    for stratum in np.unique(data.strata):
        rows = data.strata == stratum
        count = there[rows].sum(0)
        many = count > 1
        known |= many
        grow = np.where(many, count / np.maximum(count - 1, 1), 0.0)
        mean = off[rows].sum(0) / np.maximum(count, 1)
        held = sizes[rows]
        left = total - held.sum(0) + grow * (held.sum(0) - held)
        moved = np.where(many, mean - off[rows], -off[rows])
        factor = np.where(many, np.sqrt(grow), 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            out[rows] = np.where(there[rows], factor * moved / left, 0.0)
    out[:, ~known] = np.nan
    return out


def freedom(data: Clusters) -> Array:
    """Degrees of freedom of each group's standard error, after Bell and McCaffrey: (groups,).

    The working model is that documents' means have the same variance, so that a document's sum
    varies with its length squared.
    """
    found: dict[bytes, float] = {}
    out = np.empty(data.sizes.shape[1])
    for group, sizes in enumerate(data.sizes.T):
        key = sizes.tobytes()
        if key not in found:
            here = sizes > 0
            n = int(here.sum())
            # The influence is linear in the sums: its matrix, column by column.
            held = np.asarray(sizes[here], np.float64)
            unit = Clusters(np.diag(held), np.tile(held[:, None], n), data.strata[here], [])
            moves = influence(unit)
            spread = moves @ moves.T
            with np.errstate(invalid="ignore"):
                found[key] = float(np.trace(spread) ** 2 / (spread**2).sum())
        out[group] = found[key]
    return out


def quantiles(level: float, df: Array, sides: int = 2) -> Array:
    """Gives each mean's factor on its standard error, for bounds that hold one by one.

    Args:
        level: Chance that a mean lies within its bounds.
        df: Degrees of freedom, (groups,).
        sides: 1 or 2.
    """
    from scipy import stats

    return np.asarray(stats.t.ppf(1 - (1 - level) / sides, df))


def checked_level(level: float) -> float:
    """Returns a level of confidence as it is.

    Raises:
        StudyError: If it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise StudyError(f"level must be between 0 and 1, got {level!r}.")
    return level
