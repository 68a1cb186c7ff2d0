"""What MLX's affine quantisation does to a weight, in PyTorch.

`mx.quantize` gives each group of weights a scale and an offset and rounds to
one of 2^bits steps. `fake_quantise` returns the rounded weight, and lets the
gradient through as if nothing had been rounded (a straight-through estimator),
so that the end of training adapts the weights to the grid that they will be
stored on. A test holds it against `mx.quantize` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
BITS = 4
#: mlx-lm keeps the routers of this family at 8 bits.
ROUTER_BITS = 8
_EPS = 1e-7


def quantised(weight: Tensor, bits: int = BITS, group: int = GROUP) -> Tensor:
    """Return the value that MLX reads back after quantising.

    Args:
        weight: Any shape; groups lie along the last axis, whose size they divide.
        bits: Bits a weight.
        group: Weights that share a scale and an offset.
    """
    steps = float(2**bits - 1)
    w = weight.float().unflatten(-1, (-1, group))
    high, low = w.amax(-1, keepdim=True), w.amin(-1, keepdim=True)
    # The end of the range with the larger magnitude is kept exact.
    low_is_edge = low.abs() > high.abs()
    scale = ((high - low) / steps).clamp_min(_EPS)
    scale = torch.where(low_is_edge, scale, -scale)
    edge = torch.where(low_is_edge, low, high)
    zero_at = torch.round(edge / scale)
    is_zero = zero_at == 0
    scale = torch.where(is_zero, scale, edge / torch.where(is_zero, torch.ones_like(edge), zero_at))
    offset = torch.where(is_zero, torch.zeros_like(edge), edge)
    steps_of = torch.round((w - offset) / scale).clamp(0, steps)
    return (steps_of * scale + offset).flatten(-2).to(weight.dtype)


def fake_quantise(weight: Tensor, bits: int = BITS, group: int = GROUP) -> Tensor:
    """`quantised`, with the gradient of the identity."""
    with torch.no_grad():
        change = quantised(weight, bits, group) - weight
    return weight + change


def bits_for(name: str, weight: Tensor, group: int = GROUP) -> int | None:
    """Say at how many bits mlx-lm stores a parameter of this family.

    Args:
        name: The parameter's name, as in `transformers`.
        weight: The parameter.
        group: The group size.

    Returns:
        4 or 8, or None for what stays float: norms, convolutions, decays.
    """
    if weight.dim() < 2 or "conv1d" in name or weight.shape[-1] % group:
        return None
    if name.endswith((".mlp.gate.weight", ".shared_expert_gate.weight")):
        return ROUTER_BITS
    return BITS
