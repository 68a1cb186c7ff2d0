"""The table of families: what `moelab families` prints and keeps."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import MoelabError
from .discover import aliases, families
from .trial import Trial, try_family

NAME = "families.md"


@dataclass(frozen=True, slots=True)
class FamilyTable:
    """Every family's trial."""

    trials: list[Trial]
    versions: dict[str, str]
    command: str

    @property
    def failed(self) -> list[str]:
        """Families of which something is wrong that no list explains."""
        return [trial.family for trial in self.trials if trial.failed]

    def page(self) -> str:
        """Returns the table as a page of Markdown."""
        also = aliases()
        made_with = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        works = sum(trial.exact == "yes" for trial in self.trials)
        lines = [
            "# Families",
            "",
            f"Made by `{self.command}` with {made_with}.",
            "",
            "A tiny random checkpoint of each family that mlx-lm can load and that can have routed "
            "experts, quantised, run on the CPU with half of its experts in memory.",
            "",
            "- *direct*: the bank reads experts from the checkpoint as mlx-lm saves it; *packed*: "
            "from a pack file. A checkpoint as its makers publish it may hold gate and up in one "
            "tensor, or other numbers than mlx-lm computes with: then the pack file is made.",
            "- *exact*: logits equal stock mlx-lm's, every bit, in swept prefill and in decode, "
            "recorded or not, and again after the bank was taken out.",
            "- *weights*: recorded gate weights are what the block applies, asked by basis "
            "vectors.",
            "- *miss actions*: lossy actions that run; the others are refused, for the reason "
            "noted.",
            "",
            "| family | also | experts | direct | packed | exact | weights "
            "| miss actions | notes |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for trial in self.trials:
            notes = "; ".join(trial.notes)
            cells = (
                trial.family,
                ", ".join(also.get(trial.family, [])),
                trial.experts,
                trial.direct,
                trial.packed,
                trial.exact,
                trial.weights,
                trial.actions,
                f"**FAILED:** {notes}" if trial.failed else notes,
            )
            lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
        lines += ["", f"{works} of {len(self.trials)} are exact."]
        if self.failed:
            lines.append(f"**Failed: {', '.join(self.failed)}.**")
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> Path:
        """Writes `families.md` into a folder, whole or not at all.

        Raises:
            MoelabError: If the folder cannot be made or written to.
        """
        target = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".families-") as made:
                place = Path(made) / NAME
                place.write_text(self.page(), encoding="utf-8")
                place.replace(target)
        except OSError as error:
            raise MoelabError(f"The table cannot be written to {folder}: {error}") from error
        return target


def family_table(only: Sequence[str] | None = None) -> FamilyTable:
    """Tries every family of the installed mlx-lm, or some.

    Args:
        only: Their names (mlx-lm's modules, or another `model_type` that is loaded with one);
            None for all.

    Raises:
        MoelabError: If a name is not that of a family with experts.
    """
    from tqdm.auto import tqdm

    found = families()
    chosen = found if only is None else _chosen(only, found)
    with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="moelab-families-") as folder:
        trials = [
            try_family(family, Path(folder) / family)
            for family in tqdm(chosen, desc="families", leave=False)
        ]
    versions = {name: importlib.metadata.version(name) for name in ("moelab", "mlx", "mlx-lm")}
    command = "moelab families" + ("" if only is None else f" --only {','.join(only)}")
    return FamilyTable(trials, versions, command)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers from remarking that it does not know mlx-lm's families."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _chosen(only: Sequence[str], found: Sequence[str]) -> list[str]:
    module = {name: family for family, names in aliases().items() for name in names}
    module.update({family: family for family in found})
    unknown = [name for name in only if module.get(name) not in found]
    if unknown:
        raise MoelabError(
            f"No family with experts is named {', '.join(unknown)}. There are: {', '.join(found)}."
        )
    return sorted({module[name] for name in only})
