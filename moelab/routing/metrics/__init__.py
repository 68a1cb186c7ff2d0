"""Figures from recorded frames. Pure numpy and pandas: they know neither MLX nor a lab."""

from __future__ import annotations

from .balance import balance, counts, pin_coverage
from .chance import chance_table
from .misses import expert_shares, miss_rates
from .published import published

__all__ = [
    "balance",
    "chance_table",
    "counts",
    "expert_shares",
    "miss_rates",
    "pin_coverage",
    "published",
]
