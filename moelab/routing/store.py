"""Recorded columns while they grow: compact, append-only, and whole after an interrupt.

Frames are built from these on demand. Memory while recording is what counts (1,000 tokens of a
48-layer top-10 model are 480,000 routed slots), so columns are typed arrays of 7 bytes a slot,
and whatever a row shares with its token is kept once a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOKEN_COLUMNS = {
    "run": "i", "sequence": "i", "step": "i", "position": "i", "token_id": "i", "phase": "B",
    "logprob": "f", "entropy": "f", "seconds": "f", "layers": "H",
}  # fmt: skip
ROUTING_COLUMNS = {"expert": "H", "weight": "f", "miss": "B"}
LOAD_COLUMNS = {"token_row": "q", "layer": "H", "expert": "H", "seconds": "f"}


@dataclass(slots=True)
class Rows:
    """What one step adds. Token columns have one value a token, in the step's order."""

    tokens: dict[str, np.ndarray]
    routing: dict[str, np.ndarray]
    """Values by token, layer and rank as the router gave them, flat."""
    loads: dict[str, np.ndarray]
    """`token_row` counts from the step's first token."""


class Store:
    """Growing columns.

    Args:
        layout: Layer number and top-k of each MoE layer, in the order in which they run.
    """

    def __init__(self, layout: Sequence[tuple[int, int]]) -> None:
        self.layout = list(layout)
        self._tokens = {name: array(code) for name, code in TOKEN_COLUMNS.items()}
        self._routing = {name: array(code) for name, code in ROUTING_COLUMNS.items()}
        self._loads = {name: array(code) for name, code in LOAD_COLUMNS.items()}
        # Rows of each table that are whole, and the last step that they hold. Set in one
        # statement, after all columns have grown: an interrupt leaves it at the step before.
        self._whole = (0, 0, 0, -1)

    @property
    def last_step(self) -> int:
        """Serial number of the last step that was added; -1 before the first."""
        return self._whole[3]

    def __len__(self) -> int:
        return self._whole[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the columns take."""
        columns = [*self._tokens.values(), *self._routing.values(), *self._loads.values()]
        return sum(len(column) * column.itemsize for column in columns)

    def add(self, serial: int, rows: Rows) -> None:
        """Appends one step.

        Args:
            serial: Number of the step, ascending; a step that was already added is ignored.
            rows: Its rows.
        """
        tokens, routing, loads, last = self._whole
        if serial <= last:
            return
        rows.loads["token_row"] = rows.loads["token_row"] + tokens
        tokens = _grow(self._tokens, tokens, rows.tokens)
        routing = _grow(self._routing, routing, rows.routing)
        loads = _grow(self._loads, loads, rows.loads)
        self._whole = (tokens, routing, loads, serial)

    def tokens(self) -> dict[str, np.ndarray]:
        """Returns the token columns."""
        return _arrays(self._tokens, self._whole[0])

    def routing(self) -> dict[str, np.ndarray]:
        """Returns the routing columns, with `token_row`, `layer` and `rank` worked out."""
        columns = _arrays(self._routing, self._whole[1])
        layers = np.frombuffer(self._tokens["layers"], np.uint16)[: self._whole[0]]
        slots_of = np.concatenate([[0], np.cumsum([k for _, k in self.layout])]).astype(np.int64)
        counts = slots_of[layers]
        token_row = np.repeat(np.arange(len(layers)), counts)
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        slot = np.arange(len(token_row)) - np.repeat(starts, counts)
        index = np.repeat(np.arange(len(self.layout)), [k for _, k in self.layout])[slot]
        # Within a token's layer, the highest weight first; the router's own order settles ties.
        order = np.lexsort((-columns["weight"], index, token_row))
        rank = slot - slots_of[index]
        layer = np.array([layer for layer, _ in self.layout], np.int16)[index]
        return {
            "token_row": token_row,
            "layer": layer,
            "rank": rank,
            **{name: values[order] for name, values in columns.items()},
        }

    def loads(self) -> dict[str, np.ndarray]:
        """Returns the load columns; `token_row` is the row of the token that asked."""
        return _arrays(self._loads, self._whole[2])


def _grow(columns: dict[str, array], whole: int, values: dict[str, np.ndarray]) -> int:
    """Appends to every column, cutting off what an interrupt left; returns the new length."""
    added = 0
    for name, column in columns.items():
        del column[whole:]
        new = np.ascontiguousarray(values[name], dtype=column.typecode)
        column.frombytes(new.tobytes())
        added = new.size
    return whole + added


def _arrays(columns: dict[str, array], rows: int) -> dict[str, np.ndarray]:
    # Copies: a view would forbid the array to grow.
    return {
        name: np.array(np.frombuffer(column, dtype=column.typecode)[:rows])
        for name, column in columns.items()
    }
