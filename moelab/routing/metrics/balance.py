"""How evenly a layer's experts are used, and what pins learned on one domain cover in another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SchemaError, StudyError
from . import chance
from .choices import choices
from .frames import Array, Experts, column, experts_by_layer, known_experts, names, tidy

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Counts of one layer in one domain and, where the frame has them, one phase."""

    key: dict[str, Any]
    counts: Array
    """float64 (experts,)."""
    tokens: float
    """NaN where the frame does not say."""


def counts(
    routing: Any, domain: str | None = None, *, phase: str | None = None, experts: Experts = None
) -> pd.DataFrame:
    """Counts how often each expert was chosen.

    Args:
        routing: A recording, its `routing`, or what `labelled` gives.
        domain: What the texts are of, where the frame has no column `domain`.
        phase: Only this phase; None for all, each apart.
        experts: Experts of the layers; None for what the recording says, else the highest id + 1.

    Returns:
        `domain`, `phase` (text), `layer`, `expert`, `count` (int64; experts that were never
        chosen are there, with 0), `tokens` (int64, the tokens that chose in this layer).

    Raises:
        SchemaError: If the frame is not as moelab writes it.
    """
    import pandas as pd

    parts = []
    for layer in choices(routing, phase=phase, experts=experts):
        key = layer.key if domain is None else {**layer.key, "domain": domain}
        found = np.bincount(layer.slots()[1], minlength=layer.experts)
        parts.append(
            pd.DataFrame({**key, "expert": np.arange(layer.experts), "count": found}).assign(
                tokens=len(layer.ids)
            )
        )
    columns = ["domain", "phase", "layer", "expert", "count", "tokens"]
    if not parts:
        return tidy([], columns)
    result = pd.concat(parts, ignore_index=True)[columns]
    if domain is not None and result.duplicated(columns[:4]).any():
        raise StudyError(
            "The frame has a column 'domain' with several domains, so domain= would pool them."
        )
    return result


def balance(counts: pd.DataFrame, experts: Experts = None) -> pd.DataFrame:
    """Says how evenly experts are used: p_e = n_e / Σn.

    - `cv`: standard deviation ÷ mean of the counts, over all experts (population form);
    - `gini`: Σ (2i − E − 1) n_(i) / (E Σn), counts ascending: 0 for equal use, (E − 1) / E for one
      expert alone;
    - `entropy`: H(p) / log₂E: 1 for equal use, 0 for one expert alone.

    Args:
        counts: `domain`, `layer`, `expert`, `count`, and `phase` and `tokens` where it has them;
            see `moelab.metrics.counts`. An expert that is not there was never chosen.
        experts: Experts of a layer, or by layer; None for the highest id of the frame + 1.

    Returns:
        A row a domain (and phase, where the counts have it) and layer: `domain`, (`phase`,)
        `layer`, `cv`, `gini`, `entropy` (float64); and where the counts have `tokens`, what
        uniform routing gives for so many tokens: `cv_chance`, `gini_chance`, `entropy_chance`.

    Raises:
        SchemaError: If the frame lacks a column, holds what are no counts, or has an expert twice,
            such as once for each of several phases without saying which.
    """
    rows = []
    for layer in _layers(counts, experts):
        n, total, number = np.sort(layer.counts), layer.counts.sum(), len(layer.counts)
        p = n[n > 0] / total
        row = {
            **layer.key,
            "cv": n.std() / n.mean(),
            "gini": ((2 * np.arange(1, number + 1) - number - 1) * n).sum() / (number * total),
            # A single expert is used as evenly as can be; 0 × −1 would be −0.
            "entropy": abs((p * np.log2(p)).sum()) / math.log2(number) if number > 1 else 1.0,
        }
        if not math.isnan(layer.tokens):
            expected = chance.balance(number, total / layer.tokens, int(layer.tokens))
            row.update(zip(("cv_chance", "gini_chance", "entropy_chance"), expected, strict=True))
        rows.append(row)
    return tidy(rows, tuple(rows[0]) if rows else ("domain", "layer", "cv", "gini", "entropy"))


