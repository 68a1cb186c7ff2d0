"""Windows: a text's first tokens, a prefix that runs exactly and the tokens after it to judge.

A lossy action judged from a text's first token on is judged mostly by its prefill: a chunk is one
step, so hundreds of tokens meet the same initial bank. So each window has a prefix that runs
exactly, and what comes after it is judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import StudyError
from ..experts.profile import ALL
from ..prompt_texts import DomainText, Prompts, texts_of
from ..prompting import to_tokens

UNNAMED = "other"
"""Domain of texts without one, where others have one: "all" is the name of the sum."""

MOST_TOKENS = 256
"""Judged tokens a text where the text's end decides: long texts would decide everything."""

NAMED = 5
"""Texts that an error names."""


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of one text that are run."""

    document: str
    """The text's name; no other window has it."""
    domain: str
    """What the text is of."""
    tokens: tuple[int, ...]
    """Token ids, from the text's beginning."""
    prefix: int
    """How many of them run exactly before anything is judged."""

    @property
    def judged(self) -> int:
        """Predictions that are judged: the first token after the prefix is fed, not judged."""
        return len(self.tokens) - self.prefix - 1

    @property
    def fed(self) -> tuple[int, ...]:
        """The tokens after the prefix that are run; the i-th gives the i-th judged prediction."""
        return self.tokens[self.prefix : -1]

    @property
    def wanted(self) -> tuple[int, ...]:
        """The tokens that are predicted."""
        return self.tokens[self.prefix + 1 :]

    @property
    def positions(self) -> range:
        """Places in the text of the predicted tokens."""
        return range(self.prefix + 1, len(self.tokens))


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name."""

    name: str
    """No other document of the same call has it."""
    domain: str
    """What it is of."""
    text: str
    """The text itself."""
    source: str
    """What it is an excerpt of: a mapping's `title`; else its own name."""


def documents_of(texts: Prompts, *, split: str = "test") -> tuple[list[Document], str]:
    """Reads texts and gives each a name.

    Args:
        texts: As in `moelab.prompt_texts.texts_of`; a mapping's `id`, else its `title`, is its
            name, others are counted. None takes the shipped texts of a split, which are read from
            `labmodel.texts`.
        split: "calibration", "selection" or "test"; for None only.

    Returns:
        The documents, and what to call them together.

    Raises:
        StudyError: If there is no text.
        ProfileError: If a file cannot be read, or an entry is no text.
    """
    if texts is None:
        from .. import labmodel

        texts, called = labmodel.texts(split=split), f"moelab's {split} texts"
    else:
        called = ""
    items: list[Any] | str | Path
    if isinstance(texts, str | Path):
        items = texts
    elif isinstance(texts, Iterable):
        items = list(texts)
        if not items:
            raise StudyError(
                "There is no text: the list is empty. Give texts, or None for the shipped ones."
            )
    else:
        raise StudyError(f"Texts are a file or a list of texts, got {texts!r:.60}.")
    named: list[str | None] = []
    if isinstance(items, list):
        # `texts_of` leaves empty texts out, and then names would go to others.
        items = [item for item in items if not _empty(item)]
        named = [_name(item) for item in items]
    if isinstance(items, list) and not items:
        raise StudyError("There is no text: every text is empty. Give texts that have tokens.")
    found, origin = texts_of(items)
    domains = {text.domain for text in found}
    names = named or [None] * len(found)
    counted = [name or f"text {number}" for number, name in enumerate(names)]
    sources = [_title(item) for item in items] if isinstance(items, list) else [None] * len(found)
    return [
        Document(name, _domain(text, domains), text.text, source or name)
        for name, text, source in zip(_distinct(counted), found, sources, strict=True)
    ], called or origin


