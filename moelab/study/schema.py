"""Checks of frames that may have been edited by hand: each error names the column and the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import SchemaError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["int", "count", "float", "positive", "share", "str", "bool"]
"""What a column holds: whole numbers; whole numbers from 0 on; finite numbers; finite numbers above
0; numbers from 0 to 1; text that is not empty; true or false. With a `?` behind it, rows may have
no value (NaN or None)."""

_MEANING = {
    "int": "whole numbers",
    "count": "whole numbers from 0 on",
    "float": "finite numbers",
    "positive": "finite numbers above 0",
    "share": "numbers from 0 to 1",
    "str": "text",
    "bool": "true or false",
}


def checked(
    frame: pd.DataFrame, needed: Mapping[str, str], what: str, *, unique: Sequence[str] = ()
) -> pd.DataFrame:
    """Checks that a frame has the columns that it must have, and that they hold what they should.

    Args:
        frame: What the caller gave.
        needed: Column name → `Kind`, with `?` behind it where rows may have no value.
        what: What the frame is, for the errors: "A sweep's frame".
        unique: Columns whose values together tell every row apart; empty for none.

    Returns:
        The frame with those columns as int64, float64, bool or as they are (text), the others
        untouched. Whole numbers that came back from a text file as floats are whole again. The
        frame given is not changed.

    Raises:
        SchemaError: Names the first column that is missing, there twice, of another type, without
            a value, or out of range; or the first rows that are there twice.
    """
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise SchemaError(f"{what} must be a pandas DataFrame, got {type(frame).__name__}.")
    names = list(frame.columns)
    for name in [*needed, *unique]:
        if name not in names:
            raise SchemaError(
                f"{what} has no column {name!r}. It has: {', '.join(map(str, names)) or 'none'}."
            )
        if names.count(name) > 1:
            raise SchemaError(f"{what} has column {name!r} {names.count(name)} times.")
    done = {name: _column(frame[name], kind, what) for name, kind in needed.items()}
    result = frame.assign(**done)
    if unique:
        twice = result.duplicated(list(unique))
        if twice.any():
            place = int(np.flatnonzero(twice)[0])
            values = ", ".join(f"{n}={result[n].iloc[place]!r}" for n in unique)
            raise SchemaError(
                f"{what} has {int(twice.sum())} rows that are there twice by "
                f"{', '.join(map(repr, unique))}; the first is row {place}: {values}."
            )
    return result


def _column(values: pd.Series, kind: str, what: str) -> Any:
    base = kind.removesuffix("?")
    if base not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}.")
    name, meaning = values.name, _MEANING[base]

    def refuse(bad: Any, why: str = "") -> None:
        rows = np.flatnonzero(bad)
        if len(rows):
            got = values.iloc[int(rows[0])]
            raise SchemaError(
                f"{what}: column {name!r} must be {meaning}{why}; {len(rows)} rows are not, the "
                f"first is row {int(rows[0])} with {got!r}."
            )

    missing = values.isna().to_numpy(dtype=bool)
    if not kind.endswith("?"):
        refuse(missing, " in every row")
    there = values[~missing]
    if base == "str":
        refuse(_spread([not isinstance(v, str) or not v.strip() for v in there], missing))
        return values
    if base == "bool":
        refuse(_spread([not isinstance(v, bool | np.bool_) for v in there], missing))
        return values if missing.any() else values.astype(bool)
    wrong = [isinstance(v, bool | np.bool_ | str | complex) or not np.isscalar(v) for v in there]
    refuse(_spread(wrong, missing))
    try:
        numbers = np.asarray(there, dtype=np.float64)
    except (TypeError, ValueError):
        raise SchemaError(
            f"{what}: column {name!r} must be {meaning}, got {values.dtype}."
        ) from None
    refuse(_spread(~np.isfinite(numbers), missing))
    if base in ("int", "count"):
        refuse(_spread(numbers != np.rint(numbers), missing))
    if base == "count":
        refuse(_spread(numbers < 0, missing))
    if base == "positive":
        refuse(_spread(numbers <= 0, missing))
    if base == "share":
        refuse(_spread((numbers < 0) | (numbers > 1), missing))
    if base in ("int", "count") and not missing.any():
        # Not by way of floats, which hold no whole number above 2⁵³ exactly.
        return values.astype(np.int64)
    return values.astype(np.float64)


def _spread(bad: Any, missing: np.ndarray) -> np.ndarray:
    """Puts flags of the rows that have a value back among all rows."""
    out = np.zeros(len(missing), bool)
    out[~missing] = bad
    return out
