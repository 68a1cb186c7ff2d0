"""Figures from recorded frames. Pure numpy and pandas: they know neither MLX nor a lab."""

from __future__ import annotations

from .balance import balance, counts, pin_coverage
from .chance import chance_table
from .consistency import segment_f1, segment_hits
from .demand import missed_mass, regime_ratio, universal_experts
from .labelled import labelled
from .locality import coactivation, repeats, saturation, working_set
from .misses import expert_shares, miss_rates
from .published import published
from .specialisation import (
    domain_information,
    domain_specialisation,
    token_shares,
    vocabulary_specialisation,
)
from .summary import summary

__all__ = [
    "balance",
    "chance_table",
    "coactivation",
    "counts",
    "domain_information",
    "domain_specialisation",
    "expert_shares",
    "labelled",
    "miss_rates",
    "missed_mass",
    "pin_coverage",
    "published",
    "regime_ratio",
    "repeats",
    "saturation",
    "segment_f1",
    "segment_hits",
    "summary",
    "token_shares",
    "universal_experts",
    "vocabulary_specialisation",
    "working_set",
]
