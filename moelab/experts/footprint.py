"""What running a model takes beside its weights: the cache of a context, and prefill.

Both are read off one traced forward pass of two tokens, in which nothing is evaluated and the
experts are not needed. mlx-lm's own cache objects note what the model hands them, and are then
filled in the steps in which a prompt is really read, again without evaluating anything, so that
steps of 256, windows that stop growing, quantised keys and constant recurrent states are what
mlx-lm makes of them and not what a formula says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CapacityError
from ..families import SwitchSite
from .traced import Seen, arrays, leaves, trace

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
    """Estimate of what a chunk needs at its peak, beside weights and cache. With tiny models of
    all families on a CPU, cache and estimate together came to .72 to 1.44 of stock's peak, but for
    hunyuan (2.6), deepseek_v41 (.31) and jamba (.14)."""

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
    seen = trace(model, sites)
    filling = _Filling(seen, context, kv_bits, chunk, widen)
    growing, constant, largest, rows = _cache_bytes(model, filling)
    size = _size(seen.dtype, widen)
    hidden = HIDDEN_COPIES * seen.width
    linear = max(_layer_widths(model, sites), default=0)
    experts = max(_expert_widths(site) for site in sites)
    # Of a layer's parts one is at work at a time. Without a kernel, mlx-lm steps through a
    # recurrence in Python, and every token's state is alive until the chunk is evaluated.
    recurrent = 0 if _metal() and _has_kernel(model) else seen.recurrent

    def peak(tokens: int, keys: int) -> int:
        mixing = linear * size + max(recurrent, _scores_a_token(filling, keys) * size)
        each = hidden * size + max(mixing, experts * size)
        return tokens * each + keys * _expanded(seen) * size

    prefill = largest + max(map(peak, filling.steps(), rows))
    return Footprint(context, chunk, kv_bits, growing, constant, prefill)


# -- the cache ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Filling:
    """What is asked of the cache, and what the traced pass showed."""

    seen: Seen
    context: int
    kv_bits: int | None
    chunk: int
    widen: bool

    def steps(self) -> list[int]:
        """Tokens of each forward pass: a prompt's last token and the answer's come singly."""
        chunks, rest = divmod(self.context - 1, self.chunk)
        return [*[self.chunk] * chunks, *([rest] if rest else []), 1]


def _cache_bytes(model: nn.Module, filling: _Filling) -> tuple[int, int, int, list[int]]:
    """Returns bytes that grow, that are constant, the largest leaf's, and keys at each step."""
    from mlx_lm.models.cache import make_prompt_cache

    seen = filling.seen
    constant = largest = 0
    known: dict[Any, tuple[list[int], list[int]]] = {}
    held, rows = [0] * len(filling.steps()), [0] * len(filling.steps())
    own: list[int] | None = None
    for index, fresh in enumerate(leaves(make_prompt_cache(model))):
        if index in seen.updates:
            keys, values = seen.updates[index]
            kind = (type(fresh), keys.shape, values.shape, keys.dtype, str(_plain(fresh)))
            if kind not in known:
                known[kind] = _fill(fresh, keys, values, filling)
            held = [a + b for a, b in zip(held, known[kind][0], strict=True)]
            largest = max(largest, *known[kind][0])
            rows = list(map(max, rows, known[kind][1]))
        elif type(fresh).__name__ == "ArraysCache":
            constant += sum(_widened(a, filling.widen) for a in arrays(seen.caches[index]))
        else:
            if own is None:
                own = _extrapolated(model, filling)
            held = [a + own[index] for a in held]
    # Windows may hold more while a prompt is read than afterwards, so the last is not the most.
    return max(held), constant, largest, rows


def _fill(
    leaf: Any, keys: mx.array, values: mx.array, filling: _Filling
) -> tuple[list[int], list[int]]:
    """Fills an empty cache as a prompt does.

    Returns:
        Its bytes after each forward pass, and the keys that attention saw in it.
    """
    from mlx_lm.generate import maybe_quantize_kv_cache

    holder, sizes, rows = [leaf], [], []
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
        rows.append(first.shape[2])
        sizes.append(sum(array.nbytes for array in arrays(holder[0])))
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


def _expanded(seen: Seen) -> int:
    """Returns the values that each cached token is expanded to before attention.

    A cache of latents (MLA) is turned into keys and values of every head, for the whole context.
    """
    cached = max(
        (a.shape[1] * a.shape[3] for pair in seen.updates.values() for a in pair), default=0
    )
    return 2 * seen.expanded if seen.expanded > cached else 0


def _extrapolated(model: nn.Module, filling: _Filling) -> list[int]:
    """Returns bytes for caches of a family's own kind, in a straight line through two lengths."""
    from mlx_lm.models.cache import make_prompt_cache

    near, far = 128, 256
    sizes = []
    for length in (near, far):
        cache = make_prompt_cache(model)
        model(mx.zeros((1, length), mx.int32), cache=cache)
        sizes.append(
            [sum(_widened(a, filling.widen) for a in arrays(leaf)) for leaf in leaves(cache)]
        )
    slope = (filling.context - near) / (far - near)
    return [max(0, round(a + (b - a) * slope)) for a, b in zip(*sizes, strict=True)]


# -- sizes -------------------------------------------------------------------------------------


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


def _has_kernel(model: nn.Module) -> bool:
    """Whether the family's recurrence is one that mlx-lm has a Metal kernel for."""
    homes = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(home), "gated_delta_update") for home in homes)


def _metal() -> bool:
    return mx.default_device() != mx.Device(mx.cpu) and mx.metal.is_available()
