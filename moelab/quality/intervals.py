"""Means over tokens with intervals that know that the tokens of a document belong together.

The mean of a column is a ratio: the sum over all tokens divided by their number. Both are random,
since other documents would have other tokens, so the interval is that of a ratio of sums over
documents. Documents are the unit: tokens of one text are correlated, and an interval over tokens
would be too narrow. Documents are compared within their stratum (the domain), because the domains
of a study are chosen and not drawn.

How: leave out one document at a time, give its weight to the others of its stratum, and see how
far the mean moves (the stratified jackknife for clusters; Wolter, Introduction to Variance
Estimation, 2007, §4.5). The interval is the mean ± t · se, with the degrees of freedom of Bell and
McCaffrey (Survey Methodology 28, 2002), under which a few long documents count as the few that
they are. Nothing is divided by a resampled spread, so no interval explodes. Where several groups
are compared, the moves of all groups under the same left-out document give their correlation, and
simultaneous bounds come from draws of the largest t (multivariate t).

`draws` gives the bootstrap matrix for figures that are no means. With n documents in a stratum it
draws n − 1 of them and stretches their weight by n/(n − 1) (Rao and Wu, JASA 83, 1988), so that the
spread is right for few documents as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SchemaError, StudyError

if TYPE_CHECKING:
    import pandas as pd

    Array = NDArray[np.float64]

RESAMPLES = 4000
"""Draws, where draws are needed."""


@dataclass(frozen=True)
class Clusters:
    """Sums over documents, for one or more groups.

    Attributes:
        sums: Sum of the values of a document's tokens, (documents, groups).
        sizes: Number of its tokens (or sum of its weights), (documents, groups); 0 where the
            group has none of this document.
        strata: Number of each document's stratum, (documents,).
        keys: The groups' values of the columns that group, a tuple a group.
    """

    sums: Array
    sizes: Array
    strata: NDArray[np.int64]
    keys: list[tuple[Any, ...]]

    @property
    def means(self) -> Array:
        """The ratio of sums, (groups,)."""
        return np.asarray(self.sums.sum(0) / self.sizes.sum(0))

    @property
    def documents(self) -> NDArray[np.int64]:
        """Documents that each group has, (groups,)."""
        return np.asarray((self.sizes > 0).sum(0), dtype=np.int64)


def clusters_of(
    frame: pd.DataFrame,
    value: str,
    by: str | Sequence[str] = (),
    *,
    cluster: str = "document",
    strata: str | None = "domain",
    weights: str | None = None,
) -> Clusters:
    """Sums a column over documents.

    Args:
        frame: A row a token; or, with `weights`, a row with the mean of several tokens.
        value: The column to average.
        by: Columns that group the rows.
        cluster: Column that names a row's document.
        strata: Column that names a document's stratum; None for one stratum.
        weights: Column with the number of tokens that a row stands for; None counts each as one.

    Raises:
        SchemaError: If a column is missing or is not numbers.
        StudyError: If the frame is empty, a value is NaN or infinite, or weights are not positive.
    """
    columns = [by] if isinstance(by, str) else list(by)
    for name in [value, cluster, *columns, *[n for n in (strata, weights) if n is not None]]:
        if name not in frame.columns:
            raise SchemaError(
                f"The frame has no column {name!r}. It has: {', '.join(map(str, frame.columns))}."
            )
    if not len(frame):
        raise StudyError(f"The frame has no rows, so {value!r} has no mean.")
    y = _numbers(frame, value)
    w = np.ones(len(y)) if weights is None else _numbers(frame, weights)
    if (w <= 0).any():
        raise StudyError(f"{weights!r} must be above 0, got {w.min():g}.")
    stratum = _codes(frame, [strata] if strata is not None else [])
    document = _codes(frame, [*([strata] if strata is not None else []), cluster])
    group = _codes(frame, columns)
    first = np.unique(group, return_index=True)[1]
    heads = frame.iloc[first]
    keys = list(zip(*(heads[c] for c in columns), strict=True)) if columns else [()]
    shape = (int(document.max()) + 1, len(first))
    place = document * shape[1] + group
    sums = np.bincount(place, w * y, shape[0] * shape[1]).astype(np.float64).reshape(shape)
    sizes = np.bincount(place, w, shape[0] * shape[1]).astype(np.float64).reshape(shape)
    layer = np.zeros(shape[0], np.int64)
    layer[document] = stratum
    return Clusters(sums, sizes, layer, keys)


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


def clustered(
    frame: pd.DataFrame,
    value: str,
    by: str | Sequence[str] = (),
    *,
    cluster: str = "document",
    strata: str | None = "domain",
    weights: str | None = None,
    level: float = 0.95,
    limits: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """Gives the mean of a column over tokens with an interval over documents.

    Args:
        frame: A row a token; or, with `weights`, a row with the mean of several tokens.
        value: The column to average; no NaN.
        by: Columns that group the rows.
        cluster: Column that names a row's document.
        strata: Column that names a document's stratum; None for one stratum.
        weights: Column with the number of tokens that a row stands for.
        level: Of each interval by itself. See `simultaneous` for all of them together.
        limits: Bounds outside which the mean cannot lie, such as (0, 1) for a share: intervals
            are cut there.

    Returns:
        A row a group, in the order in which they first appear: `by`, `mean`, `se`, `low`, `high`
        (float64), `tokens` (int64; float64 with weights that are no whole numbers), `documents`
        (int64). With one document in every stratum there is nothing to compare, and `se`, `low`
        and `high` are NaN.

    Raises:
        SchemaError: If a column is missing or is not numbers.
        StudyError: If the frame is empty or a value is NaN or infinite.
    """
    data = clusters_of(frame, value, by, cluster=cluster, strata=strata, weights=weights)
    return _table(data, by, _quantiles(_level(level), freedom(data)), limits)


def paired(
    frame: pd.DataFrame,
    value: str,
    contrast: str,
    settings: tuple[Any, Any],
    by: str | Sequence[str] = (),
    *,
    cluster: str = "document",
    strata: str | None = "domain",
    weights: str | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Gives the difference of a column's mean between two settings on the same documents.

    Args:
        frame: Rows of both settings; others are ignored.
        value: The column to average; no NaN.
        contrast: Column that tells the settings apart.
        settings: Its two values; the difference is the first less the second.
        by: Columns that group the rows.
        cluster: Column that names a row's document.
        strata: Column that names a document's stratum; None for one stratum.
        weights: Column with the number of tokens that a row stands for.
        level: Of each interval.

    Returns:
        As `clustered`, with the difference as `mean`; tokens and documents are those of one
        setting.

    Raises:
        StudyError: If a setting has no rows, or the two have not the same documents with as many
            tokens each: then the difference would not be paired.
    """
    import pandas as pd

    columns = [by] if isinstance(by, str) else list(by)
    if contrast not in frame.columns:
        raise SchemaError(f"The frame has no column {contrast!r}.")
    for setting in settings:
        if not (frame[contrast] == setting).any():
            raise StudyError(
                f"No row has {contrast} = {setting!r}; there are "
                f"{', '.join(map(repr, pd.unique(frame[contrast])))}."
            )
    both = frame[frame[contrast].isin(list(settings))]
    data = clusters_of(
        both, value, [*columns, contrast], cluster=cluster, strata=strata, weights=weights
    )
    places = {key: place for place, key in enumerate(data.keys)}
    keys = list(dict.fromkeys(key[:-1] for key in data.keys))
    for key in keys:
        for setting in settings:
            if (*key, setting) not in places:
                raise StudyError(f"Group {key} has no row with {contrast} = {setting!r}.")
    a, b = ([places[*key, setting] for key in keys] for setting in settings)
    if not np.array_equal(data.sizes[:, a], data.sizes[:, b]):
        raise StudyError(
            f"{settings[0]!r} and {settings[1]!r} were not judged on the same tokens of the same "
            f"documents, so their difference is not paired. Keep the documents that both have."
        )
    gap = Clusters(data.sums[:, a] - data.sums[:, b], data.sizes[:, a], data.strata, keys)
    return _table(gap, by, _quantiles(_level(level), freedom(gap)), None)


