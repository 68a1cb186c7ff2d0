"""The lab model: a small Mixture-of-Experts model that ships with the package.

It was trained from scratch for moelab, so that everything runs offline in
seconds, with real routing: 29 million parameters, 8 layers of 64 experts, 6 of
which work on each token. `CARD.md` beside this file says what it was trained on,
what it can do and what it cannot stand in for.

Beside the checkpoint lie excerpts that it never saw in training, in six domains,
split once and for good:

```python
from moelab import labmodel
from mlx_lm import load

model, tokenizer = load(str(labmodel.path()))
for text in labmodel.texts(domain="shell", split="test"):
    ...
```

Use `calibration` to make something (a profile, a list of experts), `selection`
to choose between what you made, and `test` once, for the figure that you report.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import TypedDict

__all__ = ["DOMAINS", "SPLITS", "Question", "Text", "path", "questions", "texts"]

DOMAINS = ("python", "prose", "math", "spanish", "shell", "guide")
SPLITS = ("calibration", "selection", "test")

_FOLDER = Path(__file__).parent


class Text(TypedDict):
    """A held-out excerpt."""

    id: str
    """Domain, split and a number."""
    domain: str
    """One of `DOMAINS`."""
    split: str
    """One of `SPLITS`."""
    title: str
    """The document that the excerpt is from; no document is in two splits."""
    text: str
    """The excerpt, at most 2,200 bytes of UTF-8."""


class Question(TypedDict):
    """A question on a command-line tool whose page was never trained on."""

    tool: str
    """The command that a right answer begins with."""
    question: str
    """The question, which names the tool."""
    described: str
    """The harder question, which describes the tool instead of naming it."""
    reference: str
    """The command line that the page gives."""
    page: str
    """The page's title."""


def path() -> Path:
    """Return the folder of the shipped checkpoint, for `mlx_lm.load`."""
    return _FOLDER / "checkpoint"


def texts(domain: str | None = None, split: str | None = None) -> list[Text]:
    """Return held-out excerpts.

    Args:
        domain: One of `DOMAINS`, or None for all.
        split: One of `SPLITS`, or None for all.
    """
    _check("domain", domain, DOMAINS)
    _check("split", split, SPLITS)
    return [
        Text(**text)
        for text in _all_texts()
        if domain in (None, text["domain"]) and split in (None, text["split"])
    ]


def questions() -> list[Question]:
    """Return 50 held-out questions, each with the tool that a right answer uses."""
    found: list[Question] = json.loads((_FOLDER / "questions.json").read_text(encoding="utf-8"))
    return found


@cache
def _all_texts() -> tuple[Text, ...]:
    with lzma.open(_FOLDER / "texts.jsonl.xz", "rt", encoding="utf-8") as file:
        return tuple(json.loads(line) for line in file)


def _check(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
