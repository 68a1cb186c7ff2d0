"""Stock layers against the bank, bit for bit, one layer at a time; and stock against itself.

Each MoE layer's stock switch is given seeded activations and expert ids, and so is a bank of fewer
slots. What comes out must have the same bits: one token at a time as in decoding, and many as in
prefill. Bits can differ without anything being wrong: MLX chooses its kernels by the number of
tokens and of experts, and another kernel may add in another order. So stock is also compared with
itself on the same rows, computed in other company. A bank whose difference from stock is of that
size is "close"; one that had a wrong expert would be off by as much as the outputs are large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts.bank import Bank, LayerBank
from ..experts.policies import LRU
from ..experts.residency import Load
from ..experts.switch import PartialSwitch
from .model import OpenLayer, OpenModel

DECODE_STEPS = 16
"""Single tokens before the prefill-sized inputs, and again after them."""
LONGEST = 1024
NOISE_FACTOR = 2.0
"""The bank may differ from stock by so much more than stock from itself."""
ROUNDING_UNITS = {"float32": 32, "bfloat16": 4, "float16": 4}
"""Or by so many rounding steps of the activations' type, relative to the largest output."""

Kind = Literal["decode", "prefill"]
Verdict = Literal["exact", "exact in decode and close in prefill", "NOT exact", "not checked"]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two outputs are apart."""

    equal: bool
    """Every bit is the same."""
    max_abs: float | None
    """The largest difference; None if it is not a number."""
    max_rel: float | None
    """The same, as a share of the largest output."""


@dataclass(frozen=True, slots=True)
class BankCheck:
    """One layer's bank against the stock layer, on one input."""

    layer: int
    capacity: int
    kind: Kind
    tokens: int
    """Tokens in one call; decode makes many calls of one."""
    difference: Difference
    loads: int
    """Experts that were read while this was computed."""
    evictions: int
    """Of them, those that took the slot of another."""
    swept: bool
    """The input needed more experts than there were slots."""


@dataclass(frozen=True, slots=True)
class NoiseCheck:
    """One stock layer against itself, on the same rows computed in other company."""

    layer: int
    variant: str
    difference: Difference


@dataclass(frozen=True, slots=True)
class Exactness:
    """What was found."""

    capacities: list[int]
    """Slots a layer that were tried; fewer in layers with fewer experts."""
    dtype: str
    """Type of the activations."""
    checks: list[BankCheck]
    noise: list[NoiseCheck]
    skipped: list[int]
    """Layers in which every token needs every expert, so that there is no smaller bank."""

    def noise_of(self, layer: int) -> float | None:
        """Returns stock's largest relative difference from itself; None if not a number."""
        values = [n.difference.max_rel for n in self.noise if n.layer == layer]
        return None if None in values else max((v for v in values if v is not None), default=0.0)

    @property
    def rounding(self) -> float:
        """The relative difference that counts as rounding even where stock shows none."""
        return ROUNDING_UNITS[self.dtype] * float(mx.finfo(getattr(mx, self.dtype)).eps)

    def close(self, check: BankCheck) -> bool:
        """Whether the bank's difference is what stock's own arithmetic does."""
        if check.difference.equal:
            return True
        noise, found = self.noise_of(check.layer), check.difference.max_rel
        if noise is None or found is None:
            return False
        return found <= max(NOISE_FACTOR * noise, self.rounding)

    @property
    def verdict(self) -> Verdict:
        """What the layers say together."""
        if not self.checks or not any(c.evictions for c in self.checks):
            return "not checked"
        if all(c.difference.equal for c in self.checks):
            return "exact"
        decode = all(c.difference.equal for c in self.checks if c.kind == "decode")
        if decode and all(self.close(c) for c in self.checks):
            return "exact in decode and close in prefill"
        return "NOT exact"


def check_exactness(
    model: OpenModel, capacities: Sequence[int | None], progress: Callable[[], None]
) -> Exactness:
    """Compares every layer's bank with the stock layer.

    Args:
        model: The model. Its layers are lent and cannot be used afterwards.
        capacities: For each layer in turn, the slots that the user will run with, or None. A
            quarter of the experts is always tried.
        progress: Called after each layer.

    Raises:
        CheckpointError: If an expert cannot be read.
    """
    checks: list[BankCheck] = []
    noise: list[NoiseCheck] = []
    skipped: list[int] = []
    tried: set[int] = set()
    for layer, asked in zip(model.layers, capacities, strict=True):
        sizes = _sizes(layer, asked)
        if sizes:
            tried.update(sizes)
            with layer.resident() as stock:
                noise += _noise(layer, stock)
                for size in sizes:
                    checks += _compare(layer, stock, size)
        else:
            skipped.append(layer.site.layer)
        mx.clear_cache()
        progress()
    dtype = str(model.layers[0].given.dtype).removeprefix("mlx.core.")
    return Exactness(sorted(tried), dtype, checks, noise, skipped)


