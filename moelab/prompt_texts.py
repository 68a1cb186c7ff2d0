"""Prompts for profiles: texts from a file or a list, cut to prompts of one length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ProfileError
from .experts.profile import ALL
from .prompting import to_tokens

SHIPPED = "moelab's calibration texts"
"""What a profile calls its prompts when none were given."""


@dataclass(frozen=True, slots=True)
class DomainText:
    """A text and what it is of."""

    text: str
    domain: str = ALL


Prompts = str | Path | Iterable[str | Mapping[str, Any] | DomainText] | None
"""What a user may give as prompts; see `texts_of`."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Prompts of one length."""

    prompts: list[tuple[str, list[int]]]
    """Domain and token ids of each."""
    too_short: int
    """Texts that gave none."""


def texts_of(prompts: Prompts) -> tuple[list[DomainText], str]:
    """Reads prompts.

    Args:
        prompts: One of

            - None: the calibration texts that ship with the package, in six domains;
            - the path of a `.jsonl` file: an object a line, with `text` and optionally `domain`;
            - the path of another text file: paragraphs, with blank lines between them; without
              any blank line, a text a line;
            - texts, or mappings with `text` and optionally `domain`.

    Returns:
        The texts, and what to call them.

    Raises:
        ProfileError: If the file cannot be read, or there is no text.
    """
    if prompts is None:
        from . import labmodel

        shipped = labmodel.texts(split="calibration")
        return [DomainText(text["text"], text["domain"]) for text in shipped], SHIPPED
    if isinstance(prompts, str | Path):
        path = Path(prompts).expanduser()
        return _checked(list(_in_file(path)), str(path)), path.name
    if not isinstance(prompts, Iterable):
        raise ProfileError(f"Prompts are a file or texts, got {prompts!r:.60}.")
    found = [_entry(item, f"prompt {i}") for i, item in enumerate(prompts)]
    return _checked(found, "prompts"), "given in memory"


def digest(texts: Sequence[DomainText]) -> str:
    """Returns 16 hexadecimal digits that tell whether texts are the same."""
    data = json.dumps([[text.domain, text.text] for text in texts]).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def windows(tokenizer: Any, texts: Sequence[DomainText], tokens: int) -> Windows:
    """Cuts texts to prompts of one length.

    A text gives as many prompts as it has whole stretches of `tokens` tokens; what is left over
    at its end is dropped, and so is a text that is shorter. Texts are not joined: at a seam the
    router would see what no text has.

    Args:
        tokenizer: mlx-lm's; texts are taken raw, without a chat template.
        texts: The texts.
        tokens: Length of a prompt.

    Raises:
        ProfileError: If no text is that long, or the length is no positive int.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ProfileError(f"tokens is the length of a prompt, an int from 1 on; got {tokens!r}.")
    found: list[tuple[str, list[int]]] = []
    too_short = longest = 0
    for text in texts:
        ids = to_tokens(tokenizer, text.text, template=False)
        longest = max(longest, len(ids))
        too_short += len(ids) < tokens
        for start in range(0, len(ids) - tokens + 1, tokens):
            found.append((text.domain, ids[start : start + tokens]))
    if not found:
        raise ProfileError(
            f"No text has {tokens} tokens, and a profile counts prompts of equal length: the "
            f"longest has {longest}. Give longer texts, or shorter prompts (tokens={longest})."
        )
    return Windows(found, too_short)


def _in_file(path: Path) -> Iterator[DomainText]:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"The prompts {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"The prompts {path} are no UTF-8 text: {error}.") from error
    if path.suffix.lower() != ".jsonl":
        lines = [line.rstrip() for line in content.strip().splitlines()]
        parts = "\n".join(lines).split("\n\n") if "" in lines else lines
        yield from (DomainText(part.strip("\n")) for part in parts)
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ProfileError(f"Line {number} of {path} is not JSON: {error}.") from error
        yield _entry(item, f"line {number} of {path}")


def _entry(item: Any, where: str) -> DomainText:
    if isinstance(item, DomainText):
        return item
    if isinstance(item, str):
        return DomainText(item)
    if not isinstance(item, Mapping) or not isinstance(item.get("text"), str):
        raise ProfileError(f"{where} is no text, and has no 'text': {item!r:.60}.")
    domain = item.get("domain", ALL)
    if not isinstance(domain, str) or not domain:
        raise ProfileError(f"The domain of {where} is {domain!r:.60}; it must be a name.")
    return DomainText(item["text"], domain)


def _checked(texts: list[DomainText], where: str) -> list[DomainText]:
    found = [text for text in texts if text.text.strip()]
    if not found:
        raise ProfileError(f"There is no text in {where}.")
    return found
