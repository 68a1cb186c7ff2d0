"""Runs the parts of a study, one after the other, and writes its page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...display import facts_html, facts_text
from ...errors import StudyError
from . import pins, prices, quality, routing
from .notes import Finding, Lesson, Notes
from .plan import Scale, scale_of, settings_of

if TYPE_CHECKING:
    import pandas as pd

    from ...lab import Lab

PAGE = "findings.md"
LESSONS = "lessons.csv"
TOLD = ("key", "statement", "unit", "trainings", "same_sign", "shown")
"""Columns of a table of lessons that are no training's."""

PARTS: Mapping[str, Callable[[Notes], None]] = {
    "small": quality.how_small,
    "why": quality.why,
    "writing": quality.writing,
    "routing": routing.which_experts,
    "policies": routing.which_policy,
    "pins": pins.whether_pins_help,
    "prices": prices.what_a_miss_costs,
}
"""The parts by name, in their order."""


class Study:
    """What a study found, read from its folder.

    Attributes:
        path: The folder.
        findings: In the order of the parts.
        lessons: A row a lesson: `key`, `statement`, `value`, `low`, `high`, `unit`.
        settings: Model, fingerprint, scale, machine.
    """

    def __init__(
        self,
        path: Path,
        findings: list[Finding],
        lessons: list[Lesson],
        settings: dict[str, Any],
    ) -> None:
        import pandas as pd

        self.path = path
        self.findings = findings
        columns = ["key", "statement", "value", "low", "high", "unit"]
        self.lessons = pd.DataFrame([asdict(one) for one in lessons], columns=columns)
        self.settings = settings

    def page(self) -> str:
        """Returns the findings as Markdown."""
        said = self.settings
        lines = [
            f"# What was found on {said['model']}", "",
            f"Model `{said['model']}` ({said['fingerprint']}), scale `{said['scale']['name']}`: "
            f"{said['scale']['texts']} test texts a domain, {said['scale']['tokens']} judged "
            f"tokens each after {said['scale']['prefix']} that ran exactly. {said['machine']}.", "",
            f"Made by `{said['command']}`. Files named in brackets are in this folder.",
        ]  # fmt: skip
        asked = dict.fromkeys(one.question for one in self.findings)
        for question in asked:
            lines += ["", f"## {question}", ""]
            for one in self.findings:
                if one.question == question:
                    files = ", ".join(f"[{f}]({f})" for f in one.files)
                    lines.append(f"- {one.text}" + (f" ({files})" if files else ""))
        return "\n".join(lines) + "\n"

    def _facts(self) -> dict[str, str]:
        return {
            "model": f"{self.settings['model']} ({self.settings['fingerprint']})",
            "scale": self.settings["scale"]["name"],
            "findings": f"{len(self.findings)}, in {self.path / PAGE}",
            "lessons": f"{len(self.lessons)}, in {self.path / LESSONS}",
        }

    def __repr__(self) -> str:
        return facts_text("Study", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Study", self._facts())


def study(
    model: Lab | str | Path = "lab",
    *,
    out: str | Path,
    scale: str | Scale = "full",
    only: Iterable[str] | None = None,
    again: bool = False,
    **load_options: Any,
) -> Study:
    """Runs the whole study of a model on the texts that ship, and writes what it finds.

    Parts that were finished before, for the same model and scale, are not run again; the long
    sweep inside goes on where it was cut off.

    Args:
        model: A lab, or what `moelab.load` takes.
        out: Folder for frames (CSV), charts (PNG), `findings.md` and `lessons.csv`.
        scale: "full"; "signs" for more trainings of a model, of which only signs are asked;
            "tiny" to see that everything runs.
        only: Names of `PARTS`; None for all.
        again: Also run what was finished before.
        **load_options: More of `moelab.load`.

    Returns:
        The study: what all finished parts found.

    Raises:
        StudyError: If a part or the scale is unknown.
        And what the parts raise.
    """
    from ...profiling import opened

    chosen = list(PARTS) if only is None else list(only)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise StudyError(f"There is no part {unknown[0]!r}; there are {', '.join(PARTS)}.")
    size = scale_of(scale)
    folder = Path(out).expanduser()
    capacity = None if not isinstance(model, str | Path) else load_options.pop("capacity", 0.5)
    with opened(model, capacity, load_options) as lab:
        note = "lab" if quality._knows_shell(lab) else ""
        notes = Notes(lab, size, folder, note)
        for name in chosen:
            if not again and notes.done(name):
                continue
            started = time.perf_counter()
            try:
                PARTS[name](notes)
            except BaseException:
                notes.drop()
                raise
            notes.close(name, started)
        found = _collected(notes, str(model) if isinstance(model, str | Path) else lab.name)
    (folder / PAGE).write_text(found.page(), encoding="utf-8")
    found.lessons.to_csv(folder / LESSONS, index=False, float_format="%.6g")
    return found


def _collected(notes: Notes, called: str) -> Study:
    from ...machine import chip, system

    findings: list[Finding] = []
    lessons: list[Lesson] = []
    for name in PARTS:
        if notes.done(name):
            told = notes.read(name)
            findings += told["findings"]
            lessons += told["lessons"]
    scale = notes.scale
    settings = {
        "model": notes.lab.name if notes.lab.name == "lab" else Path(called).name,
        "fingerprint": notes.lab.fingerprint,
        "scale": settings_of(scale),
        "machine": f"Measured on {chip()}, {system()}",
        "command": f"moelab study {Path(called).name} --out {notes.out.name}"
        + ("" if scale.name == "full" else f" --scale {scale.name}"),
    }
    return Study(notes.out, findings, lessons, settings)


def lessons_of(folders: Iterable[str | Path]) -> pd.DataFrame:
    """Puts the lessons of several trainings side by side.

    Args:
        folders: Studies' folders, the main training first.

    Returns:
        A row a lesson of the first study: `key`, `statement`, `unit`; a column of values a
        folder; `trainings` (that have it, in the same words, since those name the capacity),
        `same_sign` (they all agree), `shown` (the sign is the same in all of them, and each has an
        interval that excludes 0).

    Raises:
        StudyError: If a folder has no lessons.
    """
    import numpy as np
    import pandas as pd

    read = {}
    for folder in map(Path, folders):
        path = folder / LESSONS
        if not path.exists():
            raise StudyError(f"{folder} has no {LESSONS}. Run moelab.study there first.")
        read[folder.name] = pd.read_csv(path).set_index("key")
    if not read:
        raise StudyError("No folder is given. Name the folders of studies.")
    first = next(iter(read.values()))
    rows = []
    for key, lesson in first.iterrows():
        mine = [_same(frame, key, lesson["statement"]) for frame in read.values()]
        have = [row for row in mine if row is not None]
        signs = {int(np.sign(row["value"])) for row in have}
        sure = all(row["low"] > 0 or row["high"] < 0 for row in have)
        rows.append(
            {
                "key": key, "statement": lesson["statement"], "unit": lesson["unit"],
                **{name: np.nan if row is None else row["value"]
                   for name, row in zip(read, mine, strict=True)},
                "trainings": len(have), "same_sign": len(signs) == 1 and 0 not in signs,
                "shown": len(signs) == 1 and 0 not in signs and sure,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _same(frame: pd.DataFrame, key: Any, statement: str) -> pd.Series | None:
    """Returns a lesson; None if there is none of these words, or none with a figure."""
    if key not in frame.index or frame.loc[key, "statement"] != statement:
        return None
    row: pd.Series = frame.loc[key]
    return row if row["value"] == row["value"] else None


def lessons_page(table: pd.DataFrame) -> str:
    """Returns the lessons of several trainings as Markdown.

    Args:
        table: As `lessons_of` gives it.
    """
    names = [name for name in table.columns if name not in TOLD]
    head = ["lesson", *names, "unit", "holds"]
    lines = [
        "# Lessons", "",
        f"A lesson counts only if its sign is the same in every training of the model that there "
        f"is: {len(names)} ({', '.join(names)}). Values are what the statement says, positive "
        "where it is true. *shown*: the 95% interval of every training excludes 0 as well, and a "
        "figure without an interval is never shown. *seen once*: only one training has it. *no*: "
        "signs differ. *the opposite*: false in all of them.", "",
        "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
    ]  # fmt: skip
    for _, row in table.iterrows():
        values = [f"{row[name]:.3g}" for name in names]
        lines.append(
            "| " + " | ".join([row["statement"], *values, row["unit"], _holds(row, names)]) + " |"
        )
    held = table[table["same_sign"] & (table["trainings"] > 1)]
    lines += ["", f"{len(held)} of {len(table)} keep their sign in all trainings."]
    return "\n".join(lines) + "\n"


def _holds(row: pd.Series, names: list[str]) -> str:
    if row["trainings"] < 2:
        return "seen once"
    if not row["same_sign"]:
        return "no"
    if (row[names] < 0).any():
        return "no, the opposite" + (", shown" if row["shown"] else "")
    return "yes, shown" if row["shown"] else "yes"
