"""Experts at few bits, by dequantising: what `low_bit` must compute with."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx


def requantised(switch: Any, bits: int) -> Any:
    """A switch whose weights went through few bits and back, dense."""
    from mlx_lm.models.switch_layers import SwitchLinear

    made = copy.copy(switch)
    for name, projection in switch.items():
        if not hasattr(projection, "num_experts"):
            continue
        weight = projection.weight
        if "scales" in projection:
            weight = mx.dequantize(
                weight, projection.scales, projection.get("biases"), projection.group_size,
                projection.bits, mode=projection.mode,
            )  # fmt: skip
        few = mx.quantize(weight, 64, bits)
        plain = SwitchLinear(64, 8, 1, bias="bias" in projection)
        plain.weight = mx.dequantize(*few, 64, bits)
        if "bias" in projection:
            plain.bias = projection.bias
        made[name] = plain
    return made
