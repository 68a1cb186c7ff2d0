"""Charts of frames. Each function takes a frame and returns matplotlib `Axes`.

All take `ax` (where to draw; None makes new Axes) and `note` (the text under the chart; see
`style.finish`: charts of the lab model say by themselves that it is a tiny model).
"""

from __future__ import annotations

from . import curves, quality, study
from .curves import miss_ratio
from .misses import cost_by_capacity, safe_capacities
from .quality import (
    agreement,
    arms,
    capacity,
    capacity_within,
    cliff,
    damage_shares,
    frontier,
    kl_by_position,
    kl_quantiles,
)
from .routing import domain_experts, expert_map, hit_rate_by_layer, hit_rate_over_time
from .study import (
    balance,
    by_layer,
    forecast,
    locality,
    pin_transfer,
    policies,
    price_by_weight,
    working_set,
)
from .style import lab_model_note
from .tokens import coloured_text, token_experts

__all__ = [
    "agreement",
    "arms",
    "balance",
    "by_layer",
    "capacity",
    "capacity_within",
    "cliff",
    "coloured_text",
    "cost_by_capacity",
    "curves",
    "damage_shares",
    "domain_experts",
    "expert_map",
    "forecast",
    "frontier",
    "hit_rate_by_layer",
    "hit_rate_over_time",
    "kl_by_position",
    "kl_quantiles",
    "lab_model_note",
    "locality",
    "miss_ratio",
    "pin_transfer",
    "policies",
    "price_by_weight",
    "quality",
    "safe_capacities",
    "study",
    "token_experts",
    "working_set",
]
