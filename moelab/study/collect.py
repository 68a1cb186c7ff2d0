"""What a sweep is to do, and the rows that it has so far, in memory and in a folder.

Nothing here runs a model, so that a sweep that is spread over other processes needs none here.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine import backend, versions
from ..quality.window import Document, Window, few_of_each, windows_of
from .asked import Asked
from .bytes import ModelFacts
from .local import REPLAY_COST, Todo
from .points import points_of
from .rows import KEY, Folder, joined, prompts_digest, window_key

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Job:
    """What was asked for, before the model is known. Other processes can be given it."""

    wanted: Asked
    documents: list[Document]
    called: str
    """What the prompts are called together."""
    prefix: int
    tokens: int
    split: str
    shipped: bool
    """Nobody named prompts, so those that are too short are left out."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `moelab.load`."""

    def windows(self, tokenizer: Any) -> list[Window]:
        """Returns the windows of the prompts.

        Raises:
            StudyError: If a prompt is too short.
        """
        chosen = self.documents
        if self.shipped:
            least = self.prefix + self.tokens + 1
            chosen = few_of_each(tokenizer, chosen, least=least, each=len(chosen))
        given: Any = chosen
        return windows_of(
            tokenizer, given, prefix=self.prefix, tokens=self.tokens, called="prompts"
        )


class Collected:
    """The rows of a sweep, as they come.

    Args:
        job: What was asked for.
        facts: Of the model.
        windows: The prompts.
        out: Folder to go on in; None for memory alone.

    Attributes:
        points: The points, in the order in which they were asked for.
        settings: What the sweep says of itself; JSON values.

    Raises:
        StudyError: If the folder holds something else.
        PinsError: And others, as `points_of`.
    """

    def __init__(
        self, job: Job, facts: ModelFacts, windows: Sequence[Window], out: str | Path | None
    ) -> None:
        self.points, left_out = points_of(job.wanted, facts.layers, facts.fingerprint)
        self.windows = list(windows)
        identity = {
            "fingerprint": facts.fingerprint,
            "prompts": prompts_digest(windows),
            "prefix": job.prefix,
            "tokens": job.tokens,
            "split": job.split,
            "swap_budget": job.wanted.swap_budget,
            # Which an option of `load`, such as dtype, may change, where the fingerprint does not.
            "weights": facts.trunk + facts.slots_bytes([layer.experts for layer in facts.layers]),
        }
        about = {
            "model": facts.name,
            "model_type": facts.model_type,
            "prompts": job.called,
            "documents": len(windows),
            "mode": "token by token after a prefix that runs exactly",
            "experts": [layer.experts for layer in facts.layers],
            "top_k": [layer.top_k for layer in facts.layers],
            "left_out": left_out,
            "versions": versions("numpy", "pandas", "pyarrow"),
            "backend": backend(),
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self.settings: dict[str, Any] = {"identity": identity, **about}
        self.folder = None if out is None else Folder(out, identity, about)
        self._frames: list[pd.DataFrame] = []
        if self.folder is not None:
            there = self.folder.rows(point.key for point in self.points)
            self._frames = [] if there is None else [there]
        self._have = {key for frame in self._frames for key in _keys(frame)}

    def todo(self, windows: Sequence[Window]) -> list[Todo]:
        """Returns the points that lack rows for some windows, each with those that it lacks."""
        keys = [(window_key(window), window) for window in windows]
        found = []
        for point in self.points:
            lacks = tuple(window for key, window in keys if (point.key, key) not in self._have)
            if lacks:
                found.append(Todo(point, lacks))
        return found

    def add(self, rows: pd.DataFrame) -> None:
        """Takes rows of one point, and writes them down.

        Raises:
            StudyError: If they cannot be written.
        """
        if self.folder is not None:
            self.folder.write(rows)
        self._frames.append(rows)
        self._have.update(_keys(rows))

    def frame(self) -> pd.DataFrame:
        """Returns the rows in the order of the points, and of the prompts within each."""
        whole = joined(self._frames)
        assert whole is not None
        points = {point.key: at for at, point in enumerate(self.points)}
        windows = {window_key(window): at for at, window in enumerate(self.windows)}
        order = whole.assign(_p=whole["point"].map(points), _w=whole["window"].map(windows))
        order = order.dropna(subset=["_p", "_w"]).sort_values(["_p", "_w"], kind="stable")
        return order.drop(columns=["_p", "_w"]).reset_index(drop=True)


def exact_runs(todo: Sequence[Todo]) -> int:
    """Returns how many prompts some points have, each of which has one exact run."""
    return len({window_key(window) for item in todo for window in item.windows})


def row_cost(todo: Sequence[Todo]) -> float:
    """Returns what a progress bar counts for the rows of some points, in runs of the model."""
    return sum(len(t.windows) * (1 if t.point.lossy else REPLAY_COST) for t in todo)


def _keys(frame: pd.DataFrame) -> zip[tuple[Any, ...]]:
    return zip(*(frame[name] for name in KEY), strict=True)
