"""What running a model takes beside its weights: the cache of a context, and prefill.

Both are read off one traced forward pass of two tokens, in which nothing is evaluated and the
experts are not needed. mlx-lm's own cache objects note what the model hands them, and are then
filled in the steps in which a prompt is really read, again without evaluating anything, so that
steps of 256, windows that stop growing, quantised keys and constant recurrent states are what
mlx-lm makes of them and not what a formula says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import CapacityError
from ..families import SwitchSite

DEFAULT_CONTEXT = 8192
"""Tokens, unless asked otherwise or the model allows less."""

PREFILL_CHUNK = 2048
"""Prompt tokens a forward pass, as in mlx-lm."""

KV_GROUP = 64
"""Values that share a scale in a quantised cache, as in mlx-lm."""

HIDDEN_COPIES = 4
"""Tensors as wide as the residual stream that a layer holds beside its own work."""

FUSED_WIDTHS = (64, 80, 128)
"""Head widths for which Metal computes attention without holding the scores.
Source: MLX, mlx/backend/metal/scaled_dot_product_attention.cpp."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that running takes beside the weights."""

    context: int
    """Tokens that the cache holds."""
    chunk: int
    """Prompt tokens a forward pass."""
    kv_bits: int | None
    """Bits of a quantised cache; None for the model's own type."""
    growing: int
    """Bytes of cache for the context in those parts that grow with it."""
    constant: int
    """Bytes of cache that any context takes: recurrent states."""
    prefill: int
    """Estimate of what a chunk needs at its peak, beside weights and cache."""

    @property
    def cache(self) -> int:
        """Bytes of the whole cache."""
        return self.growing + self.constant


def default_context(config: dict[str, Any]) -> int:
    """Returns `DEFAULT_CONTEXT`, or the most that the model allows if that is less."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            longest = part.get("max_position_embeddings")
            if isinstance(longest, int) and not isinstance(longest, bool) and longest > 0:
                return min(DEFAULT_CONTEXT, longest)
    return DEFAULT_CONTEXT


def footprint(
    model: nn.Module,
    sites: Sequence[SwitchSite],
    *,
    context: int,
    kv_bits: int | None = None,
    chunk: int = PREFILL_CHUNK,
    widen: bool = False,
) -> Footprint:
    """Works out what a context and reading it take, without evaluating an array.

    Args:
        model: mlx-lm's model; its arrays may be lazy and stay so.
        sites: Its MoE layers.
        context: Tokens that the cache is to hold, prompt and answer together.
        kv_bits: 8, 4 or None for the model's own type.
        chunk: Prompt tokens a forward pass.
        widen: The model will be converted to float32 (`dtype="float32"`).

    Raises:
        CapacityError: If an argument is out of range, or this family's cache cannot be quantised.
    """
    for name, value in (("context", context), ("prefill_step_size", chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CapacityError(f"{name} must be a positive number of tokens, got {value!r}.")
    if kv_bits not in (None, 4, 8):
        raise CapacityError(f"kv_bits must be 8, 4 or None, got {kv_bits!r}.")
    seen = _trace(model, sites)
    filling = _Filling(seen, context, kv_bits, chunk, widen)
    growing, constant, largest, rows = _cache_bytes(model, filling)
    size = _size(seen.dtype, widen)
    hidden = HIDDEN_COPIES * seen.width
    linear = max(_layer_widths(model, sites), default=0)
    experts = max(_expert_widths(site) for site in sites)
    # Of a layer's parts one is at work at a time. Off Metal, mlx-lm steps through a recurrence
    # in Python, and every token's state is alive until the chunk is evaluated.
    recurrent = 0 if _metal() else seen.recurrent
    mixing = linear * size + max(recurrent, _scores_a_token(filling, rows) * size)
    prefill = min(chunk, context) * (hidden * size + max(mixing, experts * size)) + largest
    return Footprint(context, chunk, kv_bits, growing, constant, prefill)


# -- one traced pass ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What a traced forward pass showed."""

    caches: list[Any] = field(default_factory=list)
    """The cache's leaves, after two tokens."""
    updates: dict[int, tuple[mx.array, mx.array]] = field(default_factory=dict)
    """Keys and values that were handed to a leaf, by its index."""
    heads: int = 0
    """Query heads, the most of any layer."""
    head_width: int = 0
    """Their width."""
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

    def __init__(self, switch: nn.Module, seen: _Seen) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, so that the switch does not become a child.
        object.__setattr__(self, "stands_for", switch)
        object.__setattr__(self, "seen", seen)

    def __call__(self, x: mx.array, indices: mx.array, *_: Any) -> mx.array:
        self.__dict__["seen"].dtype, self.__dict__["seen"].width = x.dtype, x.shape[-1]
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["stands_for"], key)  # what a family reads from its switch


