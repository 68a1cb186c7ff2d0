"""Means over tokens with intervals that know that the tokens of a document belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 4000


def clustered_mean(
    frame: pd.DataFrame,
    value: str,
    by: Sequence[str],
    *,
    cluster: str = "document",
    strata: str = "domain",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Gives the mean of a column over tokens, with a percentile bootstrap interval over documents.

    Whole documents are drawn with replacement, within each stratum as many as it has: tokens of
    one text are correlated, and an interval over tokens would be too narrow.

    Args:
        frame: A row a token.
        value: The column to average; no NaN.
        by: Columns that group the rows.
        cluster: Column that names a token's document.
        strata: Column that names a document's stratum.
        level: Of the interval.
        resamples: Bootstrap draws.
        seed: Of the draws. Groups with the same documents get the same draws.

    Returns:
        A row a group: `by`, `mean`, `low`, `high` (float64), `tokens`, `documents` (int64). With
        one document in every stratum there is nothing to draw, and low and high are NaN.

    Raises:
        ValueError: If a value is NaN.
    """
    import pandas as pd

    if frame[value].isna().any():
        raise ValueError(f"{value!r} has NaN values, which a mean must not hide.")
    rows = []
    for key, group in frame.groupby(list(by), observed=True, sort=False):
        documents = group.groupby([strata, cluster], observed=True)[value].agg(["sum", "size"])
        sums, sizes = documents["sum"].to_numpy(), documents["size"].to_numpy()
        names = documents.index.get_level_values(0)
        random = np.random.default_rng(seed)
        total, count = np.zeros(resamples), np.zeros(resamples)
        for name in dict.fromkeys(names):
            places = np.flatnonzero(names == name)
            drawn = places[random.integers(0, len(places), (resamples, len(places)))]
            total += sums[drawn].sum(1)
            count += sizes[drawn].sum(1)
        low, high = np.quantile(total / count, [(1 - level) / 2, (1 + level) / 2])
        if len(documents) == names.nunique():
            low = high = float("nan")
        rows.append((*key, sums.sum() / sizes.sum(), low, high, sizes.sum(), len(documents)))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "tokens", "documents"])
