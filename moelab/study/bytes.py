"""Bytes of a point, and comparisons at equal bytes.

A point's bytes are what it holds while a window is run: the bank's slots, copies at few bits, the
trunk, and the key-value cache at the window's end. Host buffers (for reading, some MB, the same
for every point) and what a forward pass needs for a moment are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SchemaError, StudyError

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab

CURVE = ("on_miss", "policy", "pins", "kv_bits", "seed")
"""What tells one curve over capacity from another."""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a sweep must know of one MoE layer."""

    layer: int
    """Number of the decoder layer."""
    experts: int
    top_k: int
    slot_bytes: int
    """Bytes of one expert in memory."""
    disk_bytes: int
    """Bytes that reading one expert takes."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a sweep must know of a model."""

    name: str
    model_type: str
    fingerprint: str
    layers: tuple[LayerFacts, ...]
    trunk: int
    """Bytes of everything but the routed experts."""

    def slots_bytes(self, slots: Sequence[int]) -> int:
        """Returns the bytes of the routed experts in memory, with so many slots by layer."""
        pairs = zip(self.layers, slots, strict=True)
        return sum(layer.slot_bytes * count for layer, count in pairs)


def facts_of(lab: Lab) -> ModelFacts:
    """Measures a lab; it must hold a part of the experts of each layer that a sweep makes partial.

    `disk_bytes` is as many as `slot_bytes` for a layer that holds all its experts.
    """
    banks = {layer.layer: layer for layer in lab.attachment.bank.layers}
    layers = []
    for site in lab.sites:
        bank = banks.get(site.layer)
        if bank is not None:
            in_memory = bank.nbytes // bank.capacity
            on_disk = bank.loader.expert_disk_bytes
        else:
            in_memory = sum(array.nbytes for _, _, array in site.tensors()) // site.experts
            on_disk = in_memory
        layers.append(LayerFacts(site.layer, site.experts, site.top_k, in_memory, on_disk))
    return ModelFacts(
        lab.name,
        str(lab.config["model_type"]),
        lab.fingerprint,
        tuple(layers),
        lab.memory().trunk,
    )


def cache_bytes(cache: Iterable[Any]) -> int:
    """Returns the bytes that a key-value cache has allocated, recurrent states with it."""
    from ..experts.traced import arrays, leaves

    return sum(array.nbytes for leaf in leaves(list(cache)) for array in arrays(leaf))


def at_equal_bytes(
    frame: pd.DataFrame,
    metric: str = "kl_mean",
    budgets: Sequence[int] | None = None,
    *,
    by: Sequence[str] = CURVE,
) -> pd.DataFrame:
    """Pairs what each action does with the same memory.

    Under each budget a curve is given by its largest point that fits in it: no quality is
    interpolated, so a curve may use less than the budget, and `bytes` says how much it used.

    Args:
        frame: Of a sweep: a row a point and prompt.
        metric: A column; its mean over tokens, prompts weighted by how many they judge. For
            `ppl` and `ppl_reference` it is exp of the mean negative log-probability.
        budgets: Bytes; by default every size that some point has and in which each curve has a
            point.
        by: Columns that tell curves apart.

    Returns:
        A row a budget and curve: `by`, `budget`, `capacity`, `bytes` (int64), the metric
        (float64), `prompts` and `tokens` (int64).

    Raises:
        SchemaError: If a column is missing.
        StudyError: If the frame is empty, points have different prompts, no budget is given in
            which every curve fits, or a curve has no point in one that is.
    """
    points = summed(frame, metric, by)
    curves = points.groupby(list(by), sort=False, observed=True, dropna=False)
    least = int(curves["bytes"].min().max())
    if budgets is None:
        budgets = sorted({int(size) for size in points["bytes"] if size >= least})
    rows = []
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int | np.integer):
            raise StudyError(f"A budget is a whole number of bytes, got {budget!r}.")
        for key, curve in curves:
            fitting = curve[curve["bytes"] <= budget]
            if fitting.empty:
                names = ", ".join(f"{n}={v!r}" for n, v in zip(by, key, strict=True))
                raise StudyError(
                    f"A budget of {budget:,} bytes holds no point of {names}, whose smallest has "
                    f"{int(curve['bytes'].min()):,}; every curve has one from {least:,} bytes on. "
                    "Raise the budget, or leave the curve out."
                )
            best = fitting.sort_values(["bytes", "capacity"], kind="stable").iloc[-1]
            rows.append({**dict(zip(by, key, strict=True)), "budget": int(budget), **{
                name: best[name] for name in ("capacity", "bytes", metric, "prompts", "tokens")
            }})  # fmt: skip
    import pandas as pd

    found = pd.DataFrame(rows)
    return found.astype({"budget": "int64", "capacity": "int64", "bytes": "int64"})


def summed(
    frame: pd.DataFrame, metric: str, by: Sequence[str] = CURVE, *, more: Sequence[str] = ()
) -> pd.DataFrame:
    """Means over prompts, each weighted by its judged tokens: a row a point.

    Args:
        frame: Of a sweep.
        metric: As in `at_equal_bytes`.
        by: Columns that tell curves apart.
        more: More columns to give the mean of.

    Returns:
        `by`, `capacity`, `bytes`, the metric, `more`, `prompts`, `tokens`.

    Raises:
        SchemaError: If a column is missing.
        StudyError: If the frame is empty, or points have different prompts.
    """
    import pandas as pd

    wanted = [*by, "capacity", "bytes", "prompt", "tokens", *more]
    source = {"ppl": "nll", "ppl_reference": "nll_reference"}.get(metric, metric)
    for name in dict.fromkeys([*wanted, source]):
        if name not in frame.columns:
            raise SchemaError(
                f"The frame has no column {name!r}, which a comparison at equal bytes needs. Take "
                "the frame of a moelab.sweep as it is."
            )
    if frame.empty:
        raise StudyError("The frame has no rows, so there is nothing to compare.")
    if not pd.api.types.is_numeric_dtype(frame[source]):
        raise SchemaError(f"The column {metric!r} holds no numbers, so it has no mean.")
    prompts = set(frame["prompt"])
    rows = []
    for key, group in frame.groupby(
        [*by, "capacity", "bytes"], sort=False, observed=True, dropna=False
    ):
        if len(group) != len(prompts) or set(group["prompt"]) != prompts:
            named = ", ".join(f"{n}={v!r}" for n, v in zip(by, key, strict=False))
            raise StudyError(
                f"The point {named}, capacity={key[-2]!r} has {len(group)} rows, and the frame "
                f"{len(prompts)} prompts: points can be compared on the same prompts only. Finish "
                "the sweep, or keep the prompts that all points have."
            )
        weight = group["tokens"].to_numpy(np.float64)
        means = {n: float(np.average(group[n].astype("float64"), weights=weight))
                 for n in dict.fromkeys([source, *more])}  # fmt: skip
        value = means[source]
        rows.append((
            *key, float(np.exp(value)) if source != metric else value,
            *(means[n] for n in more if n != metric), len(group), int(weight.sum()),
        ))  # fmt: skip
    others = [n for n in more if n != metric]
    columns = [*by, "capacity", "bytes", metric, *others, "prompts", "tokens"]
    return pd.DataFrame(rows, columns=columns)
