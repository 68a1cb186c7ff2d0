"""Traces: what a router chose, as one parquet file that others can publish and read.

A recording says how one bank fared; a trace leaves the bank out and keeps the routing, so that it
can be replayed at any capacity and under any lossless policy, and says which model it is of and how
the text came about.

`export_trace` writes one and `read_trace` opens it; `trace_layout` says what is in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import SchemaError, StudyError
from .columns import SCHEMA
from .loop import PHASES
from .streams import LayerStream, stream
from .trace_layout import ABOUT, FORMAT, KEY, check_columns, row_groups
from .trace_writing import export_trace

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Trace", "export_trace", "read_trace"]


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
            groups = row_groups(metadata, schema)
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
    check_columns(source, schema)
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


def _as_recorded(frame: pd.DataFrame) -> pd.DataFrame:
    """Names and orders columns as in a recording, with those that only a trace has at the end."""
    frame = frame.drop(columns="token")
    if "text" in frame.columns:
        frame["text"] = frame["text"].astype("str").astype("category")
        frame = frame.rename(columns={"text": "token"})
    ours = [name for name in SCHEMA["routing"] if name in frame.columns]
    return frame[[*ours, "document", "domain"]]
