"""One curve out of a sweep's frame: a value by capacity, document by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import SchemaError, StudyError
from ..quality.clusters import Clusters, clusters_of

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = (
    "fingerprint", "capacity", "on_miss", "policy", "pins", "kv_bits", "initial", "swap_budget",
    "prefix", "split",
)  # fmt: skip
"""Columns of which one curve has one value each, besides its x."""


@dataclass(frozen=True)
class Curve:
    """Documents' values at the same x.

    Attributes:
        x: Tested x, ascending, (points,).
        values: (documents, points).
        weights: Tokens of a document, (documents,).
        strata: Number of each document's stratum, (documents,).
        left_out: Documents that lack some x. They are left out, so that no point of the curve
            stands on other texts than its neighbour.
    """

    x: NDArray[np.float64]
    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    strata: NDArray[np.int64]
    left_out: int

    @property
    def mean(self) -> NDArray[np.float64]:
        """Over tokens, (points,)."""
        return np.asarray(self.weights @ self.values / self.weights.sum())

    def contrasts(self, factors: NDArray[np.float64]) -> Clusters:
        """Gives the documents' sums of factors (contrasts, points) times values."""
        sums = self.weights[:, None] * (self.values @ factors.T)
        return Clusters(sums, np.tile(self.weights[:, None], len(factors)), self.strata, [])


def curve_of(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    cluster: str = "prompt",
    strata: str | None = None,
    weights: str | None = None,
) -> Curve:
    """Takes a curve from a frame with a row a point and document (and seed).

    Rows of the same x and document are averaged: they are seeds of one setting.

    Raises:
        SchemaError: If a column is missing or is not numbers.
        StudyError: If a value is NaN, or the frame has several curves.
    """
    refuse_several(frame, [x])
    if x not in frame.columns:
        raise SchemaError(f"The frame has no column {x!r}. It has: {_listed(frame.columns)}.")
    data = clusters_of(frame, y, [x], cluster=cluster, strata=strata, weights=weights)
    try:
        places = np.array([float(key[0]) for key in data.keys])
    except (TypeError, ValueError):
        raise SchemaError(f"Column {x!r} must be numbers, got {frame[x].dtype}.") from None
    if not np.isfinite(places).all():
        raise StudyError(f"{x!r} has NaN or infinite values.")
    order = np.argsort(places)
    sums, sizes = data.sums[:, order], data.sizes[:, order]
    whole = (sizes > 0).all(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (sums / sizes)[whole]
    return Curve(
        places[order], values, sizes[whole].mean(1), data.strata[whole], int((~whole).sum())
    )


def refuse_several(frame: pd.DataFrame, but: Sequence[str]) -> None:
    """Raises if a frame holds several curves.

    Args:
        frame: A sweep's frame or like it.
        but: Columns that may have several values.

    Raises:
        StudyError: Names the column and its values.
    """
    exchanged = set(but)
    if exchanged & {"bytes", "bytes_read", "hit_rate"}:
        exchanged.add("capacity")  # these follow from it
    for name in SETTINGS:
        if name in frame.columns and name not in exchanged:
            values = frame[name].drop_duplicates()
            if len(values) > 1:
                raise StudyError(
                    f"The frame has several curves: {name!r} is {_listed(values, 6)}. Choose one "
                    f"first, such as frame[frame[{name!r}] == {values.iloc[0]!r}]."
                )


def _listed(values: object, most: int = 40) -> str:
    names = [str(value) for value in list(values)]  # type: ignore[call-overload]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
