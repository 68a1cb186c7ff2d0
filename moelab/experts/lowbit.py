"""Copies of a layer's experts at few bits, for the miss action `low_bit`."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn

from ..errors import MissActionError
from ..families import SwitchSite
from .bank import LayerBank
from .residency import Load

GROUP = 64
"""Weights that share a scale and a bias."""

BATCH = 8
"""Experts that are read and quantised at a time."""


def low_bit_copies(layer: LayerBank, bits: int) -> nn.Module:
    """Quantises all experts of a layer to few bits.

    Each is read from disk, dequantised and quantised again: affine, groups of 64. Beside the
    copies only a few experts are in memory at a time.

    Args:
        layer: The layer.
        bits: 2 or 3.

    Returns:
        A switch as the layer's own, with (experts, …) arrays in memory.

    Raises:
        MissActionError: If a projection's input width is no multiple of the group.
    """
    scratch = layer.scratch(min(BATCH, layer.experts))
    made: dict[tuple[str, str], list[mx.array]] = {}
    for begin in range(0, layer.experts, scratch.capacity):
        experts = range(begin, min(begin + scratch.capacity, layer.experts))
        scratch.loader.read([Load(e, slot, None) for slot, e in enumerate(experts)])
        for name in layer.site.projections:
            for key, array in _quantised(scratch.switch[name], len(experts), bits).items():
                made.setdefault((name, key), []).append(array)
        # Before the next batch is read over these.
        mx.eval(list(made.values()))
    switch = copy.copy(layer.site.switch)
    for name in layer.site.projections:
        arrays = {key: mx.concatenate(parts) for (n, key), parts in made.items() if n == name}
        mx.eval(arrays)
        for key in arrays:
            del made[name, key]
        switch[name] = projection_of(arrays, bits)
    return switch


def copies_in_memory(site: SwitchSite, bits: int) -> nn.Module:
    """Quantises all experts of a layer that stayed stock; as `low_bit_copies`, without a disk.

    Args:
        site: The layer, whose switch has all its experts in memory.
        bits: 2 or 3.

    Raises:
        MissActionError: If a projection's input width is no multiple of the group.
    """
    switch = copy.copy(site.switch)
    for name in site.projections:
        arrays = _quantised(site.switch[name], site.experts, bits)
        mx.eval(arrays)
        switch[name] = projection_of(arrays, bits)
    return switch


def low_bit_bytes(site: SwitchSite, bits: int) -> int:
    """Returns the bytes that `low_bit_copies` will take; nothing is evaluated."""
    total = 0
    for projection in site.projections.values():
        rows, width = projection.output_dims, projection.input_dims
        item = _plain(projection, 1).dtype.size
        total += site.experts * rows * (width * bits // 8 + 2 * item * width // GROUP)
        total += projection["bias"].nbytes if "bias" in projection else 0
    return total


def _quantised(projection: nn.Module, count: int, bits: int) -> dict[str, mx.array]:
    """Returns the first `count` experts of a projection at few bits."""
    weight = _plain(projection, count)
    if weight.shape[-1] % GROUP:
        raise MissActionError(
            f"low_bit keeps copies in groups of {GROUP} weights, and this model's experts are "
            f"{weight.shape[-1]} wide, which is no multiple of it. Take another action."
        )
    packed, scales, biases = mx.quantize(weight, GROUP, bits)
    arrays = {"weight": packed, "scales": scales, "biases": biases}
    if "bias" in projection:
        arrays["bias"] = projection["bias"][:count] + 0  # a copy: the slots are written over
    return arrays


def _plain(projection: nn.Module, count: int) -> mx.array:
    weight = projection["weight"][:count]
    if "scales" not in projection:
        return weight
    biases, scale = projection.get("biases"), projection.get("global_scale")
    if scale is not None:  # one scale an expert, and dequantize takes one for all
        parts = [
            mx.dequantize(
                weight[i], projection["scales"][i], group_size=projection.group_size,
                bits=projection.bits, mode=projection.mode, global_scale=scale[i],
            )
            for i in range(count)
        ]  # fmt: skip
        return mx.stack(parts)
    return mx.dequantize(
        weight, projection["scales"][:count], None if biases is None else biases[:count],
        group_size=projection.group_size, bits=projection.bits, mode=projection.mode,
    )  # fmt: skip


def projection_of(arrays: dict[str, mx.array], bits: int) -> nn.Module:
    """Returns mlx-lm's quantised switch layer over arrays of `low_bit_copies`."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    made = QuantizedSwitchLinear(GROUP, 8, 1, "bias" in arrays, GROUP, bits)
    for key, array in arrays.items():
        made[key] = array
    return made
