"""How figures are written on the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .bandwidth import Spread
from .exact import Difference


def worst(differences: Iterable[Difference]) -> str:
    """The largest of some differences, or "none" where every bit is the same."""
    some = list(differences)
    if all(d.equal for d in some):
        return "none"
    if any(d.max_rel is None for d in some):
        return "not a number"
    return share(max(d.max_rel or 0.0 for d in some))


def share(value: float) -> str:
    """A share, however small."""
    if value == 0:
        return "nothing"
    return f"{value:.1%}" if value >= 0.001 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """A share in whole per cent."""
    return "not known" if value is None else f"{value:.0%}"


def yes(fine: bool | None) -> str:
    """Whether something is as promised; a dash where nothing is."""
    return "–" if fine is None else "yes" if fine else "**no**"


def ratio(one: Spread, other: Spread) -> str:
    """One median as a share of another."""
    return f"{one.median / other.median:.0%}"


def spread(s: Spread, digits: int) -> str:
    """Median, lowest and highest."""
    return f"{s.median:.{digits}f} ({s.low:.{digits}f}–{s.high:.{digits}f})"


def listed(numbers: Sequence[int]) -> str:
    """Numbers, the first ten of them."""
    shown = ", ".join(map(str, numbers[:10]))
    return shown if len(numbers) <= 10 else f"{shown} and {len(numbers) - 10} more"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read in a terminal as well."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    )


def slots(capacity: Sequence[int]) -> str:
    """Slots a layer."""
    few, many = min(capacity), max(capacity)
    return str(few) if few == many else f"{few} to {many}"
