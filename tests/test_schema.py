"""Frames edited by hand are refused with an error that names the column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.errors import SchemaError, StudyError
from moelab.study.schema import checked

NEEDED = {
    "capacity": "count", "shift": "int", "kl": "float", "ppl": "positive", "top": "share",
    "prompt": "str", "ran": "bool", "note": "str?", "se": "float?",
}  # fmt: skip


def good() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "capacity": [8, 16], "shift": [-1, 2], "kl": [0.5, -0.1], "ppl": [3.0, 4.0],
            "top": [0.0, 1.0], "prompt": ["a", "b"], "ran": [True, False], "note": ["x", None],
            "se": [np.nan, 1.0], "other": [[], {}],
        }
    )  # fmt: skip


def test_a_good_frame_passes() -> None:
    frame = checked(good(), NEEDED, "The frame", unique=["capacity", "prompt"])
    pd.testing.assert_frame_equal(frame, good())


def test_whole_floats_are_whole_again() -> None:
    frame = good().astype({"capacity": float})
    assert checked(frame, NEEDED, "The frame")["capacity"].dtype == np.int64
    assert frame["capacity"].dtype == np.float64, "the caller's frame is as it was"
    # Above 2⁵³ a float is off by one.
    big = pd.DataFrame({"n": [2**60 + 1]})
    assert checked(big, {"n": "count"}, "It")["n"].tolist() == [2**60 + 1]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("capacity", -1), ("capacity", 1.5), ("capacity", "8"), ("capacity", None),
        ("capacity", True), ("shift", 0.5), ("kl", np.inf), ("kl", np.nan), ("kl", "x"),
        ("ppl", 0.0), ("ppl", -1.0), ("top", 1.01), ("top", -0.01), ("prompt", ""),
        ("prompt", 3), ("prompt", None), ("ran", 1), ("ran", None), ("note", 3), ("se", np.inf),
        ("kl", [1.0]), ("kl", 1j),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(column: str, value: Any) -> None:
    frame = good().astype({column: object})
    frame.at[1, column] = value
    with pytest.raises(SchemaError, match=rf"The frame: column '{column}' .* row 1"):
        checked(frame, NEEDED, "The frame")


@given(st.sampled_from(sorted(NEEDED)))
def test_a_missing_column_is_named(column: str) -> None:
    with pytest.raises(SchemaError, match=f"no column '{column}'"):
        checked(good().drop(columns=column), NEEDED, "The frame")


def test_columns_and_rows_that_are_there_twice() -> None:
    frame = pd.concat([good(), good()[["kl"]]], axis=1)
    with pytest.raises(SchemaError, match="'kl' 2 times"):
        checked(frame, NEEDED, "The frame")
    frame = pd.concat([good(), good()], ignore_index=True)
    with pytest.raises(SchemaError, match=r"there twice by 'capacity', 'prompt'.*row 2.*'a'"):
        checked(frame, NEEDED, "The frame", unique=["capacity", "prompt"])
    with pytest.raises(SchemaError, match="no column 'seed'"):
        checked(good(), NEEDED, "The frame", unique=["seed"])


def test_what_is_no_frame() -> None:
    with pytest.raises(StudyError, match="DataFrame, got dict"):
        checked({}, NEEDED, "The frame")
    with pytest.raises(ValueError, match="kind must be one of"):
        checked(good(), {"kl": "number"}, "The frame")
