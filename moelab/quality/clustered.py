"""The name under which means over tokens were first given; see `intervals`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .intervals import clustered

if TYPE_CHECKING:
    import pandas as pd


def clustered_mean(
    frame: pd.DataFrame,
    value: str,
    by: Sequence[str],
    *,
    cluster: str = "document",
    strata: str = "domain",
    level: float = 0.95,
) -> pd.DataFrame:
    """Gives the mean of a column over tokens with an interval over documents.

    As `intervals.clustered`, without the standard error.

    Returns:
        A row a group: `by`, `mean`, `low`, `high` (float64), `tokens`, `documents` (int64).
    """
    found = clustered(frame, value, by, cluster=cluster, strata=strata, level=level)
    return found.drop(columns="se")