def _sizes(layer: OpenLayer, asked: int | None) -> list[int]:
    quarter = max(layer.site.top_k, layer.experts // 4)
    return sorted({c for c in (quarter, asked) if c is not None and c < layer.experts})


def lengths(layer: OpenLayer) -> list[int]:
    """Returns the prefill lengths to try: MLX's kernels change with tokens an expert."""
    share = layer.experts / layer.site.top_k
    longest = min(LONGEST, max(32, math.ceil(8 * share)))
    return sorted({2, 16, min(longest, math.ceil(2 * share)), longest} - {0, 1})


class _Counter:
    """Counts what a bank loads."""

    def __init__(self) -> None:
        self.loads = self.evictions = 0

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """See `Watcher.loaded`."""
        self.loads += len(loads)
        self.evictions += sum(load.evicted is not None for load in loads)


def given(layer: OpenLayer, tokens: int, seed: int) -> tuple[mx.array, np.ndarray]:
    """Returns seeded activations (1, tokens, width) and expert ids (1, tokens, top-k).

    A token's experts differ, and where there are enough tokens every expert is chosen.
    """
    rng = np.random.default_rng([layer.site.layer, tokens, seed])
    x = mx.array(rng.standard_normal((1, tokens, layer.given.width), np.float32))
    top_k = layer.site.top_k
    ids = rng.random((tokens, layer.experts)).argsort(axis=1)[:, :top_k]
    whole = math.ceil(layer.experts / top_k)
    if tokens >= whole:
        ids[:whole] = np.resize(rng.permutation(layer.experts), (whole, top_k))
    return x.astype(layer.given.dtype), ids[None].astype(np.uint32)


def _compare(layer: OpenLayer, stock: nn.Module, capacity: int) -> list[BankCheck]:
    bank, counter = Bank(), _Counter()
    bank.watchers.append(counter)
    found = []

    def check(kind: Kind, calls: list[tuple[mx.array, np.ndarray]]) -> BankCheck:
        before = counter.loads, counter.evictions
        # All of the bank's outputs are held, lazily, to the end: slots are overwritten meanwhile.
        got = [bank_switch(x, mx.array(ids)) for x, ids in calls]
        wanted = [stock(x, mx.array(ids)) for x, ids in calls]
        return BankCheck(
            layer=layer.site.layer,
            capacity=capacity,
            kind=kind,
            tokens=calls[0][0].shape[1],
            difference=compare(got, wanted),
            loads=counter.loads - before[0],
            evictions=counter.evictions - before[1],
            swept=any(len(np.unique(ids)) > capacity for _, ids in calls),
        )

    try:
        slots = LayerBank(bank, layer.site, capacity, LRU(), layer.origins)
        bank_switch: Any = PartialSwitch(slots, stock)
        singles = [given(layer, 1, seed) for seed in range(2 * DECODE_STEPS)]
        found.append(check("decode", singles[:DECODE_STEPS]))
        found += [check("prefill", [given(layer, n, 0)]) for n in lengths(layer)]
        found.append(check("decode", singles[DECODE_STEPS:]))
    finally:
        bank.close()
    return found


def _noise(layer: OpenLayer, stock: Any) -> list[NoiseCheck]:
    """Computes the longest input whole, and the same rows in other company."""
    *shorter, longest = lengths(layer)
    x, ids = given(layer, longest, 0)

    def rows(begin: int, end: int) -> mx.array:
        return stock(x[:, begin:end], mx.array(ids[:, begin:end]))

    def pieces(size: int, end: int) -> mx.array:
        return mx.concatenate([rows(i, min(i + size, end)) for i in range(0, end, size)], axis=1)

    whole = rows(0, longest)
    singles = min(32, longest)
    variants: dict[str, tuple[mx.array, mx.array]] = {
        "one token at a time": (pieces(1, singles), whole[:, :singles]),
        **{f"in chunks of {n}": (pieces(n, longest), whole) for n in shorter},
        "in reverse order": (
            stock(x[:, ::-1], mx.array(np.ascontiguousarray(ids[:, ::-1])))[:, ::-1],
            whole,
        ),
    }
    return [
        NoiseCheck(layer.site.layer, name, compare([got], [wanted]))
        for name, (got, wanted) in variants.items()
    ]


def compare(got: Sequence[mx.array], wanted: Sequence[mx.array]) -> Difference:
    """Compares outputs bit for bit, and by size where they are not the same."""
    mx.eval(*got, *wanted)
    pairs = list(zip(got, wanted, strict=True))
    if all(a.dtype == b.dtype and mx.array_equal(_bits(a), _bits(b)).item() for a, b in pairs):
        return Difference(True, 0.0, 0.0)
    apart = [_largest(a.astype(mx.float32) - b.astype(mx.float32)) for a, b in pairs]
    large = [_largest(b.astype(mx.float32)) for _, b in pairs]
    # Python's max() would pass over a NaN that is not the first.
    if not all(math.isfinite(v) for v in [*apart, *large]):
        return Difference(False, None, None)
    return Difference(False, max(apart), max(apart) / max(*large, 1e-30))


def _largest(array: mx.array) -> float:
    return cast(float, mx.abs(array).max().item())


def _bits(array: mx.array) -> mx.array:
    return array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size])
