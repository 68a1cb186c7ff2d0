"""Routing metrics over recordings, each with its chance value beside it.

All take a recording, its `routing` frame, or what `labelled` makes of several recordings, and give
tidy frames with a row a domain, phase and layer. Phases are never pooled.
"""

from __future__ import annotations

from .routing.metrics import (
    balance,
    chance_table,
    counts,
    expert_shares,
    miss_rates,
    pin_coverage,
    published,
)

__all__ = [
    "balance",
    "chance_table",
    "counts",
    "expert_shares",
    "miss_rates",
    "pin_coverage",
    "published",
]
