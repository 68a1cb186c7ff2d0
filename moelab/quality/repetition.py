"""How much a text repeats itself, from token ids alone.

Two measures of the same thing. *seq-rep-n* is the share of a text's n-grams that stood in it
before: 1 − distinct/total n-grams (Welleck et al. 2019, arXiv 1908.04319). *distinct-n* is the
number of distinct n-grams over the number of tokens (Li et al. 2016, arXiv 1510.03055), so that a
text without any repetition has (T − n + 1)/T and not 1. Both depend on length, since a longer text
has more to repeat: compare texts of about the same length, or say how long they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import StudyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

ORDERS = (1, 2, 3, 4)
"""Lengths n of the n-grams that a comparison reports."""


def seq_rep_n(ids: TokenIds, n: int) -> float:
    """Returns the share of a text's n-grams that are repetitions: 1 − distinct/total.

    Args:
        ids: The text's token ids, T of them.
        n: Length of an n-gram; at least 1.

    Returns:
        0 where no n-gram comes twice, towards 1 for a loop. NaN for a text of fewer than n tokens,
        which has no n-gram.

    Raises:
        StudyError: If n is no whole number from 1 up.
    """
    distinct, total = _ngrams(ids, n)
    return 1.0 - distinct / total if total else math.nan


def distinct_n(ids: TokenIds, n: int) -> float:
    """Returns the number of distinct n-grams over the number of tokens.

    Args:
        ids: The text's token ids, T of them.
        n: Length of an n-gram; at least 1.

    Returns:
        At most (T − n + 1)/T. NaN for a text of fewer than n tokens, which has no n-gram.

    Raises:
        StudyError: If n is no whole number from 1 up.
    """
    distinct, total = _ngrams(ids, n)
    return distinct / len(ids) if total else math.nan


def _ngrams(ids: TokenIds, n: int) -> tuple[int, int]:
    """Returns the number of distinct n-grams and of all."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise StudyError(f"n is the length of an n-gram, a whole number from 1 up, got {n!r}.")
    tokens = [int(token) for token in ids]
    total = max(len(tokens) - n + 1, 0)
    return len({tuple(tokens[i : i + n]) for i in range(total)}), total
