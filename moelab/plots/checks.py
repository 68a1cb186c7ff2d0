"""What a frame must have before it is drawn; what it lacks is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import SchemaError

if TYPE_CHECKING:
    import pandas as pd


def require(
    frame: pd.DataFrame,
    columns: Sequence[str] = (),
    *,
    numbers: Sequence[str] = (),
    gaps: Sequence[str] = (),
    called: str = "the frame",
) -> None:
    """Raises unless a frame can be drawn.

    Args:
        frame: The frame.
        columns: Columns that it must have.
        numbers: Columns that it must have, of numbers or truth values, none NaN or infinite.
        gaps: Columns that it must have, of numbers, where NaN says that there is none.
        called: How the message names the frame.

    Raises:
        SchemaError: If it is no frame, has no rows, lacks a column, or a column holds what it
            must not; the message names the column.
    """
    import numpy as np
    import pandas as pd

    wanted = list(dict.fromkeys([*columns, *numbers, *gaps]))
    if not isinstance(frame, pd.DataFrame):
        raise SchemaError(
            f"{called} must be a pandas DataFrame with columns {_listed(wanted)}, "
            f"got {type(frame).__name__}."
        )
    lacking = [name for name in wanted if name not in frame.columns]
    if lacking:
        raise SchemaError(
            f"{called} lacks the column {lacking[0]!r}"
            + (f" (and {_listed(lacking[1:])})" if len(lacking) > 1 else "")
            + f"; it has {_listed(list(map(str, frame.columns))) or 'no columns'}. "
            "Give it as moelab returned it."
        )
    if frame.empty:
        raise SchemaError(
            f"{called} has no rows, so there is nothing to draw in {_listed(wanted)}."
        )
    for name in dict.fromkeys([*numbers, *gaps]):
        values = frame[name]
        if not pd.api.types.is_numeric_dtype(values):
            raise SchemaError(
                f"The column {name!r} of {called} must hold numbers, got {values.dtype} "
                f"(first value {values.iloc[0]!r})."
            )
        array = values.to_numpy(dtype=float, na_value=np.nan)
        bad = np.isinf(array) if name in gaps else ~np.isfinite(array)
        if bad.any():
            place = frame.index[int(np.flatnonzero(bad)[0])]
            raise SchemaError(
                f"The column {name!r} of {called} has {int(bad.sum())} values that are NaN or "
                f"infinite, the first in row {place}; a chart would hide them."
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return shown + (", …" if len(names) > 12 else "")
