"""How much of everything a study runs, and on which texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...errors import StudyError
from ...quality.window import Document, documents_of, few_of_each

if TYPE_CHECKING:
    from ...lab import Lab


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of a study. Shares are of a layer's experts."""

    name: str
    texts: int
    """Texts a domain of each split."""
    shares: tuple[float, ...]
    """Capacities at which lossy actions run."""
    prefix: int = 48
    tokens: int = 40
    """Judged tokens a text."""
    record_tokens: int = 120
    """Tokens a text, after the prefix, of the recordings that policies are replayed on."""
    half: float = 0.5
    """The capacity of what is looked at closely."""
    misses: int = 12
    """Forced misses a text and action."""
    tasks: int = 50
    generations: int = 2
    """Prompts a domain to write from."""
    written: int = 60
    """Tokens a text that is written."""
    permutations: int = 100
    comparators: bool = True


SCALES = {
    scale.name: scale
    for scale in (
        Scale("full", 4, (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)),
        # For more trainings of one model: signs, not sizes.
        Scale(
            "signs", 2, (0.25, 0.5, 0.75), tokens=24, record_tokens=64, misses=12, tasks=0,
            generations=2, written=32, permutations=50, comparators=False,
        ),
        # To see that everything runs.
        Scale(
            "tiny", 2, (0.5, 0.75), prefix=12, tokens=4, record_tokens=20, misses=4, tasks=2,
            generations=1, written=4, permutations=5,
        ),
    )
}  # fmt: skip
"""Sizes by name."""

ACTIONS = ("low_bit", "substitute", "reroute", "drop")
"""The lossy actions of a study, from the most to the least faithful by their definition."""


def scale_of(name: str | Scale) -> Scale:
    """Returns a scale.

    Raises:
        StudyError: If there is none of that name.
    """
    if isinstance(name, Scale):
        return name
    if name not in SCALES:
        raise StudyError(f"scale must be one of {', '.join(SCALES)}, got {name!r}.")
    return SCALES[name]


def texts_for(lab: Lab, scale: Scale, split: str) -> list[dict[str, str]]:
    """Takes a few texts a domain of a split, of as many works as there are.

    Each is long enough for the longest thing that the study does with it, so that all parts of a
    study are of the same texts.
    """
    documents, _ = documents_of(None, split=split)
    least = scale.prefix + max(scale.tokens, scale.record_tokens) + 1
    chosen = few_of_each(lab.tokenizer, documents, least=least, each=scale.texts)
    return [as_given(document) for document in chosen]


def as_given(document: Document) -> dict[str, str]:
    """Returns a document as a text that every function of moelab takes."""
    return {
        "id": document.name, "domain": document.domain, "text": document.text,
        "title": document.source,
    }  # fmt: skip


def capacities(lab: Lab, scale: Scale) -> list[int]:
    """Returns the experts a layer of the scale's shares, those under top-k left out."""
    experts = min(site.experts for site in lab.sites)
    top_k = max(site.top_k for site in lab.sites)
    sizes = sorted({int(share * experts + 0.5) for share in scale.shares})
    return [size for size in sizes if top_k <= size < experts]


def settings_of(scale: Scale) -> dict[str, Any]:
    """Returns what a page says of the scale; JSON values."""
    return asdict(scale)
