"""Writes traces; `trace_layout` says what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MoelabError, StudyError
from .documents import documents_of
from .events import check_frame
from .recording import Recording
from .recovery import recover, token_rows
from .trace_layout import FORMAT, KEY, OPTIONAL, PROVENANCE, TYPES

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

GROUP_ROWS = 1 << 20
"""Rows of a row group at most."""


def export_trace(
    recording: Recording,
    path: str | Path,
    *,
    provenance: str,
    template: str | None = None,
    documents: pd.DataFrame | Mapping[int, Any] | None = None,
    token_ids: bool = False,
    text: bool = False,
    vocabulary: int | None = None,
    tokenizer: str | None = None,
    licence: str | None = None,
) -> Path:
    """Writes a recording's routing as a trace, whole or not at all; see `trace_layout`.

    Tokens that a crash or an interrupt cut short are left out, with a warning.

    Args:
        recording: Of a lossless run.
        path: The file; its folder is made, and a trace that is there is replaced.
        provenance: "teacher-forced" if the decoded tokens are a given text's, "generated" if the
            model chose them.
        template: The chat template's name; None for raw text.
        documents: Document and domain of each run: a frame with `run`, `document` and perhaps
            `domain`, or a mapping from run to a name or to (name, domain). By default a run's
            number stands for its document.
        token_ids: Write the tokens' ids. Off by default: they give the text away.
        text: Write the tokens' texts.
        vocabulary: Tokens that the tokenizer knows.
        tokenizer: Hash of the tokenizer.
        licence: Of the texts.

    Returns:
        The path.

    Raises:
        ReplayError: If the recording is of a lossy run: its routing is not the model's own.
        StudyError: If an argument is not known, or there is no whole token.
        MoelabError: If the file cannot be written.
    """
    import pyarrow as pa

    if provenance not in PROVENANCE:
        raise StudyError(
            f"provenance must be 'teacher-forced' (the decoded tokens are a given text's) or "
            f"'generated' (the model chose them), got {provenance!r}."
        )
    routing, run = recording.routing, recording.run
    check_frame(routing)
    routing = recover(routing, run["layers"], run["top_k"])
    known = documents_of(documents, routing["run"].unique().tolist())
    token = token_rows(routing)
    about = {
        "model": run["model"],
        "model_type": run.get("model_type"),
        "fingerprint": run["fingerprint"],
        **{name: run[name] for name in ("layers", "experts", "top_k")},
        "provenance": provenance,
        "template": template,
        "domains": sorted({one.domain for one in known}),
        "documents": [[one.run, one.document, one.domain] for one in known],
        "tokens": int(token[-1]) + 1,
        "slots": len(routing),
        "vocabulary": vocabulary,
        "tokenizer": tokenizer,
        "licence": licence,
        "recorded": run.get("started"),
    }
    place = {one.run: i for i, one in enumerate(known)}
    which = routing["run"].map(place).to_numpy()
    more = [name for name, wanted in (("token_id", token_ids), ("text", text)) if wanted]

    def tables() -> Iterator[pa.Table]:
        layers = routing["layer"].to_numpy()
        for layer in run["layers"]:
            rows = np.flatnonzero(layers == layer)
            part = routing.iloc[rows]
            columns = {
                name: pa.array(part[name].to_numpy())
                for name in TYPES
                if name in part.columns and TYPES[name] != "text"
            }
            columns["token"] = pa.array(token[rows].astype(np.int32))
            columns["phase"] = _text(part["phase"].to_numpy())
            columns["document"] = _coded(which[rows], [one.document for one in known])
            columns["domain"] = _coded(which[rows], [one.domain for one in known])
            if text:
                columns["text"] = _text(part["token"].to_numpy())
            yield pa.table({n: columns[n] for n in TYPES if n not in OPTIONAL or n in more})

    return write_tables(path, about, tables())


def write_tables(path: str | Path, about: Mapping[str, Any], tables: Iterable[Any]) -> Path:
    """Writes a trace from pyarrow tables, one a layer, whole or not at all.

    For whoever makes a trace in another way than by recording.

    Args:
        path: The file.
        about: The metadata; `format` and `moelab` are added.
        tables: A layer each, with the layout's columns, sorted by token and rank.

    Raises:
        MoelabError: If the file cannot be written.
    """
    import pyarrow.parquet as pq

    from .. import __version__

    target = Path(path).expanduser()
    if target.is_dir():
        raise MoelabError(f"{target} is a folder; a trace is one file. Name one in it.")
    part = target.with_name(f".{target.name}-{os.getpid()}.part")
    told = json.dumps({"format": FORMAT, "moelab": __version__, **about})
    writer = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for table in tables:
            if writer is None:
                schema = table.schema.with_metadata({KEY: told.encode()})
                small = [n for n, kind in TYPES.items() if kind in ("text", "int16")]
                plain = dict.fromkeys(list(TYPES)[:5], "DELTA_BINARY_PACKED")
                writer = pq.ParquetWriter(
                    part, schema, compression="zstd", column_encoding=plain,
                    use_dictionary=[n for n in [*small, "expert"] if n in schema.names],
                )  # fmt: skip
            writer.write_table(table.cast(writer.schema), row_group_size=GROUP_ROWS)
        if writer is None:
            raise StudyError("A trace needs at least one layer.")
        writer.close()
        part.replace(target)
    except OSError as error:
        raise MoelabError(f"The trace cannot be written to {target}: {error}") from error
    finally:
        if writer is not None:
            writer.close()
            part.unlink(missing_ok=True)
    return target


def _text(values: Any) -> Any:
    import pyarrow as pa

    return pa.array(values.astype(object), pa.string()).dictionary_encode()


def _coded(codes: np.ndarray, names: list[str]) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names))
