"""What happened at one layer in one forward pass, and how a block weighs its experts.

Blocks compute `(y * weights[..., None]).sum(-2)`. `Weighted` is a switch's output that notices by
what it is multiplied: exactly the factor that the block applies, with no knowledge of how it was
made. A recording reads it; a lossy miss action also changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass(slots=True)
class LayerEvent:
    """One layer in one step."""

    layer: int
    ids: np.ndarray | mx.array
    """Experts that the router chose by itself, (…, top-k); lazy where nothing waits for them."""
    missing: frozenset[int] | None
    """Experts that were not resident; None where all always are."""
    weights: mx.array | None = None
    """The factors of `ids` by the family's own rule, (…, top-k, 1); lazy. None until the block has
    applied them, and in families that weigh in another way."""
    lossy: LossyDetail | None = None
    """What was computed instead; None where the layer computed what its router chose."""


@dataclass(slots=True)
class LossyDetail:
    """What a lossy miss action made of one layer's step. Arrays are lazy."""

    action: str
    """The action's name."""
    first: int
    """The expert in slot 0."""
    ids: mx.array
    """Experts in the places of the block's sum, (…, top-k). Those that are not resident were not
    computed, or as the action says. Ids past the experts need no memory."""
    applied: mx.array | None = None
    """Factors of `ids` as they were applied, (…, top-k, 1)."""
    beside: mx.array | None = None
    """Weights of `ids`, (…, top-k), where some are past the experts and are applied by the block
    beside the switch (longcat's identities); None elsewhere."""
    scores: tuple[mx.array, mx.array] | None = None
    """Selection scores of what the router chose by itself and of `ids`, (…, top-k), higher is
    better; None where the router was left alone."""


class Weighted(mx.array):
    """A switch's output that shows the block's factor to a hook, which says what is applied."""

    shape_of_factor: tuple[int, ...]
    hook: Callable[[mx.array], mx.array]

    def __mul__(self, factor: Any) -> mx.array:
        return super().__mul__(self.seen(factor))

    def __rmul__(self, factor: Any) -> mx.array:
        return super().__rmul__(self.seen(factor))

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> Weighted:
        """Converts, still watching."""
        return weighted(super().astype(dtype, stream=stream), self.shape_of_factor, self.hook)

    def seen(self, factor: Any) -> Any:
        """Shows the hook a factor that is going to be applied; returns what to apply instead."""
        # One factor for each expert's output; a scale, or an elementwise product, is none.
        if isinstance(factor, mx.array) and factor.shape == self.shape_of_factor:
            return self.hook(factor)
        return factor


def weighted(y: mx.array, shape: tuple[int, ...], hook: Callable[[mx.array], mx.array]) -> Weighted:
    """Returns `y`, the same array, as one that shows its factor.

    Args:
        y: A switch's output, (…, top-k, width).
        shape: The factor's shape, (…, top-k, 1).
        hook: Called with the factor; what it returns is applied in its place.
    """
    watched = Weighted(y)
    watched.shape_of_factor, watched.hook = shape, hook
    return watched


def noting(y: mx.array, event: LayerEvent) -> Weighted:
    """Returns `y` as an array that notes its factor in `event.weights` and applies it as it is."""

    def note(factor: mx.array) -> mx.array:
        event.weights = factor
        return factor

    return weighted(y, (*event.ids.shape, 1), note)
