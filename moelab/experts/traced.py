"""One forward pass of two tokens in which nothing is evaluated, for what it shows by its shapes.

Like the pass that finds a layer's top-k (`families.find_switches`), but with a cache, and with two
tokens, since with one some families take a way of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..families import SwitchSite


@dataclass(slots=True)
class Seen:
    """What a traced forward pass showed."""

    caches: list[Any] = field(default_factory=list)
    """The cache's leaves, after two tokens."""
    updates: dict[int, tuple[mx.array, mx.array]] = field(default_factory=dict)
    """Keys and values that were handed to a leaf, by its index."""
    heads: int = 0
    """Query heads, the most of any layer."""
    head_width: int = 0
    """Their width."""
    expanded: int = 0
    """Values of keys and values a cached token that attention gets, the most of any layer."""
    mask_heads: int = 0
    """Heads of the mask where it is an array; 0 where attention makes it up as it goes."""
    sinks: bool = False
    """Attention has sinks."""
    width: int = 0
    """Values a token in the residual stream."""
    dtype: Any = mx.float32
    """Type of the activations."""
    recurrent: int = 0
    """Bytes of the largest recurrent state."""


class _Probe(nn.Module):
    """Stands in for a switch, notes the activations' type and computes nothing."""

    def __init__(self, switch: nn.Module, seen: Seen) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, so that the switch does not become a child.
        object.__setattr__(self, "stands_for", switch)
        object.__setattr__(self, "seen", seen)

    def __call__(self, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        self.__dict__["seen"].dtype, self.__dict__["seen"].width = x.dtype, x.shape[-1]
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["stands_for"], key)  # what a family reads from its switch


def trace(model: nn.Module, sites: Sequence[SwitchSite]) -> Seen:
    """Runs two tokens through the model without evaluating anything; leaves it as it was.

    Args:
        model: mlx-lm's model; its arrays may be lazy and stay so.
        sites: Its MoE layers.
    """
    from mlx_lm.models.cache import make_prompt_cache

    seen = Seen()
    cache = make_prompt_cache(model)
    seen.caches = leaves(cache)
    for index, leaf in enumerate(seen.caches):
        _watch_updates(leaf, index, seen)
    try:
        with _watched_attention(seen):
            for site in sites:
                site.parent[site.key] = _Probe(site.switch, seen)
            model(mx.zeros((1, 2), mx.int32), cache=cache)
    finally:
        for site in sites:
            site.parent[site.key] = site.switch
        for leaf in seen.caches:
            leaf.__dict__.pop("update_and_fetch", None)
    for index, leaf in enumerate(seen.caches):
        if index not in seen.updates:
            seen.recurrent = max([seen.recurrent, *(a.nbytes for a in arrays(leaf))])
    return seen


def leaves(cache: Sequence[Any]) -> list[Any]:
    """Returns the caches in a cache, going into those that hold others."""
    found: list[Any] = []
    for entry in cache:
        inner = getattr(entry, "caches", None)
        found.extend([entry] if inner is None else leaves(inner))
    return found


def _watch_updates(leaf: Any, index: int, seen: Seen) -> None:
    update = getattr(leaf, "update_and_fetch", None)
    if update is None:
        return

    def watched(keys: mx.array, values: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.updates[index] = keys, values
        return update(keys, values, *args, **kwargs)

    leaf.update_and_fetch = watched  # an attribute of the instance hides the class's method


@contextmanager
def _watched_attention(seen: Seen) -> Iterator[None]:
    attention: Any = mx.fast.scaled_dot_product_attention

    def watched(q: mx.array, k: mx.array, v: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.expanded = max(seen.expanded, *(a.shape[1] * a.shape[3] for a in (k, v)))
        seen.heads, seen.head_width = max((seen.heads, seen.head_width), q.shape[1::2])
        mask = kwargs.get("mask")
        if isinstance(mask, mx.array):
            seen.mask_heads = max(seen.mask_heads, mask.shape[-3] if mask.ndim > 2 else 1)
        seen.sinks = seen.sinks or kwargs.get("sinks") is not None
        return attention(q, k, v, *args, **kwargs)

    mx.fast.scaled_dot_product_attention = watched
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = attention


def arrays(leaf: Any) -> list[mx.array]:
    """Returns the arrays that a cache holds."""
    held = [array for _, array in tree_flatten(list(vars(leaf).values()))]
    return [array for array in held if isinstance(array, mx.array)]
