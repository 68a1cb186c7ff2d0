"""How routing hangs together from token to token, and between experts of one token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import StudyError
from . import chance
from .choices import Choices, choices
from .frames import Array, Experts, tidy

if TYPE_CHECKING:
    import pandas as pd

ROWS = 1 << 14
"""Tokens that are taken together where a token is a row of all experts."""

REPEATS = (
    "domain", "phase", "layer", "pairs", "same_first", "same_first_chance", "any_shared",
    "any_shared_chance", "overlap", "overlap_chance",
)  # fmt: skip


def repeats(routing: Any, *, phase: str | None = None, experts: Experts = None) -> pd.DataFrame:
    """Says how often a token chooses what the token before it chose (Mixtral, 2401.04088, §5).

    Only tokens that follow each other in one sequence of one run and phase are compared.

    Args:
        routing: A recording, its `routing`, or what `labelled` gives.
        phase: Only this phase; None for all, each apart.
        experts: Experts of the layers; None for what the recording says, else the highest id + 1.

    Returns:
        A row a domain, phase and layer: `pairs` (int64) of tokens; `same_first`: the same expert
        of highest weight; `any_shared`: at least one expert in common; `overlap`:
        |E_t ∩ E_(t−1)| / |E_t|; each with what uniform routing gives (`…_chance`). NaN without any
        pair.

    Raises:
        SchemaError: If the frame is not as moelab writes it.
    """
    rows = []
    for layer in choices(routing, phase=phase, experts=experts):
        now = np.flatnonzero(layer.follows)
        shared = common(layer.ids[now], layer.ids[now - 1])
        sizes = layer.sizes
        k, before = sizes[now], sizes[now - 1]
        rows.append(
            {
                **layer.key,
                "pairs": len(now),
                "same_first": _mean(layer.ids[now, 0] == layer.ids[now - 1, 0]),
                "same_first_chance": 1 / layer.experts,
                "any_shared": _mean(shared > 0),
                "any_shared_chance": _any_shared(layer.experts, before, k),
                "overlap": _mean(shared / k),
                "overlap_chance": _mean(before) / layer.experts,
            }
        )
    return tidy(rows, REPEATS)


def saturation(
    first: Any, second: Any, *, phase: str | None = None, experts: Experts = None
) -> pd.DataFrame:
    """Compares two routings of the same tokens (OLMoE, 2409.02060, §5.1): |E_t ∩ E'_t| / k.

    Such as a checkpoint against the final model, or a constrained run against the full model.
    Tokens are matched by run, sequence, position and layer.

    Args:
        first: A recording, its `routing`, or what `labelled` gives; k is that of its tokens.
        second: Another.
        phase: Only this phase; None for all, each apart.
        experts: As for `repeats`.

    Returns:
        A row a domain, phase and layer: `tokens` (int64) that both have, `left_out` (int64) that
        only the first has, `overlap`, `chance` (of two uniform routings, k/E), `same_first` and
        `same_set` (float64, the share of tokens with the same first choice, and the same experts).

    Raises:
        SchemaError: If a frame is not as moelab writes it.
        StudyError: If they have no token in common, or different tokens in the same place.
    """
    others = {
        (c.domain, c.phase, c.layer): c
        for c in choices(second, phase=phase, experts=experts, extra=("token_id",))
    }
    rows = []
    for own in choices(first, phase=phase, experts=experts, extra=("token_id",)):
        other = others.get((own.domain, own.phase, own.layer))
        if other is None:
            continue
        here, there = _matched(own, other)
        if not len(here):
            continue
        ids, their = own.ids[here], other.ids[there]
        shared, sizes = common(ids, their), own.sizes[here]
        rows.append(
            {
                **own.key,
                "tokens": len(here),
                "left_out": len(own.ids) - len(here),
                "overlap": _mean(shared / sizes),
                "chance": _mean(other.sizes[there]) / own.experts,
                "same_first": _mean(ids[:, 0] == their[:, 0]),
                "same_set": _mean((shared == sizes) & (sizes == other.sizes[there])),
            }
        )
    if not rows and others:
        raise StudyError(
            "The two routings have no token in common (by domain, phase, run, sequence, position "
            "and layer)."
        )
    columns = ("tokens", "left_out", "overlap", "chance", "same_first", "same_set")
    return tidy(rows, ("domain", "phase", "layer", *columns))


def working_set(
    routing: Any,
    n: Iterable[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    *,
    phase: str | None = None,
    experts: Experts = None,
) -> pd.DataFrame:
    """Counts the distinct experts that n consecutive tokens choose: W(n).

    The mean over every window of n tokens within one sequence of one run and phase.

    Args:
        routing: As for `repeats`.
        n: Lengths of windows, in tokens.
        phase: As for `repeats`.
        experts: As for `repeats`.

    Returns:
        A row a domain, phase, layer and n: `n`, `windows` (int64), `distinct` (float64), `chance`
        (uniform routing: E (1 − (1 − k/E)ⁿ)). Lengths that no stretch of tokens has are left out.

    Raises:
        SchemaError: As for `repeats`.
        StudyError: If a length is no int from 1 on.
    """
    lengths = checked_lengths("n", n)
    rows = []
    for layer in choices(routing, phase=phase, experts=experts):
        stretch = np.diff(layer.starts)
        gaps = _gaps(layer)
        for length in lengths:
            windows = int(np.maximum(stretch - length + 1, 0).sum())
            if not windows:
                continue
            # A window lacks an expert if it lies between two of its tokens: g − n + 1 places.
            lacking = int(np.maximum(gaps - length + 1, 0).sum())
            rows.append(
                {
                    **layer.key,
                    "n": length,
                    "windows": windows,
                    "distinct": layer.experts - lacking / windows,
                    "chance": chance.distinct(layer.experts, layer.top_k, length),
                }
            )
    return tidy(rows, ("domain", "phase", "layer", "n", "windows", "distinct", "chance"))


def coactivation(
    routing: Any, *, phase: str | None = None, experts: Experts = None
) -> pd.DataFrame:
    """Says how often a token that chooses one expert also chooses another (OLMoE, eq. 6).

    Over all pairs among a token's experts, not only neighbours in rank: N_ij / N_i, which is not
    symmetric.

    Args:
        routing: As for `repeats`.
        phase: As for `repeats`.
        experts: As for `repeats`.

    Returns:
        A row a domain, phase, layer and ordered pair of experts of which the first was chosen:
        `expert`, `other`, `count` (N_i, int64), `together` (N_ij), `share` (float64), `rate` (the
        share of all tokens that choose `other`), `chance` (uniform routing: (k−1)/(E−1)).

    Raises:
        SchemaError: As for `repeats`.
    """
    import pandas as pd

    columns = ("domain", "phase", "layer", "expert", "other", "count", "together", "share", "rate",
               "chance")  # fmt: skip
    parts = []
    for layer in choices(routing, phase=phase, experts=experts):
        pairs = np.zeros((layer.experts, layer.experts), np.int64)
        for table in one_hot(layer):
            pairs += np.rint(table.T @ table).astype(np.int64)
        count = pairs.diagonal().copy()
        expert, other = np.nonzero((count > 0)[:, None] & ~np.eye(layer.experts, dtype=np.bool_))
        parts.append(
            pd.DataFrame(
                {
                    **layer.key,
                    "expert": expert,
                    "other": other,
                    "count": count[expert],
                    "together": pairs[expert, other],
                    "share": pairs[expert, other] / count[expert],
                    "rate": count[other] / len(layer.ids),
                    "chance": (layer.top_k - 1) / max(layer.experts - 1, 1),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)[list(columns)] if parts else tidy([], columns)


def checked_lengths(argument: str, given: Iterable[int]) -> list[int]:
    """Returns lengths in tokens, ascending.

    Raises:
        StudyError: If one is no int from 1 on, or there is none.
    """
    found = list(given) if isinstance(given, Iterable) else [given]
    if not found or not all(
        isinstance(x, int | np.integer) and not isinstance(x, bool) and x > 0 for x in found
    ):
        raise StudyError(f"{argument}= are lengths in tokens, from 1 on; got {given!r}.")
    return sorted({int(x) for x in found})


def common(ids: Array, others: Array) -> Array:
    """Returns int64 (tokens,): experts that two rows have in common."""
    shared = np.zeros(len(ids), np.int64)
    for column in others.T:  # k comparisons of a table, instead of one of k times its size
        shared += ((ids == column[:, None]) & (column[:, None] >= 0)).sum(1)
    return shared


def one_hot(layer: Choices) -> Iterator[Array]:
    """Yields float32 (some tokens, experts): 1 where a token chose the expert."""
    for start in range(0, len(layer.ids), ROWS):
        ids = layer.ids[start : start + ROWS]
        table = np.zeros((len(ids), layer.experts), np.float32)
        row, rank = np.nonzero(ids >= 0)
        table[row, ids[row, rank]] = 1
        yield table


def _gaps(layer: Choices) -> Array:
    """Lengths of all stretches of consecutive tokens of one sequence that lack an expert.

    An expert that a sequence never chooses has one gap, as long as the sequence.
    """
    starts = layer.starts
    row, expert = layer.slots()
    stretch = np.searchsorted(starts, row, side="right") - 1
    own = stretch * layer.experts + expert  # one number a sequence and expert
    order = np.argsort(own, kind="stable")
    own, row = own[order], row[order]
    first = np.diff(own, prepend=-1) != 0
    last = np.append(first[1:], np.ones(len(own[:1]), np.bool_))
    inside = row[1:][~first[1:]] - row[:-1][~first[1:]] - 1
    begin, end = starts[own // layer.experts], starts[own // layer.experts + 1]
    never = len(starts[:-1]) * layer.experts - int(first.sum())
    if never:
        seen = np.bincount(own[first] // layer.experts, minlength=len(starts) - 1)
        whole = np.repeat(np.diff(starts), layer.experts - seen)
    else:
        whole = np.zeros(0, np.int64)
    return np.concatenate([inside, (row - begin)[first], (end - 1 - row)[last], whole])


def _matched(own: Choices, other: Choices) -> tuple[Array, Array]:
    """Returns the rows of the tokens that both have, in each."""
    keys = [np.stack([c.run, c.sequence, c.position], 1) for c in (own, other)]
    both = np.concatenate(keys)
    name = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    _, here, there = np.intersect1d(
        name[: len(keys[0])], name[len(keys[0]) :], assume_unique=True, return_indices=True
    )
    assert own.token_id is not None and other.token_id is not None
    differs = own.token_id[here] != other.token_id[there]
    if differs.any():
        at = here[differs.argmax()]
        raise StudyError(
            f"Column 'token_id': at run {own.run[at]}, sequence {own.sequence[at]}, position "
            f"{own.position[at]} the two routings have different tokens, and only routings of the "
            "same text can be compared. Record both on one given text."
        )
    return here, there


def _any_shared(experts: int, before: Array, now: Array) -> float:
    """Mean chance over pairs of tokens that choose so many experts."""
    if not len(now):
        return float("nan")
    pairs, count = np.unique(np.stack([before, now], 1), axis=0, return_counts=True)
    chances = [chance.any_shared(experts, int(a), int(b)) for a, b in pairs]
    return float(np.dot(chances, count) / count.sum())


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
