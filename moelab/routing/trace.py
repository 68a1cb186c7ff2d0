"""Traces: what a router chose, as one parquet file that others can publish and read.

A recording says how one bank fared; a trace leaves the bank out and keeps the routing, so that it
can be replayed at any capacity and under any lossless policy, and says which model it is of and how
the text came about.

The layout, version 1. A parquet file with a row a routed slot, sorted by layer, then token, then
rank, so that a reader can take one layer at a time; a row group holds rows of one layer only.

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

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import MoelabError, SchemaError, StudyError
from .columns import SCHEMA
from .documents import documents_of
from .events import check_frame
from .loop import PHASES
from .recording import Recording
from .recovery import recover, token_rows
from .streams import LayerStream, stream

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
KEY = b"moelab_trace"
PROVENANCE = ("teacher-forced", "generated")
GROUP_ROWS = 1 << 20
"""Rows of a row group at most."""

TYPES: Mapping[str, str] = {
    "token": "int32", "run": "int32", "sequence": "int32", "step": "int32", "position": "int32",
    "phase": "text", "document": "text", "domain": "text", "layer": "int16", "rank": "int16",
    "expert": "int32", "weight": "float32", "token_id": "int32", "text": "text",
}  # fmt: skip
"""Columns of a trace, in order."""
OPTIONAL = ("token_id", "text")
ABOUT = ("model", "fingerprint", "layers", "experts", "top_k", "provenance", "documents")
"""What the metadata must have."""


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
    """Writes a recording's routing as a trace, whole or not at all; see the module for the layout.

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


class Trace:
    """A trace that was opened; rows are read when they are asked for.

    `moelab.curves` takes it as it is, a layer at a time. `moelab.replay` and the metrics take
    `trace.routing`; give the replay `experts=trace.experts`.

    Attributes:
        path: The file.
        about: The metadata.
    """

    def __init__(self, path: Path, about: dict[str, Any], groups: dict[int, list[int]]) -> None:
        self.path = path
        self.about = about
        self._groups = groups

    @property
    def layers(self) -> list[int]:
        """The MoE layers, ascending."""
        return list(self.about["layers"])

    @property
    def experts(self) -> dict[int, int]:
        """Experts by layer."""
        return dict(zip(self.layers, self.about["experts"], strict=True))

    @property
    def top_k(self) -> dict[int, int]:
        """Experts a token, by layer."""
        return dict(zip(self.layers, self.about["top_k"], strict=True))

    @property
    def documents(self) -> pd.DataFrame:
        """`run`, `document` and `domain`, a row a run."""
        import pandas as pd

        frame = pd.DataFrame(self.about["documents"], columns=["run", "document", "domain"])
        return frame.astype({"run": "int32"})

    @property
    def routing(self) -> pd.DataFrame:
        """All rows in order of time, as a recording's `routing` has them; read each time.

        The columns of the layout without `token`; `token` is there as the text's name is in a
        recording, if the trace has texts.
        """
        import pandas as pd

        parts = [self._read(layer) for layer in self.layers if layer in self._groups]
        whole = pd.concat(parts, ignore_index=True)
        order = np.lexsort([whole[name].to_numpy() for name in ("rank", "layer", "token")])
        return _as_recorded(whole.iloc[order].reset_index(drop=True))

    def layer(self, layer: int) -> pd.DataFrame:
        """The rows of one layer, in order of time.

        Raises:
            StudyError: If the trace has no such layer.
        """
        if layer not in self._groups:
            raise StudyError(f"The trace has no layer {layer}; it has {sorted(self._groups)}.")
        return _as_recorded(self._read(layer))

    def streams(self, experts: int | Mapping[int, int] | None = None) -> Iterator[LayerStream]:
        """Yields the layers as `moelab.curves` wants them, one at a time in memory."""
        if experts is not None:
            raise StudyError("A trace says how many experts there are; leave out experts=.")
        names = ["run", "step", "phase", "expert", "weight"]
        for layer in self.layers:
            if layer not in self._groups:
                continue
            table = self._table(layer, names)
            run, step = (table[name].to_numpy() for name in ("run", "step"))
            new = (run[1:] != run[:-1]) | (step[1:] != step[:-1])
            event = np.concatenate([[0], np.cumsum(new)])
            first = np.append(0, np.flatnonzero(new) + 1)
            phase = np.zeros(len(first), np.int8)
            code = table["phase"].combine_chunks()
            known = np.array([PHASES.index(name) for name in code.dictionary.to_pylist()], np.int8)
            codes = known[code.indices.to_numpy()]
            for name in ("decode", "prefill"):
                phase[event[codes == PHASES.index(name)]] = PHASES.index(name)
            yield stream(
                layer, self.experts[layer], self.top_k[layer], event, table["expert"].to_numpy(),
                table["weight"].to_numpy(), run[first].astype(np.int64), phase,
            )  # fmt: skip

    def _read(self, layer: int) -> pd.DataFrame:
        import pandas as pd

        frame = self._table(layer, None).to_pandas()
        fixed = {"phase": list(PHASES)}
        for name, place in (("document", 1), ("domain", 2)):
            fixed[name] = list(dict.fromkeys(row[place] for row in self.about["documents"]))
        for name, categories in fixed.items():
            given = frame[name].astype("str")
            others = sorted(set(given.unique()) - set(categories))
            if others:
                raise SchemaError(
                    f"{self.path}: the column {name} has {others[0]!r}, of which the metadata "
                    f"knows nothing; it has {', '.join(map(repr, categories[:5]))}."
                )
            frame[name] = given.astype(pd.CategoricalDtype(pd.Index(categories, dtype="str")))
        return frame

    def _table(self, layer: int, columns: list[str] | None) -> Any:
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                table = file.read_row_groups(self._groups[layer], columns=columns)
        except (OSError, ValueError) as error:
            raise StudyError(f"The trace {self.path} cannot be read: {error}") from error
        return table.unify_dictionaries()

    def _summary(self) -> dict[str, str]:
        about = self.about
        experts, top_k = sorted(set(about["experts"])), sorted(set(about["top_k"]))
        return {
            "model": f"{about['model']}, fingerprint {about['fingerprint']}",
            "layers": f"{len(about['layers'])}, top-{'/'.join(map(str, top_k))} of "
            f"{'/'.join(map(str, experts))} experts",
            "tokens": f"{about.get('tokens', 0):,}, {about['provenance']}, "
            f"template {about.get('template') or 'none'}",
            "documents": f"{len(about['documents'])} runs, domains "
            f"{', '.join(filter(None, about.get('domains', []))) or 'not named'}",
            "texts' licence": str(about.get("licence") or "not said"),
        }

    def __repr__(self) -> str:
        return facts_text(f"Trace {self.path.name}", self._summary())

    def _repr_html_(self) -> str:
        return facts_html(f"Trace {self.path.name}", self._summary())


