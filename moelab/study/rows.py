"""Rows of a sweep: their columns, and a folder that they are written to as they come.

A folder holds `sweep.json`, which says of which model, prompts and settings it is, and part files
that appear whole or not at all. Which rows there are already is read from the parts themselves, so
a sweep goes on wherever it was cut off, in whatever order it runs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import SchemaError, StudyError
from .schema import checked

if TYPE_CHECKING:
    import pandas as pd

    from ..quality.window import Window

FORMAT = 1
"""Version of the folder."""

MANIFEST = "sweep.json"


class Column(NamedTuple):
    """One column."""

    kind: str
    """See `schema.Kind`."""
    meaning: str


COLUMNS: Mapping[str, Column] = {
    "capacity": Column("count", "Experts a layer in memory; the fewest where layers differ."),
    "policy": Column("str", "Replacement policy; for lossy actions, of the swaps."),
    "on_miss": Column("str", "What happens on a miss, with settings that are not the defaults."),
    "pins": Column("str", "Label of the pins."),
    "kv_bits": Column("count?", "Bits of the key-value cache; NaN: the model's own type."),
    "seed": Column("count", "Seed of drawn pins; 0 where nothing is drawn."),
    "domain": Column("str", "What the prompt is of."),
    "prompt": Column("str", "Name of the document."),
    "tokens": Column("count", "Judged tokens."),
    "prefix": Column("count", "Tokens before them, which ran exactly."),
    "initial": Column("str", "What the bank holds at first, before each prompt."),
    "swap_budget": Column("int", "Experts a layer that may enter after a lossy step; −1: the "
                          "layer's top-k. 0 for `load`, which has none."),
    "bytes": Column("count", "Bank, low-bit copies, trunk, and cache at the window's end."),
    "bytes_slots": Column("count", "Of these, the routed experts in memory."),
    "bytes_low_bit": Column("count", "The copies at few bits."),
    "bytes_trunk": Column("count", "Everything else of the model."),
    "bytes_cache": Column("count", "The key-value cache as allocated, recurrent states with it."),
    "routed": Column("count", "Routed slots of the judged tokens."),
    "hits": Column("count", "Those whose expert was resident when their step began."),
    "hit_rate": Column("share", "hits ÷ routed."),
    "loads": Column("count", "Experts read from disk for the judged tokens: misses, or swaps."),
    "bytes_read": Column("count", "Their bytes."),
    "kl_mean": Column("float", "KL(full ‖ constrained) a token, nats."),
    "kl_sum": Column("float", "Its sum."),
    "kl_p99": Column("float", "Its 99th percentile within the prompt."),
    "kl_max": Column("float", "Its largest value."),
    "nll": Column("float", "−ln p of the true tokens, nats a token."),
    "nll_reference": Column("float", "The same of the full model."),
    "ln_ppl_ratio": Column("float", "nll − nll_reference."),
    "ppl": Column("positive", "exp nll."),
    "ppl_reference": Column("positive", "exp nll_reference."),
    "same_top1": Column("share", "Tokens where both think the same token likeliest."),
    "source": Column("str", "'run': the model ran under this setting. 'replay': an exact run was "
                     "recorded, and its routing replayed."),
    "split": Column("str", "Which split the prompts are of; 'given' where none was named."),
    "fingerprint": Column("str", "Names the checkpoint."),
    "point": Column("str", "Names the setting."),
    "window": Column("str", "Names the prompt's tokens."),
}  # fmt: skip
"""A sweep's frame: a row a point and prompt. Counts are int64, other numbers float64."""

KEY = ("point", "window")

_SUMS = (("bytes", ("bytes_slots", "bytes_low_bit", "bytes_trunk", "bytes_cache")),)
_ABOVE_0 = ("kl_mean", "kl_sum", "kl_p99", "kl_max")


