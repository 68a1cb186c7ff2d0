"""Columns of frames that people may have edited, checked and as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SchemaError, StudyError

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray

Experts = int | Mapping[int, int] | None
"""Experts of a layer: of every layer, by layer, or None where the data say."""


def frame_of(routing: Any, where: str = "routing") -> pd.DataFrame:
    """Returns the routing frame of a recording, or the frame itself.

    Raises:
        StudyError: If it is neither.
    """
    import pandas as pd

    given = isinstance(routing, pd.DataFrame)
    frame = routing if given else getattr(routing, "routing", routing)
    if not isinstance(frame, pd.DataFrame):
        raise StudyError(
            f"{where} must be a recording or its routing frame, got {type(routing).__name__}."
        )
    return frame


def manifest(routing: Any) -> Mapping[str, Any]:
    """Returns a recording's manifest, also that of recorded texts; empty where there is none."""
    run = getattr(getattr(routing, "recording", routing), "run", None)
    return run if isinstance(run, Mapping) else {}


def known_experts(routing: Any) -> dict[int, int]:
    """Returns the experts by layer that a recording's manifest or a labelled frame tells."""
    run = manifest(routing)
    if "layers" in run and "experts" in run:
        return {int(k): int(e) for k, e in zip(run["layers"], run["experts"], strict=True)}
    told = getattr(routing, "attrs", {}).get("experts", {})
    return {int(layer): int(count) for layer, count in told.items()}


def experts_by_layer(
    highest: Mapping[int, int], experts: Experts, known: Mapping[int, int] | None = None
) -> dict[int, int]:
    """Returns the experts of each layer.

    Args:
        highest: The highest id that was seen, by layer.
        experts: What the caller says.
        known: What the recording says; where neither says, the highest id of all layers + 1.

    Raises:
        StudyError: If an id is not below the number, or a layer is not told of.
    """
    if experts is None:
        widest = max(highest.values(), default=-1) + 1
        sizes = {layer: (known or {}).get(layer, widest) for layer in highest}
    elif isinstance(experts, Mapping):
        lacking = [layer for layer in highest if layer not in experts]
        if lacking:
            raise StudyError(f"experts= says nothing of layers {lacking}; it has {list(experts)}.")
        sizes = {layer: int(experts[layer]) for layer in highest}
    elif isinstance(experts, bool) or not isinstance(experts, int | np.integer) or experts < 1:
        raise StudyError(f"experts= is a number from 1 on, or one by layer; got {experts!r}.")
    else:
        sizes = dict.fromkeys(highest, int(experts))
    for layer, size in sizes.items():
        if highest[layer] >= size:
            raise StudyError(
                f"Layer {layer} has {size} experts, and the frame has expert {highest[layer]} "
                "(0 is the first). Say experts= as it is."
            )
    return sizes


def column(frame: pd.DataFrame, name: str, kind: str, table: str = "routing") -> Array:
    """Returns one column, checked.

    Args:
        frame: The frame.
        name: The column.
        kind: `"id"` for integers from 0 on, `"integer"`, `"number"` for finite ones, `"flag"`.
        table: What to call the frame.

    Raises:
        SchemaError: If there is no such column, or it holds anything else.
    """
    if name not in frame.columns:
        raise SchemaError(
            f"The {table} frame has no column {name!r}; it has "
            f"{', '.join(map(str, frame.columns)) or 'none'}."
        )
    series = frame[name]
    if getattr(series, "ndim", 1) != 1:
        raise SchemaError(f"The {table} frame has more than one column {name!r}.")
    dtype = series.dtype
    if kind == "flag":
        if str(dtype) not in ("bool", "boolean") or bool(series.isna().any()):
            raise SchemaError(f"Column {name!r} of the {table} frame must be bool, it is {dtype}.")
        return series.to_numpy(np.bool_)
    if getattr(dtype, "kind", "O") not in ("iuf" if kind == "number" or not len(frame) else "iu"):
        needed = "numbers" if kind == "number" else "integers"
        raise SchemaError(
            f"Column {name!r} of the {table} frame must hold {needed}, it is {dtype}."
        )
    if bool(series.isna().any()):
        bad = int(np.flatnonzero(series.isna().to_numpy())[0])
        raise SchemaError(f"Column {name!r} of the {table} frame is not known in row {bad}.")
    if kind == "number":
        values = series.to_numpy(np.float64)
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise SchemaError(
                f"Column {name!r} of the {table} frame is {values[bad]} in row {bad}."
            )
        return values
    values = series.to_numpy(np.int64)
    if kind == "id" and len(values) and values.min() < 0:
        bad = int(values.argmin())
        raise SchemaError(
            f"Column {name!r} of the {table} frame is {values[bad]} in row {bad}; ids begin with 0."
        )
    return values


def names(frame: pd.DataFrame, name: str, table: str = "routing") -> tuple[Array, list[str]]:
    """Returns codes and names of a text column, in the order of its categories or of appearance.

    Raises:
        SchemaError: If there is no such column, or a row has no name.
    """
    import pandas as pd

    if name not in frame.columns:
        raise SchemaError(
            f"The {table} frame has no column {name!r}; it has "
            f"{', '.join(map(str, frame.columns)) or 'none'}."
        )
    series = frame[name]
    if isinstance(series.dtype, pd.CategoricalDtype):
        codes, known = series.cat.codes.to_numpy(np.int64), list(series.cat.categories)
    else:
        found, index = pd.factorize(series)
        codes, known = found.astype(np.int64), list(index)
    if (codes < 0).any():
        bad = int(np.flatnonzero(codes < 0)[0])
        raise SchemaError(f"Column {name!r} of the {table} frame has no name in row {bad}.")
    wrong = [value for value in known if not isinstance(value, str)]
    if wrong:
        raise SchemaError(
            f"Column {name!r} of the {table} frame must hold names, got {wrong[0]!r}."
        )
    return codes, known


def tidy(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Makes a frame of rows, with these columns also where there is none."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(columns))