def simultaneous(
    frame: pd.DataFrame,
    value: str,
    by: str | Sequence[str],
    *,
    cluster: str = "document",
    strata: str | None = "domain",
    weights: str | None = None,
    level: float = 0.95,
    sides: int = 2,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """As `clustered`, with bounds that hold for all groups at once.

    Args:
        frame: A row a token; or, with `weights`, a row with the mean of several tokens.
        value: The column to average; no NaN.
        by: Columns that group the rows.
        cluster: Column that names a row's document. The same names are the same documents in
            every group.
        strata: Column that names a document's stratum; None for one stratum.
        weights: Column with the number of tokens that a row stands for.
        level: Chance that every group's mean lies within its bounds.
        sides: 2; or 1, where either all `low` or all `high` are used and never both.
        resamples: Draws of the largest t.
        seed: Of the draws.

    Returns:
        As `clustered`.
    """
    data = clusters_of(frame, value, by, cluster=cluster, strata=strata, weights=weights)
    moves, df = influence(data), freedom(data)
    factor = largest(moves, df, _level(level), sides=sides, resamples=resamples, seed=seed)
    return _table(data, by, factor, None)


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
        return _quantiles(level, df, sides)
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


def draws(
    frame: pd.DataFrame,
    value: str,
    by: str | Sequence[str] = (),
    *,
    cluster: str = "document",
    strata: str | None = "domain",
    weights: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[list[tuple[Any, ...]], Array]:
    """Gives resampled means, the same documents for all groups, for figures that are no means.

    Returns:
        The groups' keys, and means (resamples, groups), float64. A group that a draw leaves
        without a document is NaN there.
    """
    data = clusters_of(frame, value, by, cluster=cluster, strata=strata, weights=weights)
    w = resampled(data.strata, resamples=resamples, seed=seed)
    with np.errstate(invalid="ignore"):
        return data.keys, (w @ data.sums) / (w @ data.sizes)


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


def _table(
    data: Clusters, by: str | Sequence[str], factor: Array, limits: tuple[float, float] | None
) -> pd.DataFrame:
    import pandas as pd

    columns = [by] if isinstance(by, str) else list(by)
    means = data.means
    se = np.sqrt((influence(data) ** 2).sum(0))
    low, high = means - factor * se, means + factor * se
    if limits is not None:
        low, high = np.clip(low, *limits), np.clip(high, *limits)
    tokens = data.sizes.sum(0)
    whole = np.rint(tokens)
    named = {name: [key[place] for key in data.keys] for place, name in enumerate(columns)}
    return pd.DataFrame(
        {
            **named,
            "mean": means,
            "se": se,
            "low": low,
            "high": high,
            "tokens": whole.astype(np.int64) if np.array_equal(tokens, whole) else tokens,
            "documents": data.documents,
        }
    )


def _quantiles(level: float, df: Array, sides: int = 2) -> Array:
    from scipy import stats

    return np.asarray(stats.t.ppf(1 - (1 - level) / sides, df))


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise StudyError(f"level must be between 0 and 1, got {level!r}.")
    return level


def _numbers(frame: pd.DataFrame, name: str) -> Array:
    try:
        values = np.asarray(frame[name], dtype=np.float64)
    except (TypeError, ValueError):
        raise SchemaError(f"Column {name!r} must be numbers, got {frame[name].dtype}.") from None
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise StudyError(
            f"{name!r} has {int(bad.sum())} NaN or infinite values, which a mean must not hide; "
            f"the first is in row {first}."
        )
    return values


def _codes(frame: pd.DataFrame, columns: list[str]) -> NDArray[np.int64]:
    """Numbers the rows' combinations of values, in the order in which they first appear."""
    import pandas as pd

    codes = np.zeros(len(frame), np.int64)
    for name in columns:
        one, values = pd.factorize(frame[name], use_na_sentinel=True)
        if (one < 0).any():
            raise StudyError(f"Column {name!r} has rows without a value.")
        codes = codes * (len(values) + 1) + one
        codes = np.asarray(pd.factorize(codes)[0], dtype=np.int64)
    return codes