def windows_of(
    tokenizer: Any,
    texts: Prompts | Sequence[Document],
    *,
    prefix: int,
    tokens: int | None,
    called: str = "texts",
) -> list[Window]:
    """Cuts one window from each text's beginning.

    Args:
        tokenizer: mlx-lm's; texts are taken raw, without a chat template.
        texts: As in `documents_of`, or documents.
        prefix: Tokens that run exactly before anything is judged; at least 1.
        tokens: Judged tokens a text; a window has `prefix + tokens + 1` tokens. None judges to
            each text's end, at most `MOST_TOKENS`.
        called: What an error calls the texts.

    Returns:
        A window a text, in the texts' order.

    Raises:
        StudyError: If there is no text, prefix or tokens are no positive ints, or a text is
            shorter than its window; the message names such texts.
        ProfileError: As `documents_of`.
    """
    for name, value in (("prefix", prefix), ("tokens", tokens)):
        if name == "tokens" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StudyError(f"{name} is a number of tokens, an int from 1 on, got {value!r}.")
    if isinstance(texts, list) and texts and all(isinstance(t, Document) for t in texts):
        documents: list[Document] = texts
    else:
        documents, _ = documents_of(cast(Prompts, texts))
    least = prefix + (1 if tokens is None else tokens) + 1
    most = prefix + (MOST_TOKENS if tokens is None else tokens) + 1
    found: list[Window] = []
    short: list[tuple[str, int]] = []
    for document in documents:
        ids = to_tokens(tokenizer, document.text, template=False)
        if len(ids) < least:
            short.append((document.name, len(ids)))
        else:
            found.append(Window(document.name, document.domain, tuple(ids[:most]), prefix))
    if short:
        some = ", ".join(f"{name!r} ({length})" for name, length in short[:NAMED])
        more = f" and {len(short) - NAMED} more" if len(short) > NAMED else ""
        judged = "at least 1 judged token" if tokens is None else f"{tokens} judged tokens"
        raise StudyError(
            f"{len(short)} of {len(documents)} {called} are too short for a prefix of {prefix} "
            f"and {judged}, which takes {least} tokens: {some}{more}; in brackets, how many they "
            "have. Leave them out, or take a shorter prefix or fewer tokens."
        )
    return found


def few_of_each(
    tokenizer: Any, documents: list[Document], *, least: int, each: int
) -> list[Document]:
    """Takes the first few documents of each domain that are long enough, of each source first.

    Args:
        tokenizer: mlx-lm's.
        documents: To choose from.
        least: Tokens that a document must have.
        each: Documents a domain at most.

    Raises:
        StudyError: If none is that long.
    """
    lengths = {d.name: len(to_tokens(tokenizer, d.text, template=False)) for d in documents}
    long = [d for d in documents if lengths[d.name] >= least]
    if not long:
        raise StudyError(
            f"None of the texts has {least} tokens; the longest has {max(lengths.values())}. Take "
            "a shorter prefix or fewer tokens."
        )
    # Excerpts of one source say less together than those of two.
    seen: Counter[tuple[str, str]] = Counter()
    rounds = []
    for document in long:
        rounds.append(seen[document.domain, document.source])
        seen[document.domain, document.source] += 1
    taken: Counter[str] = Counter()
    names = set()
    for _, document in sorted(zip(rounds, long, strict=True), key=lambda pair: pair[0]):
        if taken[document.domain] < each:
            taken[document.domain] += 1
            names.add(document.name)
    return [document for document in long if document.name in names]


def _empty(item: Any) -> bool:
    text = item.get("text") if isinstance(item, Mapping) else getattr(item, "text", item)
    return isinstance(text, str) and not text.strip()


def _name(item: Any) -> str | None:
    if isinstance(item, Mapping):
        for key in ("id", "title"):
            if isinstance(item.get(key), str) and item[key]:
                return str(item[key])
    return None


def _title(item: Any) -> str | None:
    title = item.get("title") if isinstance(item, Mapping) else None
    return title if isinstance(title, str) else None


def _domain(text: DomainText, domains: set[str]) -> str:
    return UNNAMED if text.domain == ALL and len(domains) > 1 else text.domain


def _distinct(names: list[str]) -> list[str]:
    """Returns the names, with numbers after those that are there before."""
    taken = set(names)
    seen: set[str] = set()
    found = []
    for name in names:
        other, number = name, 2
        while other in seen or (other != name and other in taken):
            other, number = f"{name} ({number})", number + 1
        seen.add(other)
        found.append(other)
    return found
