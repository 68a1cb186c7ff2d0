"""Sums over documents, of which means over tokens and their intervals are made."""

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
    columns = names_of(by)
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


def names_of(by: str | Sequence[str]) -> list[str]:
    """Returns the columns that group, given as one name or several."""
    return [by] if isinstance(by, str) else list(by)


def require_columns(frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuses a frame that lacks a column.

    Raises:
        SchemaError: Names the first column that is missing.
    """
    for name in names:
        if name not in frame.columns:
            raise SchemaError(f"The frame has no column {name!r}.")


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