def read_trace(path: str | Path, *, fingerprint: str | None = None) -> Trace:
    """Opens a trace.

    Args:
        path: The file.
        fingerprint: That the trace's model must have, such as `lab.fingerprint`.

    Raises:
        StudyError: If the file is no trace, is cut short, has another layout, or is of another
            model than was asked for.
        SchemaError: If a column lacks or has another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = Path(path).expanduser()
    if not source.is_file():
        raise StudyError(f"There is no file {source}.")
    try:
        with pq.ParquetFile(source) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = _groups(metadata, schema)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StudyError(
            f"{source} cannot be read as a trace: it is no parquet file, or was cut short when it "
            f"was written or copied ({error}). Export or copy it again."
        ) from error
    told = (schema.metadata or {}).get(KEY)
    if told is None:
        raise StudyError(
            f"{source} is parquet, but no trace: its metadata has no {KEY.decode()}. A recording's "
            "folder is read with moelab.read_recording."
        )
    about = json.loads(told)
    if about.get("format") != FORMAT:
        raise StudyError(
            f"{source} has trace layout {about.get('format')!r}, and this moelab reads {FORMAT}. "
            "Read it with the moelab that wrote it."
        )
    lacks = [name for name in ABOUT if name not in about]
    if lacks:
        raise StudyError(f"{source} does not say {', '.join(lacks)} in its metadata.")
    _check_columns(source, schema)
    others = sorted(set(groups) - set(about["layers"]))
    if others:
        raise SchemaError(
            f"{source}: the column layer has {others}, and the metadata has {about['layers']}."
        )
    if fingerprint is not None and fingerprint != about["fingerprint"]:
        raise StudyError(
            f"{source} is of {about['model']} with fingerprint {about['fingerprint']}, and "
            f"{fingerprint} was asked for."
        )
    return Trace(source, about, groups)


def _groups(metadata: Any, schema: Any) -> dict[int, list[int]]:
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


def _check_columns(source: Path, schema: Any) -> None:
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


def _as_recorded(frame: pd.DataFrame) -> pd.DataFrame:
    """Names and orders columns as in a recording, with those that only a trace has at the end."""
    frame = frame.drop(columns="token")
    if "text" in frame.columns:
        frame["text"] = frame["text"].astype("str").astype("category")
        frame = frame.rename(columns={"text": "token"})
    ours = [name for name in SCHEMA["routing"] if name in frame.columns]
    return frame[[*ours, "document", "domain"]]


def _text(values: Any) -> Any:
    import pyarrow as pa

    return pa.array(values.astype(object), pa.string()).dictionary_encode()


def _coded(codes: np.ndarray, names: list[str]) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names))