def _trace(model: nn.Module, sites: Sequence[SwitchSite]) -> _Seen:
    from mlx_lm.models.cache import make_prompt_cache

    seen = _Seen()
    cache = make_prompt_cache(model)
    seen.caches = _leaves(cache)
    for index, leaf in enumerate(seen.caches):
        _watch_updates(leaf, index, seen)
    try:
        with _watched_attention(seen):
            for site in sites:
                site.parent[site.key] = _Probe(site.switch, seen)
            # Two tokens, since with one some families take a way of their own.
            model(mx.zeros((1, 2), mx.int32), cache=cache)
    finally:
        for site in sites:
            site.parent[site.key] = site.switch
        for leaf in seen.caches:
            leaf.__dict__.pop("update_and_fetch", None)
    for index, leaf in enumerate(seen.caches):
        if index not in seen.updates:
            seen.recurrent = max([seen.recurrent, *(a.nbytes for a in _arrays(leaf))])
    return seen


def _leaves(cache: Sequence[Any]) -> list[Any]:
    """Returns the caches in a cache, going into those that hold others."""
    found: list[Any] = []
    for entry in cache:
        inner = getattr(entry, "caches", None)
        found.extend([entry] if inner is None else _leaves(inner))
    return found


def _watch_updates(leaf: Any, index: int, seen: _Seen) -> None:
    update = getattr(leaf, "update_and_fetch", None)
    if update is None:
        return

    def watched(keys: mx.array, values: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.updates[index] = keys, values
        return update(keys, values, *args, **kwargs)

    leaf.update_and_fetch = watched  # an attribute of the instance hides the class's method


@contextmanager
def _watched_attention(seen: _Seen) -> Iterator[None]:
    attention: Any = mx.fast.scaled_dot_product_attention

    def watched(q: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.heads, seen.head_width = max((seen.heads, seen.head_width), q.shape[1::2])
        mask = kwargs.get("mask")
        if isinstance(mask, mx.array):
            seen.mask_heads = max(seen.mask_heads, mask.shape[-3] if mask.ndim > 2 else 1)
        seen.sinks = seen.sinks or kwargs.get("sinks") is not None
        return attention(q, *args, **kwargs)

    mx.fast.scaled_dot_product_attention = watched
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = attention


# -- the cache ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Filling:
    """What is asked of the cache, and what the traced pass showed."""

    seen: _Seen
    context: int
    kv_bits: int | None
    chunk: int
    widen: bool

    def steps(self) -> list[int]:
        """Tokens of each forward pass: a prompt's last token and the answer's come singly."""
        chunks, rest = divmod(self.context - 1, self.chunk)
        return [*[self.chunk] * chunks, *([rest] if rest else []), 1]


def _cache_bytes(model: nn.Module, filling: _Filling) -> tuple[int, int, int, int]:
    """Returns bytes that grow, bytes that are constant, the largest leaf's, and the most keys."""
    from mlx_lm.models.cache import make_prompt_cache

    seen = filling.seen
    constant = largest = rows = 0
    known: dict[Any, tuple[list[int], int]] = {}
    held = [0] * len(filling.steps())
    own: list[int] | None = None
    for index, fresh in enumerate(_leaves(make_prompt_cache(model))):
        if index in seen.updates:
            keys, values = seen.updates[index]
            kind = (type(fresh), keys.shape, values.shape, keys.dtype, str(_plain(fresh)))
            if kind not in known:
                known[kind] = _fill(fresh, keys, values, filling)
            held = [a + b for a, b in zip(held, known[kind][0], strict=True)]
            largest, rows = max(largest, *known[kind][0]), max(rows, known[kind][1])
        elif type(fresh).__name__ == "ArraysCache":
            constant += sum(_widened(a, filling.widen) for a in _arrays(seen.caches[index]))
        else:
            if own is None:
                own = _extrapolated(model, filling)
            held = [a + own[index] for a in held]
    # Windows may hold more while a prompt is read than afterwards, so the last is not the most.
    return max(held), constant, largest, rows


def _fill(leaf: Any, keys: mx.array, values: mx.array, filling: _Filling) -> tuple[list[int], int]:
    """Fills an empty cache as a prompt does.

    Returns:
        Its bytes after each forward pass, and the most keys that attention saw.
    """
    from mlx_lm.generate import maybe_quantize_kv_cache

    holder, sizes, rows = [leaf], [], 0
    for step in filling.steps():
        if hasattr(holder[0], "maybe_trim_front"):
            holder[0].maybe_trim_front()
        made = []
        for a in (keys, values):
            dtype = mx.float32 if _wide(a, filling.widen) else a.dtype
            made.append(mx.zeros((*a.shape[:2], step, *a.shape[3:]), dtype))
        try:
            fetched = holder[0].update_and_fetch(*made)
            maybe_quantize_kv_cache(holder, 0, KV_GROUP, filling.kv_bits)
        except (NotImplementedError, ValueError) as error:
            if filling.kv_bits is None:
                raise
            raise CapacityError(
                f"This model's cache cannot be quantised to {filling.kv_bits} bits by mlx-lm "
                f"({error}). Leave kv_bits away."
            ) from error
        first = fetched[0][0] if isinstance(fetched[0], tuple | list) else fetched[0]
        rows = max(rows, first.shape[2])
        sizes.append(sum(array.nbytes for array in _arrays(holder[0])))
    return sizes, rows


def _scores_a_token(filling: _Filling, rows: int) -> int:
    """Returns the values that attention holds for one token of a chunk and all its keys.

    Metal's fused kernel holds no scores. Where attention is not fused (CPU, quantised caches,
    other head widths) they are held once, and twice more where a mask that is an array or sinks
    are added to them. A mask with a head dimension is itself as large as scores.
    """
    seen = filling.seen
    fused = _metal() and filling.kv_bits is None and seen.head_width in FUSED_WIDTHS
    if fused:
        return seen.mask_heads * rows
    heads = seen.heads or max((k.shape[1] for k, _ in seen.updates.values()), default=0)
    return heads * rows * (3 if seen.mask_heads or seen.sinks or filling.kv_bits else 1)


def _extrapolated(model: nn.Module, filling: _Filling) -> list[int]:
    """Returns bytes for caches of a family's own kind, in a straight line through two lengths."""
    from mlx_lm.models.cache import make_prompt_cache

    near, far = 128, 256
    sizes = []
    for length in (near, far):
        cache = make_prompt_cache(model)
        model(mx.zeros((1, length), mx.int32), cache=cache)
        sizes.append(
            [sum(_widened(a, filling.widen) for a in _arrays(leaf)) for leaf in _leaves(cache)]
        )
    slope = (filling.context - near) / (far - near)
    return [max(0, round(a + (b - a) * slope)) for a, b in zip(*sizes, strict=True)]


# -- sizes -------------------------------------------------------------------------------------


def _arrays(leaf: Any) -> list[mx.array]:
    """Returns the arrays that a cache holds."""
    held = [array for _, array in tree_flatten(list(vars(leaf).values()))]
    return [array for array in held if isinstance(array, mx.array)]


def _plain(leaf: Any) -> list[Any]:
    return sorted((k, v) for k, v in vars(leaf).items() if isinstance(v, int | float | str))


def _layer_widths(model: nn.Module, sites: Sequence[SwitchSite]) -> list[int]:
    """Returns, by layer, the values a token that the linear maps of a layer put out in all."""
    ours = {id(projection) for site in sites for projection in site.projections.values()}
    widths: dict[str, int] = {}
    for path, module in model.named_modules():
        weight = module.get("weight") if id(module) not in ours else None
        if ".layers." in f".{path}" and isinstance(weight, mx.array) and weight.ndim >= 2:
            parts = path.split(".")
            layer = ".".join(parts[: parts.index("layers") + 2])
            widths[layer] = widths.get(layer, 0) + weight.size // weight.shape[-1]
    return list(widths.values())


def _expert_widths(site: SwitchSite) -> int:
    """Returns the values a token that the experts of one layer hold at once, at most."""
    linear: list[Any] = list(site.projections.values())
    inside = sum(p.output_dims for p in linear)
    return site.top_k * (inside + max(p.input_dims for p in linear) + linear[-1].output_dims)


def _size(dtype: Any, widen: bool) -> int:
    return max(dtype.size, 4) if widen else dtype.size


def _wide(array: mx.array, widen: bool) -> bool:
    return widen and array.dtype in (mx.bfloat16, mx.float16)


def _widened(array: mx.array, widen: bool) -> int:
    return array.nbytes * (2 if _wide(array, widen) else 1)


def _metal() -> bool:
    return mx.default_device() != mx.Device(mx.cpu) and mx.metal.is_available()
