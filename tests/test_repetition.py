"""seq-rep-n and distinct-n against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.errors import StudyError
from moelab.quality.repetition import distinct_n, seq_rep_n


def repeats(ids: list[int], n: int) -> tuple[int, int]:
    """N-grams that stood in the text before, and all: each compared with every earlier one."""
    starts = range(len(ids) - n + 1)
    seen = [any(ids[j : j + n] == ids[i : i + n] for j in range(i)) for i in starts]
    return sum(seen), len(seen)


@given(st.lists(st.integers(0, 3), max_size=24), st.integers(1, 6))
def test_against_comparing_all_pairs(ids: list[int], n: int) -> None:
    again, total = repeats(ids, n)
    if total <= 0:
        assert math.isnan(seq_rep_n(ids, n)) and math.isnan(distinct_n(ids, n))
        return
    assert seq_rep_n(ids, n) == pytest.approx(again / total, abs=1e-12)
    assert distinct_n(ids, n) == pytest.approx((total - again) / len(ids), abs=1e-12)


def test_known_texts() -> None:
    loop = [7, 8] * 50
    assert seq_rep_n(loop, 4) == 1 - 2 / 97
    assert distinct_n(loop, 4) == 2 / 100
    fresh = list(range(100))
    assert seq_rep_n(fresh, 4) == 0 and distinct_n(fresh, 4) == 97 / 100
    assert seq_rep_n([5], 1) == 0 and distinct_n([5], 1) == 1
    assert seq_rep_n([1, 2, 1], 1) == pytest.approx(1 / 3)
    assert seq_rep_n([1, 2, 3], 3) == 0 and math.isnan(seq_rep_n([1, 2, 3], 4))
    assert math.isnan(seq_rep_n([], 1)) and math.isnan(distinct_n([], 1))


def test_arrays_are_texts_too() -> None:
    ids = [1, 2, 1, 2, 3]
    assert seq_rep_n(np.array(ids, np.int32), 2) == seq_rep_n(ids, 2) == 0.25


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_n_that_is_none(n: object) -> None:
    with pytest.raises(StudyError, match="length of an n-gram"):
        seq_rep_n([1, 2, 3], n)  # type: ignore[arg-type]
