"""What a study has found so far, on disk: frames, charts, findings and lessons, part by part."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import StudyError
from .plan import Scale

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from ...lab import Lab

PARTS = "parts"
"""Folder of what the study needs to go on where it was cut off; can be deleted afterwards."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence with its figures."""

    question: str
    """What it answers."""
    text: str
    files: list[str] = field(default_factory=list)
    """Files of the study's folder that it is from."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A statement that is true or not by the sign of one figure.

    It counts where the sign is the same in every training of the model.
    """

    key: str
    statement: str
    """What a positive value says."""
    value: float
    low: float
    """95% interval by itself; NaN where there is none."""
    high: float
    unit: str


class Notes:
    """Where one study writes.

    Args:
        lab: The model.
        scale: Sizes.
        out: Folder; made if needed.
        note: What stands under charts; see `moelab.plots.style.finish`.
    """

    def __init__(self, lab: Lab, scale: Scale, out: Path, note: str | None) -> None:
        self.lab = lab
        self.scale = scale
        self.out = out
        self.note = note
        self._findings: list[Finding] = []
        self._lessons: list[Lesson] = []
        (out / PARTS).mkdir(parents=True, exist_ok=True)

    # -- what a part writes ----------------------------------------------------------------

    def frame(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Writes a frame as CSV, numbers with six digits, and returns it."""
        _whole(self.out / f"{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
        return frame

    def chart(self, name: str, ax: Axes) -> None:
        """Writes a chart as PNG and closes it."""
        import matplotlib.pyplot as plt

        figure: Any = ax.figure
        temporary = self.out / f".{name}.png"
        figure.savefig(temporary, dpi=110)
        temporary.replace(self.out / f"{name}.png")
        plt.close(figure)

    def found(self, question: str, text: str, *files: str) -> None:
        """Notes a finding."""
        self._findings.append(Finding(question, text, list(files)))

    def lesson(
        self, key: str, statement: str, row: Mapping[str, Any] | pd.Series, unit: str
    ) -> None:
        """Notes a lesson; `row` has `mean`, `low`, `high` (NaN for an interval that is not)."""
        self._lessons.append(
            Lesson(key, statement, float(row["mean"]), float(row["low"]), float(row["high"]), unit)
        )

    # -- parts -----------------------------------------------------------------------------

    def done(self, part: str) -> bool:
        """Whether a part was finished for this model and scale before."""
        path = self._path(part)
        if not path.exists():
            return False
        return bool(json.loads(path.read_text(encoding="utf-8"))["of"] == self._identity())

    def close(self, part: str, started: float) -> None:
        """Ends a part: what it found is on disk from now on."""
        told = {
            "of": self._identity(),
            "seconds": round(time.perf_counter() - started, 1),
            "findings": [asdict(one) for one in self._findings],
            "lessons": [asdict(one) for one in self._lessons],
        }
        self._findings, self._lessons = [], []
        _whole(self._path(part), json.dumps(told, indent=1, ensure_ascii=False) + "\n")

    def drop(self) -> None:
        """Forgets what an unfinished part noted."""
        self._findings, self._lessons = [], []

    def read(self, part: str) -> dict[str, Any]:
        """Returns what a part found: `findings`, `lessons`, `seconds`.

        Raises:
            StudyError: If it was not finished.
        """
        path = self._path(part)
        if not path.exists():
            raise StudyError(f"The part {part!r} of {self.out} was not finished. Run it first.")
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        told["findings"] = [Finding(**one) for one in told["findings"]]
        told["lessons"] = [Lesson(**one) for one in told["lessons"]]
        return told

    def _path(self, part: str) -> Path:
        return self.out / PARTS / f"{part}.json"

    def _identity(self) -> list[str]:
        return [self.lab.fingerprint, repr(self.scale)]


def _whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
