"""What the metrics would be if every token chose k of E experts uniformly and by itself.

A figure of routing says little without it: with 8 of 64 experts, two tokens share an expert two
times in three by chance alone. Formulas are exact unless a function says that it approximates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ...errors import StudyError

if TYPE_CHECKING:
    import pandas as pd

KNOWN = ((8, 2), (64, 8), (128, 8), (256, 8), (512, 10))
"""Experts and top-k of models that people run."""


def checked(experts: int, *chosen: int) -> None:
    """Refuses what is no router: fewer experts than are chosen, or none.

    Raises:
        StudyError: Naming both numbers.
    """
    for k in chosen:
        if not 1 <= k <= experts:
            raise StudyError(f"A token cannot choose {k} of {experts} experts.")


def any_shared(experts: int, top_k: int, other: int | None = None) -> float:
    """Chance that two tokens share at least one expert: 1 − C(E−k, k) / C(E, k).

    Args:
        experts: Experts of the layer, E.
        top_k: Experts that one token chooses, k.
        other: Experts that the other token chooses; k by default.
    """
    other = top_k if other is None else other
    checked(experts, top_k, other)
    return 1 - math.comb(experts - top_k, other) / math.comb(experts, other)


def overlap(experts: int, top_k: float) -> float:
    """Expected share of a token's experts that another token chooses too: k / E."""
    return top_k / experts


def distinct(experts: int, top_k: float, tokens: float) -> float:
    """Expected distinct experts in n tokens: E (1 − (1 − k/E)ⁿ)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def balance(experts: int, top_k: float, tokens: int) -> tuple[float, float, float]:
    """Expected CV, Gini coefficient and normalised entropy of the counts of so many tokens.

    A count is binomial, so its variance is n p (1 − p) with p = k/E, and since the counts' mean
    is fixed, that is the expected population variance: the CV's root mean square is
    √((1 − p) / (n p)), exactly. Gini and entropy follow from it for many tokens, where counts are
    nearly normal: G = CV √((E − 1) / E) / √π and H / log₂E = 1 − CV² / (2 ln E).
    """
    p = top_k / experts
    cv = math.sqrt((1 - p) / (tokens * p))
    gini = cv * math.sqrt((experts - 1) / experts / math.pi)
    return cv, gini, 1 - cv * cv / (2 * math.log(experts)) if experts > 1 else math.nan


def best_f1(experts: int, top_k: float, window: int) -> float:
    """SRP of uniform routing, for many windows: counts in a window are binomial(m, k/E)."""
    p = top_k / experts
    counts = np.arange(window + 1)
    logs = np.array([math.lgamma(window + 1) - math.lgamma(c + 1) - math.lgamma(window - c + 1)
                     for c in counts])  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.where(counts > 0, counts * np.log(p), 0.0)
        powers = powers + np.where(window > counts, (window - counts) * np.log1p(-p), 0.0)
    share = np.exp(logs + powers)
    true = np.cumsum((counts * share)[::-1])[::-1]
    predicted = window * np.cumsum(share[::-1])[::-1]
    return float((2 * true / (predicted + window * p)).max())


def at_least(chances: Iterable[float], least: int) -> float:
    """Chance that at least so many of several independent events happen."""
    known = np.ones(1)
    for chance in chances:
        known = np.append(known, 0.0) * (1 - chance) + np.append(0.0, known) * chance
    return float(known[max(least, 0) :].sum())


def chance_table(routers: Iterable[tuple[int, int]] = KNOWN) -> pd.DataFrame:
    """What chance alone gives for some routers, to hold figures against.

    Args:
        routers: Pairs of experts and top-k.

    Returns:
        A row a router: `experts`, `top_k` (int64); `same_first` (the same first choice, 1/E),
        `any_shared` (two tokens share an expert), `overlap` (share of a token's experts that
        another token chooses, k/E), `together` (an expert's partner is a given one,
        (k−1)/(E−1)), `distinct_16` and `distinct_128` (distinct experts in so many tokens).

    Raises:
        StudyError: If a token cannot choose that many.
    """
    import pandas as pd

    rows = []
    for experts, top_k in routers:
        checked(experts, top_k)
        rows.append(
            {
                "experts": experts,
                "top_k": top_k,
                "same_first": 1 / experts,
                "any_shared": any_shared(experts, top_k),
                "overlap": overlap(experts, top_k),
                "together": (top_k - 1) / (experts - 1) if experts > 1 else 0.0,
                "distinct_16": distinct(experts, top_k, 16),
                "distinct_128": distinct(experts, top_k, 128),
            }
        )
    return pd.DataFrame(rows)
