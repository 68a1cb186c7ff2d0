"""Charts of recorded frames. Each function takes a frame and returns matplotlib `Axes`."""

from __future__ import annotations

from .misses import cost_by_capacity, safe_capacities
from .routing import domain_experts, expert_map, hit_rate_by_layer, hit_rate_over_time

__all__ = [
    "cost_by_capacity",
    "domain_experts",
    "expert_map",
    "hit_rate_by_layer",
    "hit_rate_over_time",
    "safe_capacities",
]
