"""Recorded rows while they grow: compact, append-only, and whole after an interrupt.

Frames are built from these on demand. Memory while recording is what counts (1,000 tokens of a
48-layer top-10 model are 480,000 routed slots), so a row is a packed record, 7 bytes a routed
slot, and whatever a slot shares with its token is kept once a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOKEN = np.dtype(
    [
        ("run", np.int32), ("sequence", np.int32), ("step", np.int32), ("position", np.int32),
        ("token_id", np.int32), ("phase", np.uint8), ("logprob", np.float32),
        ("entropy", np.float32), ("seconds", np.float32), ("layers", np.uint16),
    ]
)  # fmt: skip
"""A token. `layers` counts the MoE layers that it reached: all, unless it was interrupted."""

NARROW = np.iinfo(np.uint16).max
"""Largest expert id that two bytes hold."""


@dataclass(slots=True)
class Rows:
    """What one step adds."""

    tokens: np.ndarray
    """`TOKEN` records, in the step's order."""
    routing: np.ndarray
    """`Store.slot` records by token, layer and rank as the router gave them."""
    loads: np.ndarray | None = None
    """`Store.load` records; `token_row` counts from the store's first token."""


class Store:
    """Growing tables.

    Args:
        layout: Layer number and top-k of each MoE layer, in the order in which they run.
        experts: Largest number of experts of any layer.
        lossy: Keep what a lossy miss action made of each routed slot; 9 bytes more.
    """

    def __init__(
        self, layout: Sequence[tuple[int, int]], experts: int = NARROW, *, lossy: bool = False
    ) -> None:
        self.layout = list(layout)
        self.lossy = lossy
        expert = np.uint16 if experts <= NARROW + 1 else np.uint32
        slot = [("expert", expert), ("weight", np.float32), ("miss", np.uint8)]
        more = [("computed", np.int32), ("applied", np.float32), ("outcome", np.uint8)]
        self.slot = np.dtype([*slot, *more] if lossy else slot)
        """A routed slot: its token and layer follow from its place."""
        self.load = np.dtype(
            [("token_row", np.uint32), ("layer", np.uint16), ("expert", expert),
             ("seconds", np.float32)]
        )  # fmt: skip
        """An expert that was read."""
        self._buffers = (bytearray(), bytearray(), bytearray())
        # Bytes of each buffer that are whole, and the last step that they hold. Set in one
        # statement, after all have grown: an interrupt leaves it at the step before.
        self._whole = (0, 0, 0, -1)

    @property
    def last_step(self) -> int:
        """Serial number of the last step that was added; -1 before the first."""
        return self._whole[3]

    def __len__(self) -> int:
        return self._whole[0] // TOKEN.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(self._whole[:3])

    def add(self, serial: int, rows: Rows) -> None:
        """Appends one step.

        Args:
            serial: Number of the step, ascending; a step that was already added is ignored.
            rows: Its rows.
        """
        tokens, routing, loads, last = self._whole
        if serial <= last:
            return
        kept = self._buffers
        self._whole = (
            _grow(kept[0], tokens, rows.tokens.tobytes()),
            _grow(kept[1], routing, rows.routing.tobytes()),
            _grow(kept[2], loads, b"" if rows.loads is None else rows.loads.tobytes()),
            serial,
        )

    def tokens(self) -> np.ndarray:
        """Returns the tokens, as `TOKEN` records."""
        return self._records(0, TOKEN)

    def routing(self) -> dict[str, np.ndarray]:
        """Returns the routed slots, with `token_row`, `layer` and `rank` worked out.

        A slot of weight 0 is not routed (a family that has identity experts sends them nowhere
        under the id of a real one) and is left out. Where the weight is not known it is NaN.
        """
        slots = self._records(1, self.slot)
        layers = self.tokens()["layers"]
        slots_of = np.concatenate([[0], np.cumsum([k for _, k in self.layout])]).astype(np.int64)
        counts = slots_of[layers]
        token_row = np.repeat(np.arange(len(layers)), counts)
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        place = np.arange(len(token_row)) - np.repeat(starts, counts)
        index = np.repeat(np.arange(len(self.layout)), [k for _, k in self.layout])[place]
        # Within a token's layer, the highest weight first; the router's own order settles ties.
        order = np.lexsort((-slots["weight"], index, token_row))
        columns = {
            "token_row": token_row,
            "layer": np.array([layer for layer, _ in self.layout], np.int16)[index],
            "rank": place - slots_of[index],
            **{name: slots[name][order] for name in self.slot.names or ()},
        }
        if not self.lossy:
            columns["computed"] = columns["expert"]
            columns["applied"] = columns["weight"]
            columns["outcome"] = columns["miss"]  # 0 and 1: hit and load
        routed = columns["weight"] != 0
        return columns if routed.all() else {k: v[routed] for k, v in columns.items()}

    def loads(self) -> np.ndarray:
        """Returns the loads; `token_row` is the row of the token that was first to ask."""
        return self._records(2, self.load)

    def _records(self, table: int, dtype: np.dtype) -> np.ndarray:
        # A copy: a view would forbid the buffer to grow.
        return np.frombuffer(self._buffers[table][: self._whole[table]], dtype)


def _grow(buffer: bytearray, whole: int, added: bytes) -> int:
    """Appends, cutting off what an interrupt left; returns the new length."""
    if len(buffer) != whole:
        del buffer[whole:]
    buffer += added
    return whole + len(added)
