"""Windows: what is cut from which text, how documents are named, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab import labmodel
from moelab.errors import ProfileError, StudyError
from moelab.prompt_texts import DomainText
from moelab.quality.window import (
    MOST_TOKENS,
    Document,
    Window,
    _distinct,
    documents_of,
    few_of_each,
    windows_of,
)

WORDS: Any = SimpleNamespace(
    bos_token=None, encode=lambda text, **_: [int(word) for word in text.split()]
)
"""A tokenizer of numbers."""


def numbers(count: int, start: int = 0) -> str:
    return " ".join(str(n) for n in range(start, start + count))


def test_a_window_is_the_texts_beginning() -> None:
    (window,) = windows_of(WORDS, [numbers(30, 100)], prefix=6, tokens=4)
    assert window.tokens == tuple(range(100, 111))
    assert window.judged == len(window.fed) == len(window.wanted) == len(window.positions) == 4
    # The first token after the prefix is fed, and the one after it is the first judged.
    assert window.fed == (106, 107, 108, 109)
    assert window.wanted == (107, 108, 109, 110)
    assert [window.tokens[p] for p in window.positions] == list(window.wanted)


def test_to_the_end_has_a_cap() -> None:
    windows = windows_of(WORDS, [numbers(12), numbers(900)], prefix=6, tokens=None)
    assert [window.judged for window in windows] == [5, MOST_TOKENS]


def test_short_texts_are_named() -> None:
    texts = [{"text": numbers(5 + n % 7), "id": f"doc-{n}"} for n in range(21)]
    with pytest.raises(StudyError, match=r"18 of 21 texts .* takes 11 tokens: 'doc-0' \(5\)") as e:
        windows_of(WORDS, texts, prefix=6, tokens=4)
    assert "'doc-5' (10) and 13 more" not in str(e.value) and "and 13 more" in str(e.value)
    with pytest.raises(StudyError, match="at least 1 judged token, which takes 8 tokens"):
        windows_of(WORDS, [numbers(7)], prefix=6, tokens=None)
    assert len(windows_of(WORDS, [numbers(11)], prefix=6, tokens=4)) == 1


@pytest.mark.parametrize("texts", [[], ["", "  "], [{"text": "\n"}]])
def test_no_text(texts: list[Any]) -> None:
    with pytest.raises(StudyError, match="There is no text"):
        windows_of(WORDS, texts, prefix=1, tokens=1)


@pytest.mark.parametrize("texts", [7, [7], [{"domain": "x"}]])
def test_no_texts_at_all(texts: Any) -> None:
    with pytest.raises((StudyError, ProfileError), match=r"got 7|no 'text'|is no text"):
        windows_of(WORDS, texts, prefix=1, tokens=1)


@pytest.mark.parametrize("given", [{"prefix": 0}, {"prefix": True}, {"tokens": 0}, {"tokens": 2.5}])
def test_numbers_of_tokens(given: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match=f"{next(iter(given))} is a number of tokens"):
        windows_of(WORDS, [numbers(9)], **{"prefix": 2, "tokens": 2, **given})


def test_names_and_domains() -> None:
    mixed: list[Any] = [
        "1 2", " ", {"text": "3 4", "id": "a", "title": "book"}, {"text": "5", "title": "book"},
        {"text": "6", "id": "a", "domain": "x"}, DomainText("7", "y"),
    ]  # fmt: skip
    found, called = documents_of(mixed)
    assert [d.name for d in found] == ["text 0", "a", "book", "a (2)", "text 4"]
    assert [d.domain for d in found] == ["other", "other", "other", "x", "y"]
    assert [d.text for d in found] == ["1 2", "3 4", "5", "6", "7"], "empty texts take no name"
    assert called == "given in memory"
    assert {d.domain for d in documents_of(["1", "2"])[0]} == {"all"}


def test_shipped_texts_are_named_by_id() -> None:
    found, called = documents_of(None, split="selection")
    assert [d.name for d in found] == [t["id"] for t in labmodel.texts(split="selection")]
    assert "selection" in called


def test_a_file(tmp_path: Any) -> None:
    (tmp_path / "texts.txt").write_text("1 2 3\n\n4 5 6\n")
    windows = windows_of(WORDS, tmp_path / "texts.txt", prefix=1, tokens=1)
    assert [window.tokens for window in windows] == [(1, 2, 3), (4, 5, 6)]
    assert [window.document for window in windows] == ["text 0", "text 1"]


@given(st.lists(st.sampled_from(["a", "b", "a (2)", "a (3)"])))
def test_names_are_distinct(names: list[str]) -> None:
    found = _distinct(names)
    assert len(set(found)) == len(names)
    for place, (name, other) in enumerate(zip(names, found, strict=True)):
        assert other.startswith(name)
        assert (other == name) == (name not in names[:place]), "the first keeps its name"


def test_few_of_each_takes_other_sources_first() -> None:
    rows = [("a", "p"), ("b", "p"), ("c", "p"), ("d", "q"), ("e", "q"), ("f", "r")]
    documents = [Document(name, "x", numbers(9), source) for name, source in rows]
    documents.append(Document("short", "x", numbers(3), "s"))
    documents.append(Document("g", "y", numbers(9), "t"))

    def names(each: int) -> list[str]:
        return [d.name for d in few_of_each(WORDS, documents, least=5, each=each)]

    assert names(3) == ["a", "d", "f", "g"]
    assert names(4) == ["a", "b", "d", "f", "g"]
    assert names(9) == ["a", "b", "c", "d", "e", "f", "g"]
    with pytest.raises(StudyError, match="the longest has 9"):
        few_of_each(WORDS, documents, least=10, each=1)


def test_windows_are_values() -> None:
    assert Window("d", "x", (1, 2, 3), 1) == Window("d", "x", (1, 2, 3), 1)
    with pytest.raises(AttributeError):
        Window("d", "x", (1,), 1).prefix = 2  # type: ignore[misc]
