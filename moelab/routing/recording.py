"""`Recording`: what was recorded, as frames, on disk and in figures."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MoelabError
from .columns import SCHEMA, typed
from .metrics import expert_shares, miss_rates
from .store import Store

if TYPE_CHECKING:
    import pandas as pd

TABLES = tuple(SCHEMA)
FORMAT = 1
"""Version of the folder that `save` writes."""


class Recording:
    """Frames of one recording.

    `routing` has a row a (token, layer, rank), `tokens` a row a token, `loads` a row an expert
    that was read. Columns and dtypes: `moelab.routing.columns.SCHEMA`. While the recording is
    under way the frames show what has been read so far.

    Args:
        run: The manifest: which model, how it was run, on what.
        build: Makes a frame by the table's name.
    """

    def __init__(self, run: dict[str, Any], build: Callable[[str], pd.DataFrame]) -> None:
        self.run = run
        self._build = build
        self._frames: dict[str, pd.DataFrame] = {}
        self._complete = False

    @property
    def routing(self) -> pd.DataFrame:
        """A row a (token, layer, rank)."""
        return self._frame("routing")

    @property
    def tokens(self) -> pd.DataFrame:
        """A row a token."""
        return self._frame("tokens")

    @property
    def loads(self) -> pd.DataFrame:
        """A row an expert load."""
        return self._frame("loads")

    def misses(self, by: Sequence[str] | str = ()) -> pd.DataFrame:
        """The three miss figures; see `moelab.routing.metrics.miss_rates`."""
        return miss_rates(self.routing, by)

    def expert_shares(self) -> pd.DataFrame:
        """Expert use by layer; see `moelab.routing.metrics.expert_shares`."""
        return expert_shares(self.routing)

    def complete(self) -> None:
        """Says that no more rows will come, so that frames may be kept once they are built."""
        self._frames.clear()
        self._complete = True

    def save(self, folder: str | Path) -> Path:
        """Writes the recording to a folder, whole or not at all.

        Args:
            folder: Is made; if it exists it must be a recording, which is replaced.

        Returns:
            The folder: `routing.parquet`, `tokens.parquet`, `loads.parquet`, `run.json`.

        Raises:
            MoelabError: If the folder exists and is no recording.
        """
        target = Path(folder).expanduser()
        if target.exists() and not (target / "run.json").exists() and any(target.iterdir()):
            raise MoelabError(f"{target} exists and is no recording; it is left alone.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
            for table in TABLES:
                self._frame(table).to_parquet(Path(made) / f"{table}.parquet", index=False)
            text = json.dumps({"format": FORMAT, **self.run}, indent=2)
            (Path(made) / "run.json").write_text(text)
            Path(made).chmod(0o755)  # a temporary folder is private; a recording need not be
            if target.exists():
                shutil.rmtree(target)
            Path(made).rename(target)
            Path(made).mkdir()  # for the context manager to remove
        return target

    def _frame(self, table: str) -> pd.DataFrame:
        if table in self._frames:
            return self._frames[table]
        frame = self._build(table)
        if self._complete:
            self._frames[table] = frame
        return frame

    def _summary(self) -> dict[str, str]:
        tokens = self.tokens
        if tokens.empty:
            return {"tokens": "none yet"}
        phases = tokens["phase"].value_counts()
        counts = ", ".join(f"{n} {phase}" for phase, n in phases.items() if n)
        routed = int(tokens["hits"].sum() + tokens["misses"].sum())
        return {
            "model": str(self.run.get("model", "?")),
            "capacity": str(self.run.get("capacity", "?")),
            "runs": str(tokens["run"].nunique()),
            "tokens": f"{len(tokens)} ({counts})",
            "routed": f"{routed:,} slots, {tokens['hits'].sum() / max(routed, 1):.1%} hits",
            "loads": f"{len(self.loads):,} experts, {tokens['bytes_read'].sum() / 1e6:,.1f} MB",
        }

    def __repr__(self) -> str:
        facts = self._summary()
        width = max(map(len, facts))
        return "Recording\n" + "\n".join(f"  {k:<{width}}  {v}" for k, v in facts.items())

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(k)}</th>"
            f"<td style='text-align:left'>{escape(v)}</td></tr>"
            for k, v in self._summary().items()
        )
        return f"<table><caption><b>Recording</b></caption>{rows}</table>"


def read_recording(folder: str | Path) -> Recording:
    """Reads what `Recording.save` wrote.

    Raises:
        MoelabError: If the folder holds no recording, or one of a later format.
    """
    import pandas as pd

    path = Path(folder).expanduser()
    try:
        run = json.loads((path / "run.json").read_text())
        version = run.pop("format")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise MoelabError(f"{path} holds no recording ({error!r}).") from error
    if version != FORMAT:
        raise MoelabError(f"{path} has format {version}, and this moelab reads format {FORMAT}.")

    def build(table: str) -> pd.DataFrame:
        return typed(table, pd.read_parquet(path / f"{table}.parquet"))

    recording = Recording(run, build)
    recording.complete()
    return recording


def frame_builder(
    store: Store, texts_of: Callable[[np.ndarray], dict[int, str]], load_bytes: dict[int, int]
) -> Callable[[str], pd.DataFrame]:
    """Returns what builds frames from a store.

    Args:
        store: The columns.
        texts_of: Gives the text of each of some token ids.
        load_bytes: Bytes of one load, by layer.
    """

    def shared(tokens: dict[str, np.ndarray], rows: Any) -> tuple[dict[str, np.ndarray], list[str]]:
        names = texts_of(np.unique(tokens["token_id"]))
        texts = sorted(set(names.values()))
        code_of = {text: code for code, text in enumerate(texts)}
        codes = {token: code_of[text] for token, text in names.items()}
        token = np.array([codes[t] for t in tokens["token_id"].tolist()], np.int32)
        keys = ("run", "sequence", "step", "position", "token_id", "phase")
        return {**{k: tokens[k][rows] for k in keys}, "token": token[rows]}, texts

    def bytes_of(loads: dict[str, np.ndarray]) -> np.ndarray:
        layers = loads["layer"].tolist()
        return np.array([load_bytes[layer] for layer in layers], np.int64)

    def build(table: str) -> pd.DataFrame:
        tokens = store.tokens()
        count = len(tokens["run"])
        if table == "loads":
            loads = store.loads()
            keys = ("run", "sequence", "step", "position")
            return typed(
                table,
                {
                    **{k: tokens[k][loads["token_row"]] for k in keys},
                    "layer": loads["layer"],
                    "expert": loads["expert"],
                    "bytes": bytes_of(loads),
                    "seconds": loads["seconds"],
                },
            )
        routing = store.routing()
        if table == "routing":
            columns, texts = shared(tokens, routing["token_row"])
            columns.update({k: routing[k] for k in ("layer", "rank", "expert", "weight")})
            columns["hit"] = routing["miss"] == 0
            return typed(table, columns, texts)
        columns, texts = shared(tokens, slice(None))
        misses = np.bincount(routing["token_row"], routing["miss"], count).astype(np.int64)
        routed = np.bincount(routing["token_row"], minlength=count)
        loads = store.loads()
        columns.update({k: tokens[k] for k in ("logprob", "entropy", "seconds")})
        columns["misses"], columns["hits"] = misses, routed - misses
        columns["bytes_read"] = np.bincount(loads["token_row"], bytes_of(loads), count)
        return typed(table, columns, texts)

    return build
