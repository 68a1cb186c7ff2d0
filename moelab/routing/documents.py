"""Which text each run of a recording is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SchemaError, StudyError


@dataclass(frozen=True, slots=True)
class Document:
    """The text of one run."""

    run: int
    document: str
    domain: str
    """"" where none is known."""


def documents_of(given: Any, runs: Sequence[int]) -> list[Document]:
    """Returns the document of each run, by run.

    Args:
        given: A frame with `run`, `document` and perhaps `domain`; a mapping from run to a name or
            to (name, domain); or None, by which a run's number stands for its document.
        runs: The runs.

    Raises:
        SchemaError: If a column lacks, or a run has two documents.
        StudyError: If a run has no document.
    """
    import pandas as pd

    if given is None:
        return [Document(int(run), f"run {run}", "") for run in sorted(runs)]
    known: dict[int, Document] = {}
    if isinstance(given, pd.DataFrame):
        lacks = [name for name in ("run", "document") if name not in given.columns]
        if lacks:
            raise SchemaError(f"documents= lacks the columns {', '.join(lacks)}.")
        domains = given["domain"] if "domain" in given.columns else [""] * len(given)
        for run, name, domain in zip(given["run"], given["document"], domains, strict=True):
            one = Document(int(run), str(name), str(domain))
            if known.setdefault(one.run, one) != one:
                raise SchemaError(f"The column document has two names for run {run}.")
    else:
        for run, told in dict(given).items():
            name, domain = (told, "") if isinstance(told, str) else told
            known[int(run)] = Document(int(run), name, domain)
    lacking = sorted(set(map(int, runs)) - set(known))
    if lacking:
        raise StudyError(f"documents= says nothing of the runs {lacking}.")
    return [known[int(run)] for run in sorted(runs)]


def documents_in(source: Any, given: Any, runs: Sequence[int]) -> list[Document]:
    """As `documents_of`; where nothing is given, what the source itself says.

    Args:
        source: A trace (its `documents`), a frame with `document` and perhaps `domain`, or
            anything else.
        given: See `documents_of`.
        runs: The runs.
    """
    if given is None and hasattr(source, "documents"):
        given = source.documents
    elif given is None and hasattr(source, "columns") and "document" in source.columns:
        names = [n for n in ("run", "document", "domain") if n in source.columns]
        given = source[names].drop_duplicates()
    return documents_of(given, runs)
