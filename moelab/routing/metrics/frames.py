"""Recorded frames as arrays, checked: what every routing metric begins with.

A metric never pools phases: a phase is part of the key of each result, and `padding` is left out.
A draft that was rejected is left out too: where several rows have the same position in a sequence,
those of the last step stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SchemaError, StudyError

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray

Experts = int | Mapping[int, int] | None
"""Experts of a layer: of every layer, by layer, or None where the data say."""

ALL = "all"
"""The domain of what has none."""

PADDING = "padding"

_CELL = ("layer", "run", "sequence", "position")
"""One token at one layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """What the router of one layer chose, token by token, in one domain and one phase.

    Tokens are ordered by run, sequence and position.
    """

    domain: str
    phase: str
    layer: int
    experts: int
    """Experts of the layer."""
    ids: Array
    """int32 (tokens, k), by rank; -1 fills up tokens that chose fewer."""
    run: Array
    """(tokens,)."""
    sequence: Array
    """(tokens,)."""
    position: Array
    """(tokens,)."""
    text: Array
    """(tokens,): number of the token's text, which is its document where the frame has a column
    `document`, else its run and sequence; no two domains share one."""
    token_id: Array | None = None
    """(tokens,), where it was asked for."""
    weights: Array | None = None
    """float64 (tokens, k), 0 beyond a token's choices, where it was asked for."""
    hits: Array | None = None
    """bool (tokens, k), True beyond a token's choices, where it was asked for."""

    @property
    def sizes(self) -> Array:
        """Experts that each token chose, (tokens,)."""
        return (self.ids >= 0).sum(1)

    @property
    def top_k(self) -> float:
        """Experts a token; the mean where tokens differ."""
        return float(self.sizes.mean())

    @property
    def follows(self) -> Array:
        """bool (tokens,): the row before is the token before, of the same run and sequence."""
        same = np.zeros(len(self.ids), np.bool_)
        same[1:] = (
            (self.run[1:] == self.run[:-1])
            & (self.sequence[1:] == self.sequence[:-1])
            & (self.position[1:] == self.position[:-1] + 1)
        )
        return same

    @property
    def starts(self) -> Array:
        """Rows at which stretches of consecutive tokens begin, ascending, and the row count."""
        return np.append(np.flatnonzero(~self.follows), len(self.ids))

    @property
    def key(self) -> dict[str, Any]:
        """Domain, phase and layer, as columns of a result."""
        return {"domain": self.domain, "phase": self.phase, "layer": self.layer}

    def slots(self) -> tuple[Array, Array]:
        """Returns the row and the expert of every routed slot, in order."""
        row, rank = np.nonzero(self.ids >= 0)
        return row, self.ids[row, rank]


def frame_of(routing: Any, where: str = "routing") -> pd.DataFrame:
    """Returns the routing frame of a recording, or the frame itself.

    Raises:
        StudyError: If it is neither.
    """
    import pandas as pd

    frame = getattr(routing, "routing", routing) if hasattr(routing, "run") else routing
    if not isinstance(frame, pd.DataFrame):
        raise StudyError(
            f"{where} must be a recording or its routing frame, got {type(routing).__name__}."
        )
    return frame


def known_experts(routing: Any) -> dict[int, int]:
    """Returns the experts by layer that a recording's manifest or a labelled frame tells."""
    run = getattr(routing, "run", None)
    if isinstance(run, Mapping) and "layers" in run and "experts" in run:
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
        raise SchemaError(f"Column {name!r} of the {table} frame must hold {needed}, it is {dtype}.")
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
        raise SchemaError(f"Column {name!r} of the {table} frame must hold names, got {wrong[0]!r}.")
    return codes, known


