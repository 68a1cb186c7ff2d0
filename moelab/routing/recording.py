"""`Recording`: what was recorded, as frames, on disk and in figures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import MoelabError
from .columns import SCHEMA, typed
from .metrics import expert_shares, miss_rates
from .store import Store

if TYPE_CHECKING:
    import pandas as pd

TABLES = tuple(SCHEMA)
FORMAT = 2
"""Version of the folder that `save` writes."""

MANIFEST = "run.json"


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

    def misses(self, by: Sequence[str] | str | None = ()) -> pd.DataFrame:
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
            MoelabError: If the folder exists and holds anything but a recording.
        """
        target = Path(folder).expanduser()
        _refuse_others(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
            whole, old = Path(made) / "whole", Path(made) / "old"
            whole.mkdir()
            for table in TABLES:
                self._frame(table).to_parquet(whole / f"{table}.parquet", index=False)
            text = json.dumps({"format": FORMAT, **self.run}, indent=2, default=_plain)
            (whole / MANIFEST).write_text(text, encoding="utf-8")
            if target.exists():
                target.rename(old)  # and goes with the temporary folder
            try:
                whole.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
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
            "on a miss": str(self.run.get("on_miss", "?")),
            "runs": str(tokens["run"].nunique()),
            "tokens": f"{len(tokens)} ({counts})",
            "routed": f"{routed:,} slots, {tokens['hits'].sum() / max(routed, 1):.1%} hits",
            "loads": f"{len(self.loads):,} experts, {tokens['bytes_read'].sum() / 1e6:,.1f} MB",
        }

    def __repr__(self) -> str:
        return facts_text("Recording", self._summary())

    def _repr_html_(self) -> str:
        return facts_html("Recording", self._summary())


def read_recording(folder: str | Path) -> Recording:
    """Reads what `Recording.save` wrote.

    Raises:
        MoelabError: If the folder holds no recording, or one of a later format.
    """
    import pandas as pd

    path = Path(folder).expanduser()
    try:
        run = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = run.pop("format")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MoelabError(f"{path} holds no recording ({error!r}).") from error
    if version != FORMAT:
        raise MoelabError(
            f"{path} has format {version!r}, and this moelab reads format {FORMAT}. "
            "Read it with the moelab that wrote it."
        )
    lacking = [table for table in TABLES if not (path / f"{table}.parquet").is_file()]
    if lacking:
        raise MoelabError(
            f"{path} lacks {', '.join(lacking)}.parquet, so it is no whole recording."
        )

    def build(table: str) -> pd.DataFrame:
        try:
            return typed(table, pd.read_parquet(path / f"{table}.parquet"))
        except (OSError, ValueError, KeyError) as error:
            raise MoelabError(f"{path / table}.parquet cannot be read: {error}") from error

    recording = Recording(run, build)
    recording.complete()
    return recording


def _refuse_others(target: Path) -> None:
    """Raises unless `target` is absent, an empty folder, or a recording and nothing else."""
    if not target.exists() and not target.is_symlink():
        return
    known = {MANIFEST, *(f"{table}.parquet" for table in TABLES)}
    if target.is_symlink() or not target.is_dir():
        raise MoelabError(f"{target} is no folder; it is left alone.")
    names = {entry.name for entry in target.iterdir()}
    if names and (MANIFEST not in names or names - known):
        others = ", ".join(sorted(names - known)[:3]) or f"no {MANIFEST}"
        raise MoelabError(f"{target} exists and is no recording ({others}); it is left alone.")


def _plain(value: Any) -> Any:
    """Returns what JSON can hold for numpy's numbers, paths and the like."""
    return value.item() if isinstance(value, np.generic) else str(value)


def frame_builder(
    store: Store, decode: Callable[[list[int]], str], load_bytes: dict[int, int]
) -> Callable[[str], pd.DataFrame]:
    """Returns what builds frames from a store.

    Args:
        store: The rows.
        decode: Gives the text of token ids.
        load_bytes: Bytes of one load, by layer.
    """
    texts: dict[int, str] = {-1: ""}  # where embeddings stood for tokens

    def text(token: int) -> str:
        if token not in texts:
            texts[token] = decode([token])
        return texts[token]

    def shared(tokens: np.ndarray, rows: Any) -> tuple[dict[str, np.ndarray], list[str]]:
        ids, place = np.unique(tokens["token_id"], return_inverse=True)
        names = [text(token) for token in ids.tolist()]
        categories = sorted(set(names))
        code_of = {name: code for code, name in enumerate(categories)}
        codes = np.array([code_of[name] for name in names], np.int32)[place]
        keys = ("run", "sequence", "step", "position", "token_id", "phase")
        return {**{k: tokens[k][rows] for k in keys}, "token": codes[rows]}, categories

    def bytes_of(loads: np.ndarray) -> np.ndarray:
        table = np.zeros(max(load_bytes, default=0) + 1, np.int64)
        table[list(load_bytes)] = list(load_bytes.values())
        return table[loads["layer"]]

    def build(table: str) -> pd.DataFrame:
        loads, tokens = store.loads(), store.tokens()
        if table == "loads":
            row = loads["token_row"]
            columns = {k: tokens[k][row] for k in ("run", "sequence", "step", "position")}
            columns.update({k: loads[k] for k in ("layer", "expert", "seconds")})
            return typed(table, {**columns, "bytes": bytes_of(loads)})
        routing = store.routing()
        if table == "routing":
            columns, categories = shared(tokens, routing["token_row"])
            names = ("layer", "rank", "expert", "weight", "outcome", "computed", "applied")
            columns.update({k: routing[k] for k in names})
            return typed(table, {**columns, "hit": routing["miss"] == 0}, categories)
        count = len(tokens)
        columns, categories = shared(tokens, slice(None))
        misses = np.bincount(routing["token_row"], routing["miss"], count).astype(np.int64)
        columns.update({k: tokens[k] for k in ("logprob", "entropy", "seconds")})
        columns["misses"] = misses
        columns["hits"] = np.bincount(routing["token_row"], minlength=count) - misses
        columns["bytes_read"] = np.bincount(loads["token_row"], bytes_of(loads), count)
        return typed(table, columns, categories)

    return build
