"""How objects show themselves: the same facts as text for terminals and a table for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def facts_text(title: str, facts: Mapping[str, str]) -> str:
    """Returns a title and a line for each fact, aligned."""
    width = max(map(len, facts), default=0)
    return "\n".join([title, *(f"  {key:<{width}}  {value}" for key, value in facts.items())])


def facts_html(title: str, facts: Mapping[str, str]) -> str:
    """Returns a table with a row for each fact."""
    left = "style='text-align:left'"
    rows = "".join(
        f"<tr><th {left}>{escape(key)}</th><td {left}>{escape(value)}</td></tr>"
        for key, value in facts.items()
    )
    return f"<table><caption><b>{escape(title)}</b></caption>{rows}</table>"


def size(nbytes: int) -> str:
    """Returns a number of bytes as people write it, in powers of 1,000."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= step:
            return f"{nbytes / step:.{2 if nbytes < 10 * step else 1}f} {unit}"
    return f"{nbytes} bytes"
