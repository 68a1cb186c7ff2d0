"""Routing metrics over recordings, each with its chance value beside it.

They take a recording, its `routing` frame, or what `labelled` makes of several recordings, and
give tidy frames with a row a domain, phase and layer. Phases are never pooled. `balance` and
`pin_coverage` take counts, such as `counts` or `published` give. `router_margins` and
`lookahead_recall` need a running model and take a lab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .routing.metrics import (
    balance,
    chance_table,
    coactivation,
    counts,
    domain_information,
    domain_specialisation,
    expert_shares,
    labelled,
    miss_rates,
    missed_mass,
    pin_coverage,
    published,
    regime_ratio,
    repeats,
    saturation,
    segment_f1,
    segment_hits,
    summary,
    token_shares,
    universal_experts,
    vocabulary_specialisation,
    working_set,
)

if TYPE_CHECKING:
    from .routing.lookahead import lookahead_recall, router_margins

__all__ = [
    "balance",
    "chance_table",
    "coactivation",
    "counts",
    "domain_information",
    "domain_specialisation",
    "expert_shares",
    "labelled",
    "lookahead_recall",
    "miss_rates",
    "missed_mass",
    "pin_coverage",
    "published",
    "regime_ratio",
    "repeats",
    "router_margins",
    "saturation",
    "segment_f1",
    "segment_hits",
    "summary",
    "token_shares",
    "universal_experts",
    "vocabulary_specialisation",
    "working_set",
]


def __getattr__(name: str) -> Any:
    """Imports what needs MLX when it is first used."""
    if name in ("lookahead_recall", "router_margins"):
        from .routing import lookahead

        return getattr(lookahead, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
