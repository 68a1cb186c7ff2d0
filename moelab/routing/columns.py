"""The one schema of recorded frames: every column's name, dtype and meaning.

Frames are tidy: one grain a table, one row an observation. The dtypes here are what a frame has
in memory, in parquet, and after it was read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .loop import PHASES

OUTCOMES = ("hit", "load", "drop", "substitute", "low_bit", "reroute", "wrong_slot")
"""What can become of a routed slot, by code."""


class Column(NamedTuple):
    """One column."""

    dtype: str
    """numpy's name, or `"category"` for text with few values."""
    meaning: str


_KEYS = {
    "run": Column("int32", "One cache's life, numbered from 0: a chat is one run."),
    "sequence": Column("int32", "Sequence within a batch."),
    "step": Column("int32", "Forward pass within the run, numbered from 0."),
    "position": Column("int32", "Tokens in the cache before this one. Where a draft was rejected "
                       "a later row has the same position: the last one stands."),
}  # fmt: skip
_TOKEN = {
    "token_id": Column("int32", "The token's id; -1 where an embedding stood for it."),
    "token": Column("category", "Its text."),
    "phase": Column("category", "'prefill' for prompt tokens, 'decode' for generated ones, "
                    "'padding' for what fills up a batch."),
}  # fmt: skip

SCHEMA: Mapping[str, Mapping[str, Column]] = {
    "routing": {
        **_KEYS,
        **_TOKEN,
        "layer": Column("int16", "Decoder layer."),
        "rank": Column("int16", "0 for the token's highest weight in this layer."),
        "expert": Column("int32", "The expert that the router chose."),
        "weight": Column("float32", "Gate weight: the factor of the expert's output by the "
                         "family's own rule. NaN where it is not known; a slot of weight 0 is not "
                         "routed."),
        "hit": Column("bool", "The expert was resident when the step began."),
        "outcome": Column("category", "'hit', 'load' (read from disk, exact), or the lossy action "
                          "that a miss met with: 'drop', 'substitute', 'low_bit', 'reroute', "
                          "'wrong_slot'."),
        "computed": Column("int32", "The expert whose output was used: the same one unless the "
                           "outcome says otherwise; -1 where none was."),
        "applied": Column("float32", "The factor that was applied to that output: `weight` unless "
                          "an action changed it; 0 where no output was used."),
    },
    "tokens": {
        **_KEYS,
        **_TOKEN,
        "logprob": Column("float32", "Natural log-probability of this token given those before "
                          "it, by the raw model. NaN where it was not computed."),
        "entropy": Column("float32", "Nats; of the raw distribution that this token was drawn "
                          "from. NaN where it was not computed."),
        "hits": Column("int32", "Routed slots that were resident, all layers together."),
        "misses": Column("int32", "Routed slots that were not."),
        "bytes_read": Column("int64", "Bytes of the loads that this token was first to ask for."),
        "seconds": Column("float32", "Wall time of the forward pass, divided equally among its "
                          "tokens. What MLX leaves unfinished at its end counts to the next. NaN "
                          "where all layers are stock, since a pass then only builds a graph."),
    },
    "loads": {
        **_KEYS,
        "layer": Column("int16", "Decoder layer."),
        "expert": Column("int32", "The expert that was read."),
        "bytes": Column("int64", "Bytes read."),
        "seconds": Column("float32", "Time that the read took."),
    },
}  # fmt: skip
"""Tables by name, columns by name, in order. In `loads`, sequence and position are those of the
first token of the step that asked for the expert."""


def typed(table: str, columns: Mapping[str, Any], texts: list[str] | None = None) -> Any:
    """Builds a frame with exactly the columns and dtypes of the schema.

    Args:
        table: A key of `SCHEMA`.
        columns: Values by name. `phase` and `outcome` may be codes into `loop.PHASES` and
            `OUTCOMES`, and `token` codes into `texts`.
        texts: The texts that `token` codes point at.

    Returns:
        A `pandas.DataFrame`.
    """
    import numpy as np
    import pandas as pd

    # As text also where there is none: an empty list has no type, and parquet would keep none.
    categories = {
        "phase": pd.Index(PHASES, dtype="str"),
        "outcome": pd.Index(OUTCOMES, dtype="str"),
        "token": None if texts is None else pd.Index(texts, dtype="str"),
    }
    built = {}
    for name, column in SCHEMA[table].items():
        values = columns[name]
        if column.dtype != "category":
            built[name] = np.asarray(values).astype(column.dtype, copy=False)
            continue
        known = categories[name]
        if known is None:
            known = values.cat.categories.astype("str")
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
            built[name] = pd.Categorical.from_codes(values, categories=known)
        else:
            built[name] = pd.Categorical(values, categories=known)
    return pd.DataFrame(built)