def pin_coverage(counts: pd.DataFrame, top: int = 16, experts: Experts = None) -> pd.DataFrame:
    """Says which share of a domain's choices the most used experts of another domain cover.

    Args:
        counts: As for `balance`.
        top: Experts a layer that are pinned. Of equally used ones the lower id is taken.
        experts: As for `balance`.

    Returns:
        A row a pair of domains and a layer: `train`, `test` (text), (`phase`,) `layer`, `covered`
        (float64: choices of `test` that fall on the pins learned from `train` ÷ all of its
        choices), `chance` (float64: the same for a random set of as many pins, `top` / E).

    Raises:
        SchemaError: As for `balance`.
        StudyError: If `top` is no number of experts of a layer.
    """
    layers = list(_layers(counts, experts))
    rows = []
    for train in layers:
        number = len(train.counts)
        if isinstance(top, bool) or not isinstance(top, int | np.integer) or not 1 <= top <= number:
            raise StudyError(
                f"top= must be between 1 and {number}, the experts of layer {train.key['layer']}; "
                f"got {top!r}."
            )
        pins = np.argsort(-train.counts, kind="stable")[:top]
        own = {name: value for name, value in train.key.items() if name != "domain"}
        for test in layers:
            if own == {name: value for name, value in test.key.items() if name != "domain"}:
                rows.append(
                    {
                        "train": train.key["domain"],
                        "test": test.key["domain"],
                        **own,
                        "covered": test.counts[pins].sum() / test.counts.sum(),
                        "chance": top / number,
                    }
                )
    return tidy(rows, tuple(rows[0]) if rows else ("train", "test", "layer", "covered", "chance"))


def _layers(counts: pd.DataFrame, experts: Experts) -> Iterator[_Layer]:
    """Yields each layer's counts, checked."""
    import pandas as pd

    if not isinstance(counts, pd.DataFrame):
        raise StudyError(
            f"counts must be a frame such as moelab.metrics.counts makes, got "
            f"{type(counts).__name__}."
        )
    table = "counts"
    domain, domains = names(counts, "domain", table)
    phase, phases = (
        names(counts, "phase", table)
        if "phase" in counts.columns
        else (np.zeros(len(counts), np.int64), [""])
    )
    layer, expert = (column(counts, n, "id", table) for n in ("layer", "expert"))
    count = column(counts, "count", "number", table)
    if (count < 0).any():
        raise SchemaError(
            f"Column 'count' of the counts frame is {count.min()}; counts begin at 0."
        )
    tokens = column(counts, "tokens", "number", table) if "tokens" in counts.columns else None
    highest = {int(n): int(expert[layer == n].max()) for n in np.unique(layer)}
    sizes = experts_by_layer(highest, experts, known_experts(counts))
    group = (domain * len(phases) + phase) * (max(highest, default=0) + 1) + layer
    order = np.lexsort((expert, group))
    edges = np.append(np.flatnonzero(np.diff(group[order], prepend=-1)), len(order))
    for rows in (order[a:b] for a, b in itertools.pairwise(edges)):
        number = int(layer[rows[0]])
        key: dict[str, Any] = {"domain": domains[domain[rows[0]]]}
        if "phase" in counts.columns:
            key["phase"] = phases[phase[rows[0]]]
        key["layer"] = number
        _check_group(key, expert[rows], count[rows], None if tokens is None else tokens[rows])
        values = np.zeros(sizes[number])
        values[expert[rows]] = count[rows]
        yield _Layer(key, values, math.nan if tokens is None else float(tokens[rows[0]]))


def _check_group(key: Mapping[str, Any], expert: Array, count: Array, tokens: Array | None) -> None:
    where = ", ".join(f"{name} {value}" for name, value in key.items())
    twice = expert[1:][expert[1:] == expert[:-1]]
    if len(twice):
        raise SchemaError(
            f"Column 'expert' of the counts frame: expert {twice[0]} is there twice in {where}. "
            "Counts of several phases or recordings are not pooled: give a column 'phase', or add "
            "them up first."
        )
    if not count.sum() > 0:
        raise SchemaError(f"Column 'count' of the counts frame is 0 throughout in {where}.")
    if tokens is not None and (tokens[0] <= 0 or (tokens != tokens[0]).any()):
        raise SchemaError(
            f"Column 'tokens' of the counts frame must be one number above 0 in {where}."
        )
