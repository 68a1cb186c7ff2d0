"""Means over tokens with intervals that know that the tokens of a document belong together.

The mean of a column is a ratio: the sum over all tokens divided by their number. Both are random,
since other documents would have other tokens, so the interval is that of a ratio of sums over
documents. Documents are the unit: tokens of one text are correlated, and an interval over tokens
would be too narrow. Documents are compared within their stratum (the domain), because the domains
of a study are chosen and not drawn.

The interval is the mean ± t · se, where `spread` says how far the mean moves when a document is
left out, and with how many degrees of freedom. Nothing is divided by a resampled spread, so no
interval explodes. Bounds that hold for several groups at once come from draws of the largest t,
and `draws` gives the bootstrap matrix for figures that are no means; see `resampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import StudyError
from .clusters import Clusters, clusters_of, names_of, require_columns
from .resampling import RESAMPLES, largest, largest_t, resampled
from .spread import checked_level, freedom, influence, quantiles

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = [
    "RESAMPLES",
    "Clusters",
    "clustered",
    "clusters_of",
    "draws",
    "freedom",
    "influence",
    "largest",
    "largest_t",
    "paired",
    "resampled",
    "simultaneous",
]


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
    return _table(data, by, quantiles(checked_level(level), freedom(data)), limits)


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

    columns = names_of(by)
    require_columns(frame, [contrast])
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
    return _table(gap, by, quantiles(checked_level(level), freedom(gap)), None)


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
    factor = largest(moves, df, checked_level(level), sides=sides, resamples=resamples, seed=seed)
    return _table(data, by, factor, None)


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


def _table(
    data: Clusters, by: str | Sequence[str], factor: Array, limits: tuple[float, float] | None
) -> pd.DataFrame:
    import pandas as pd

    columns = names_of(by)
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