def choices(
    routing: Any,
    *,
    phase: str | None = None,
    experts: Experts = None,
    extra: Sequence[str] = (),
) -> list[Choices]:
    """Takes a recording apart by domain, phase and layer.

    Args:
        routing: A recording, its `routing`, or what `labelled` gives.
        phase: Only this phase; None for all, each apart. Padding is never among them.
        experts: Experts of the layers; None for what the recording says, else the highest id + 1.
        extra: Columns that are needed besides: `token_id`, `weight`, `hit`.

    Returns:
        Sorted by domain (as they come), phase (as in the frame) and layer.

    Raises:
        SchemaError: If the frame is not as moelab writes it.
        StudyError: If there is no such phase, or `experts` does not fit.
    """
    frame = frame_of(routing)
    held = {name: column(frame, name, "id") for name in (*_CELL, "step", "rank", "expert")}
    held.update({name: column(frame, name, _EXTRA[name]) for name in extra})
    held["phase"], phases = names(frame, "phase")
    held["domain"], domains = (
        names(frame, "domain")
        if "domain" in frame.columns
        else (np.zeros(len(frame), np.int64), [ALL])
    )
    if "document" in frame.columns:
        held["document"] = names(frame, "document")[0]
    if phase is not None and (phase not in phases or phase == PADDING):
        known = ", ".join(name for name in phases if name != PADDING)
        raise StudyError(f"There is no phase {phase!r} in the routing frame; it has {known}.")
    real = np.array([name != PADDING for name in phases], np.bool_)
    held = _standing({name: values[real[held["phase"]]] for name, values in held.items()})
    wanted = phases if phase is None else [phase]
    keep = np.isin(held["phase"], [phases.index(name) for name in wanted])
    held = {name: values[keep] for name, values in held.items()}
    highest = {int(n): int(held["expert"][held["layer"] == n].max()) for n in _present(held["layer"])}
    sizes = experts_by_layer(highest, experts, known_experts(routing))
    held["text"] = _texts(held)
    # Rows of a group lie together, and within it stay in the order of tokens and ranks.
    group = (held["domain"] * len(phases) + held["phase"]) * (max(highest, default=0) + 1)
    group += held["layer"]
    order = np.argsort(group, kind="stable")
    held, group = {name: values[order] for name, values in held.items()}, group[order]
    edges = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(group))
    return [
        _group({name: values[a:b] for name, values in held.items()}, domains, phases, sizes)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]


_EXTRA = {"token_id": "integer", "weight": "number", "hit": "flag"}


def _standing(held: dict[str, Array]) -> dict[str, Array]:
    """Sorts rows by layer, token and rank, and leaves out what a later step replaced."""
    order = np.lexsort([held[n] for n in ("rank", "step", *reversed(_CELL))])
    held = {name: values[order] for name, values in held.items()}
    if not len(order):
        return held
    begins = _changes(held, _CELL)
    starts = np.flatnonzero(begins)
    cell = np.cumsum(begins) - 1
    last = np.append(starts[1:], len(order)) - 1
    held = {name: values[held["step"] == held["step"][last][cell]] for name, values in held.items()}
    if not _changes(held, (*_CELL, "rank")).all():
        raise SchemaError(
            "Column 'rank' of the routing frame: a token has the same rank twice in a layer. Were "
            "several recordings joined, their runs must differ; see `moelab.metrics.labelled`."
        )
    return held


def _changes(held: Mapping[str, Array], by: Sequence[str]) -> Array:
    """bool (rows,): any of these columns differs from the row before; True in the first."""
    changes = np.zeros(len(held[by[0]]), np.bool_)
    changes[:1] = True
    for name in by:
        changes[1:] |= held[name][1:] != held[name][:-1]
    return changes


def _texts(held: Mapping[str, Array]) -> Array:
    by = ("document",) if "document" in held else ("run", "sequence")
    text = held["domain"]
    for name in by:
        pair = text * (int(held[name].max(initial=0)) + 1) + held[name]
        text = np.unique(pair, return_inverse=True)[1].astype(np.int64)
    return text


def _group(
    held: Mapping[str, Array], domains: Sequence[str], phases: Sequence[str], sizes: Mapping[int, int]
) -> Choices:
    begins = _changes(held, ("run", "sequence", "position"))
    first = np.flatnonzero(begins)
    row = np.cumsum(begins) - 1
    place = np.arange(len(row)) - first[row]
    shape = (len(first), int(place.max()) + 1)

    def spread(values: Array, fill: Any, dtype: Any) -> Array:
        table = np.full(shape, fill, dtype)
        table[row, place] = values
        return table

    layer = int(held["layer"][0])
    ids = spread(held["expert"], -1, np.int32)
    _check_distinct(ids, layer)
    return Choices(
        domains[int(held["domain"][0])],
        phases[int(held["phase"][0])],
        layer,
        sizes[layer],
        ids,
        *(held[name][first] for name in ("run", "sequence", "position", "text")),
        token_id=held["token_id"][first] if "token_id" in held else None,
        weights=spread(held["weight"], 0.0, np.float64) if "weight" in held else None,
        hits=spread(held["hit"], True, np.bool_) if "hit" in held else None,
    )


def _check_distinct(ids: Array, layer: int) -> None:
    ordered = np.sort(ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise SchemaError(
            f"Column 'expert' of the routing frame: a token of layer {layer} chose the same expert "
            "twice, which no router does."
        )


def _present(values: Array) -> Iterable[int]:
    return np.unique(values).tolist()


def tidy(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Makes a frame of rows, with these columns also where there is none."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(columns))
