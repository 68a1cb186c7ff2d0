"""Figures from recorded frames. Pure numpy and pandas: they know neither MLX nor a lab."""

from __future__ import annotations

from .misses import expert_shares, miss_rates

__all__ = ["expert_shares", "miss_rates"]
