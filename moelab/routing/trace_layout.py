"""The layout of a trace, version 1, and what a file must have to be one.

A parquet file with a row a routed slot, sorted by layer, then token, then rank, so that a reader
can take one layer at a time; a row group holds rows of one layer only.

| column     | type                 | meaning                                                  |
|------------|----------------------|----------------------------------------------------------|
| `token`    | int32                | place of the token in order of time, from 0              |
| `run`      | int32                | one cache's life, numbered from 0                        |
| `sequence` | int32                | sequence within a batch                                  |
| `step`     | int32                | forward pass within the run, from 0                      |
| `position` | int32                | tokens in the cache before this one                      |
| `phase`    | string, dictionary   | "prefill", "decode" or "padding"                         |
| `document` | string, dictionary   | the text that the run read or began with                 |
| `domain`   | string, dictionary   | its domain; "" where none is known                       |
| `layer`    | int16                | decoder layer                                            |
| `rank`     | int16                | 0 for the token's highest weight in this layer           |
| `expert`   | int32                | the expert                                               |
| `weight`   | float32              | gate weight; NaN where it is not known                   |
| `token_id` | int32, may lack      | the token; −1 where an embedding stood for it            |
| `text`     | string, may lack     | its text                                                 |

Slots that a family sends nowhere (weight 0) have no row. The file's key-value metadata has one
entry, `moelab_trace`, a JSON object: `format` (1), `model`, `model_type`, `fingerprint` (of the
checkpoint's headers), `layers`, `experts`, `top_k` (lists, a number a layer), `provenance`
("teacher-forced" or "generated"), `template` (the chat template's name, or null for raw text),
`domains`, `documents` (run, document and domain of each run), `tokens` and `slots` (counts),
`vocabulary` (size or null), `tokenizer` (hash or null), `licence` (of the texts, or null), `moelab`
(version), `recorded` (time or null).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SchemaError

FORMAT = 1
KEY = b"moelab_trace"
PROVENANCE = ("teacher-forced", "generated")

TYPES: Mapping[str, str] = {
    "token": "int32", "run": "int32", "sequence": "int32", "step": "int32", "position": "int32",
    "phase": "text", "document": "text", "domain": "text", "layer": "int16", "rank": "int16",
    "expert": "int32", "weight": "float32", "token_id": "int32", "text": "text",
}  # fmt: skip
"""Columns of a trace, in order."""
OPTIONAL = ("token_id", "text")
ABOUT = ("model", "fingerprint", "layers", "experts", "top_k", "provenance", "documents")
"""What the metadata must have."""


def check_columns(source: Path, schema: Any) -> None:
    """Refuses a file whose columns are not those of the layout.

    Raises:
        SchemaError: If a column lacks or has another type.
    """
    import pyarrow.types as kinds

    for name, wanted in TYPES.items():
        if name not in schema.names:
            if name in OPTIONAL:
                continue
            raise SchemaError(f"{source} lacks the column {name}.")
        kind = schema.field(name).type
        if kinds.is_dictionary(kind):
            kind = kind.value_type
        text = kinds.is_string(kind) or kinds.is_large_string(kind)
        if not (text if wanted == "text" else str(kind) in (wanted, wanted.replace("32", ""))):
            raise SchemaError(f"{source}: the column {name} is {kind}, and it must be {wanted}.")


def row_groups(metadata: Any, schema: Any) -> dict[int, list[int]]:
    """Finds the row groups of each layer by their statistics."""
    found: dict[int, list[int]] = {}
    if "layer" not in schema.names:
        return found
    column = schema.names.index("layer")
    for number in range(metadata.num_row_groups):
        told = metadata.row_group(number).column(column).statistics
        if told is None or not told.has_min_max or told.min != told.max:
            raise ValueError("a row group has rows of more than one layer")
        found.setdefault(int(told.min), []).append(number)
    return found
