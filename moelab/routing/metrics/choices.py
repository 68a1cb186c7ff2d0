"""A recording taken apart by domain, phase and layer: what every routing metric begins with.

A metric never pools phases: a phase is part of the key of each result, and `padding` is left out.
A draft that was rejected is left out too: where several rows have the same position in a sequence,
those of the last step stand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import SchemaError, StudyError
from .frames import Array, Experts, column, experts_by_layer, frame_of, known_experts, names

ALL = "all"
"""The domain of what has none."""

PADDING = "padding"

_CELL = ("layer", "run", "sequence", "position")
"""One token at one layer."""

_EXTRA = {"token_id": "integer", "weight": "number", "hit": "flag"}


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
        """(tokens,), bool: the row before is the token before, of the same run and sequence."""
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
    present = [phases[code] for code in _present(held["phase"]) if phases[code] != PADDING]
    if phase is not None and phase not in present:
        raise StudyError(
            f"There is no phase {phase!r} in the routing frame; it has "
            f"{', '.join(present) or 'no rows'}."
        )
    real = np.array([name != PADDING for name in phases], np.bool_)
    held = _standing({name: values[real[held["phase"]]] for name, values in held.items()})
    wanted = phases if phase is None else [phase]
    keep = np.isin(held["phase"], [phases.index(name) for name in wanted])
    held = {name: values[keep] for name, values in held.items()}
    highest = {
        int(n): int(held["expert"][held["layer"] == n].max()) for n in _present(held["layer"])
    }
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
        for a, b in itertools.pairwise(edges)
    ]


def _standing(held: dict[str, Array]) -> dict[str, Array]:
    """Sorts rows by layer, token and rank, and leaves out what a later step replaced."""
    order = _order(held, (*_CELL, "step", "rank"))
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


def _order(held: Mapping[str, Array], by: Sequence[str]) -> Array:
    """Returns the rows sorted by these columns, the first one first."""
    widths = [int(held[name].max(initial=0)) + 1 for name in by]
    if math.prod(widths) >= 1 << 62:
        return np.lexsort([held[name] for name in reversed(by)])
    key = np.zeros(len(held[by[0]]), np.int64)  # one number a row sorts several times faster
    for name, width in zip(by, widths, strict=True):
        key = key * width + held[name]
    return np.argsort(key, kind="stable")


def _changes(held: Mapping[str, Array], by: Sequence[str]) -> Array:
    """Returns (rows,), bool: whether any of these columns differs from the row before."""
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
    held: Mapping[str, Array],
    domains: Sequence[str],
    phases: Sequence[str],
    sizes: Mapping[int, int],
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
        domain=domains[int(held["domain"][0])],
        phase=phases[int(held["phase"][0])],
        layer=layer,
        experts=sizes[layer],
        ids=ids,
        run=held["run"][first],
        sequence=held["sequence"][first],
        position=held["position"][first],
        text=held["text"][first],
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


def _present(values: Array) -> list[int]:
    return np.unique(values).tolist()
