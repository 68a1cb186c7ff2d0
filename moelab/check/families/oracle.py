"""What factor a block really applies to each expert: asked of the block, not of its source.

In a switch's place stands one whose expert e answers with the basis vector e. What the block then
returns *is* its weights, one in each component, after what it adds besides has been taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...families import SwitchSite

SCALE = 1024.0
"""Of the basis vectors: what a block adds besides its experts rounds away less of the weights."""

NOT_VALID: dict[str, str] = {
    "llama4": "the block weighs the experts' input, not their output: weights are recorded as NaN",
    "muse_spark": "the block normalises each expert's output before it weighs it: weights are "
    "recorded as NaN",
}
"""Families that apply no factor to an expert's output, and what they do."""

SUM_GOES_TO: dict[str, str] = {
    "nemotron_h": "fc2_latent_proj",
    "kimi_k3": "routed_expert_norm",
}
"""Where the weighted sum can be seen only as the input of another child of the block."""

SUM_IS_SCALED: dict[str, Callable[[Any, mx.array], mx.array | float]] = {
    "laguna": lambda block, x: block.routed_scaling_factor,
    "Klear": lambda block, x: mx.softmax(block.coefficient(x), axis=-1, precise=True)[..., :1],
}
"""What the block multiplies the sum by, the same for all of a token's experts: no gate weight."""

Arguments = tuple[Any, ...]


class Basis(nn.Module):
    """In a switch's place: expert e answers with basis vector e."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Returns basis vectors, (…, top-k, width of `x`)."""
        return (mx.eye(x.shape[-1])[indices] * self._scale).astype(x.dtype)


class _Tap(nn.Module):
    """Notes what a module is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "given", None)

    def __call__(self, x: mx.array) -> Any:
        object.__setattr__(self, "given", x)
        return self.__dict__["module"](x)


@contextmanager
def noted_arguments(sites: Sequence[SwitchSite]) -> Iterator[Mapping[int, list[Arguments]]]:
    """Notes, by layer, what each MoE block is called with while the `with` block runs."""
    seen: dict[int, list[Arguments]] = {site.layer: [] for site in sites}
    own = {site.layer: type(site.parent) for site in sites}

    def noting(site: SwitchSite) -> type:
        block: Any = own[site.layer]

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen[site.layer].append((*args, *kwargs.values()))
            return block.__call__(self, *args, **kwargs)

        return type(block.__name__, (block,), {"__call__": call})

    try:
        for site in sites:
            site.parent.__class__ = noting(site)
        yield seen
    finally:
        for site in sites:
            site.parent.__class__ = own[site.layer]


def applied_weights(family: str, site: SwitchSite, args: Arguments) -> np.ndarray:
    """Asks one block for the factors that it applies.

    Args:
        family: Its name.
        site: Where it is, in a stock model.
        args: What it is called with.

    Returns:
        float32 (tokens, experts), 0 for those that a token did not choose.
    """
    child = SUM_GOES_TO.get(family)
    tap = None if child is None else _Tap(site.parent[child])

    def answer(scale: float) -> mx.array:
        site.parent[site.key] = Basis(scale)
        out = site.parent(*args)
        return (out if tap is None else tap.given).astype(mx.float32)

    try:
        if child is not None:
            site.parent[child] = tap
        both, others = answer(SCALE), answer(0.0)
    finally:
        site.parent[site.key] = site.switch
        if child is not None and tap is not None:
            site.parent[child] = tap.__dict__["module"]
    weights = (both - others) / SCALE
    if family in SUM_IS_SCALED:
        weights = weights / SUM_IS_SCALED[family](site.parent, args[0])
    return np.array(weights).reshape(-1, weights.shape[-1])[:, : site.experts]


def recorded_weights(routing: Any, tokens: Any, layer: int, experts: int) -> np.ndarray:
    """Returns a layer's recorded weights as (tokens, experts), 0 where nothing was routed.

    Args:
        routing: A recording's frame of routed slots.
        tokens: Its frame of tokens, which are counted in its order.
        layer: The layer.
        experts: Its number of experts.
    """
    keys = ["run", "sequence", "step", "position"]
    number = {key: i for i, key in enumerate(tokens[keys].itertuples(index=False, name=None))}
    rows = routing[routing["layer"] == layer]
    at = [number[key] for key in rows[keys].itertuples(index=False, name=None)]
    found = np.zeros((len(number), experts), np.float32)
    np.add.at(found, (at, rows["expert"].to_numpy()), rows["weight"].to_numpy())
    return found
