"""Expert counts that other people published, shipped to hold our figures against."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import StudyError

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent.parent / "published"

MODELS = {"olmoe": (64, 8), "mixtral": (8, 2)}
"""Experts and top-k, by name."""

TOKENS = 208_896
"""Tokens a domain that were counted."""


def published(name: str) -> pd.DataFrame:
    """Returns how often the router of a published model chose each expert.

    From the counts that the makers of OLMoE published (allenai/OLMoE at 357454f,
    `scripts/routing_output`, Apache License 2.0). Figures that are made of them are "recomputed
    from published counts".

    Args:
        name: `"olmoe"` (OLMoE-1B-7B, 8 of 64 experts, layers 0, 7, 15) or `"mixtral"`
            (Mixtral-8x7B, 2 of 8, layers 0, 15, 31).

    Returns:
        `domain` (`"arxiv"`, `"c4"`, `"github"`), `layer`, `expert`, `count`, `tokens` (int64): a
        frame as `balance` and `pin_coverage` take it.

    Raises:
        StudyError: If there is no such model.
    """
    import pandas as pd

    if name not in MODELS:
        raise StudyError(f"Published counts are there of {', '.join(MODELS)}; not of {name!r}.")
    frame = pd.read_csv(FOLDER / f"{name}_expert_counts.csv")
    return frame.assign(tokens=TOKENS)