def checked_rows(frame: pd.DataFrame, what: str = "A sweep's frame") -> pd.DataFrame:
    """Checks that a frame is as a sweep wrote it.

    Args:
        frame: The frame.
        what: What errors call it.

    Returns:
        The frame with the dtypes of `COLUMNS`.

    Raises:
        SchemaError: Names the column that is missing, of another type, out of range, or at odds
            with another; or the first row that is there twice.
    """
    found = checked(frame, {name: c.kind for name, c in COLUMNS.items()}, what, unique=KEY)
    found["kv_bits"] = found["kv_bits"].astype(np.float64)  # also where no row is without
    for name in _ABOVE_0:
        _refuse(found, name, found[name] < 0, "under 0, which no divergence is", what)
    for name, parts in _SUMS:
        odd = found[name] != found[list(parts)].sum(axis=1)
        _refuse(found, name, odd, f"not the sum of {', '.join(parts)}", what)
    _refuse(found, "tokens", found["tokens"] < 1, "under 1", what)
    _refuse(found, "hits", found["hits"] > found["routed"], "more than routed", what)
    sources = ~found["source"].isin(["run", "replay"])
    _refuse(found, "source", sources, "neither 'run' nor 'replay'", what)
    for name, value in (
        ("hit_rate", found["hits"] / found["routed"].clip(lower=1)),
        ("kl_mean", found["kl_sum"] / found["tokens"]),
        ("ln_ppl_ratio", found["nll"] - found["nll_reference"]),
        ("ppl", np.exp(found["nll"])),
        ("ppl_reference", np.exp(found["nll_reference"])),
    ):
        odd = ~np.isclose(found[name], value, rtol=1e-9, atol=1e-12)
        _refuse(found, name, odd, "at odds with the columns that it follows from", what)
    return found


def _refuse(frame: pd.DataFrame, name: str, bad: Any, why: str, what: str) -> None:
    places = np.flatnonzero(np.asarray(bad))
    if len(places):
        first = int(places[0])
        raise SchemaError(
            f"{what}: column {name!r} is {why} in {len(places)} rows, the first is row {first} "
            f"with {frame[name].iloc[first]!r}. Was it edited by hand? Take it as it was written."
        )


def window_key(window: Window) -> str:
    """Returns 16 hexadecimal digits that name a window: its name, domain, tokens and prefix."""
    named = [window.document, window.domain, list(window.tokens), window.prefix]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def prompts_digest(windows: Iterable[Window]) -> str:
    """Returns 16 hexadecimal digits that name a list of windows."""
    keys = "".join(window_key(window) for window in windows)
    return hashlib.sha256(keys.encode()).hexdigest()[:16]


class Folder:
    """The rows of a sweep on disk.

    Args:
        path: Is made; if it exists it must be a sweep of the same model, prompts and settings.
        identity: What must be the same: JSON values.
        about: What the manifest says beside it: JSON values.

    Attributes:
        damaged: Part files that could not be read; they were removed, and their rows are missing.

    Raises:
        StudyError: If the folder is no sweep, or another one; or nothing can be written there.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        self.path = Path(path).expanduser()
        self.damaged: list[Path] = []
        self._fingerprint: str | None = identity.get("fingerprint")
        if self.path.suffix == ".parquet":
            raise StudyError(
                f"{self.path} names a file, and a sweep is written to a folder, a part at a time. "
                "Give a folder; sweep.frame.to_parquet writes one file afterwards."
            )
        if self.path.exists() and not self.path.is_dir():
            raise StudyError(f"{self.path} is a file; it is left alone. Give a folder.")
        if self.path.is_dir() and any(self.path.iterdir()):
            self._check(identity)
            self._sweep_up()
            return
        text = json.dumps({"format": FORMAT, "identity": dict(identity), **about}, indent=2)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"The folder {self.path} cannot be made: {error.strerror}.") from error
        self._put(MANIFEST, lambda place: place.write_text(text, encoding="utf-8"))

    def rows(self, points: Iterable[str] | None = None) -> pd.DataFrame | None:
        """Returns the rows that are there, each once; None if there are none.

        A part that cannot be read is removed, with a warning: its rows are to be made again.

        Args:
            points: Keys of the points that are of interest; None for all.

        Raises:
            SchemaError: If a part can be read and is not as it was written.
        """
        wanted = None if points is None else set(points)
        found = []
        for part in parts_in(self.path):
            if wanted is not None and _point_of(part) not in wanted:
                continue
            try:
                frame = read_part(part, self._fingerprint)
            except StudyError as error:
                if isinstance(error, SchemaError):
                    raise
                warnings.warn(f"{error} Its rows are made again.", stacklevel=3)
                part.unlink()
                self.damaged.append(part)
                continue
            found.append(frame)
        return joined(found)

    def write(self, rows: pd.DataFrame) -> None:
        """Writes rows of one point, whole or not at all.

        Raises:
            StudyError: If they cannot be written; what was written before is whole.
        """
        (point,) = set(rows["point"])
        named = hashlib.sha256("".join(rows["window"]).encode()).hexdigest()[:8]
        frame = checked_rows(rows).reset_index(drop=True)

        def put(place: Path) -> None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.Table.from_pandas(frame[list(COLUMNS)], preserve_index=False)
            pq.write_table(table, place, write_page_checksum=True)

        self._put(f"part-{point}-{named}.parquet", put)

    def _put(self, name: str, write: Any) -> None:
        made = self.path / f".{name}-{os.getpid()}.tmp"
        try:
            write(made)
            with made.open("rb") as file:
                os.fsync(file.fileno())  # so that the name never stands for an empty file
            made.replace(self.path / name)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "The disk is full" if full else f"{error.strerror or error}"
            raise StudyError(
                f"{name} could not be written to {self.path}: {what}. Nothing that was finished is "
                f"lost. {'Free some space' if full else 'Mend that'}, and make the same call "
                "again: it goes on where it stopped."
            ) from error
        finally:
            made.unlink(missing_ok=True)

    def _check(self, identity: Mapping[str, Any]) -> None:
        known = read_manifest(self.path)
        theirs = known["identity"]
        mine = json.loads(json.dumps(dict(identity)))
        odd = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        if odd:
            told = "; ".join(
                f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here" for name in odd
            )
            raise StudyError(
                f"{self.path} holds a sweep of another kind: {told}. Its rows cannot go on with "
                "these. Give another folder, or the settings that it was begun with."
            )

    def _sweep_up(self) -> None:
        """Removes what processes that are gone were writing."""
        import psutil

        for left in self.path.glob(".*.tmp"):
            number = left.stem.rpartition("-")[2]
            if number.isdecimal() and not psutil.pid_exists(int(number)):
                left.unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads what a folder says of itself.

    Raises:
        StudyError: If it holds no sweep, or one of a later format.
    """
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, identity = found["format"], found["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} holds no sweep ({error!r}); it is left alone.") from error
    if version != FORMAT or not isinstance(identity, dict):
        raise StudyError(
            f"{path} has format {version!r}, and this moelab reads format {FORMAT}. Read it with "
            "the moelab that wrote it."
        )
    return dict(found)


def parts_in(path: Path) -> list[Path]:
    """Returns the part files of a folder, by name."""
    return sorted(path.glob("part-*.parquet"))


def read_part(part: Path, fingerprint: str | None = None) -> pd.DataFrame:
    """Reads one part file.

    Args:
        part: The file.
        fingerprint: Of the model whose rows they must be; None for any.

    Raises:
        StudyError: If it cannot be read.
        SchemaError: If it can, and is not as it was written, or has rows of another model.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not by its name, which pyarrow would split into columns where folders are named k=v.
        with part.open("rb") as file:
            frame = pq.read_table(file, page_checksum_verification=True).to_pandas()
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(
            f"The part {part} cannot be read ({reason:.120}): it is cut short or damaged."
        ) from error
    rows = checked_rows(frame, f"The part {part.name}")
    others = set(rows["fingerprint"]) - {fingerprint}
    if fingerprint is not None and others:
        raise SchemaError(
            f"The part {part} has rows of another model in its column 'fingerprint' "
            f"({', '.join(sorted(others))}) than its folder is of ({fingerprint}). Was it copied "
            "there? Take it out."
        )
    return rows


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """Returns rows of several frames as one, each once; None if there is none."""
    import pandas as pd

    some = [frame for frame in frames if len(frame)]
    if not some:
        return None
    return pd.concat(some, ignore_index=True).drop_duplicates(list(KEY), ignore_index=True)


def _point_of(part: Path) -> str:
    return part.name.split("-")[1]
