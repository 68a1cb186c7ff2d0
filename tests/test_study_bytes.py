"""Bytes of a point are what a lab holds, and comparisons at equal bytes take whole points."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.errors import SchemaError, StudyError
from moelab.experts.misses import LowBit
from moelab.quality.judge import copied, quantised
from moelab.quality.window import windows_of
from moelab.study.bytes import CURVE, at_equal_bytes, cache_bytes, facts_of
from moelab.study.sweep import sweep
from tests.support import stock
from tests.support.sweeps import PROMPTS


def held(cache: list[Any]) -> int:
    """Bytes of a cache's arrays, by the names that mlx-lm gives them."""
    total = 0
    for part in cache:
        for name in ("keys", "values", "cache"):
            value = getattr(part, name, None)
            arrays = value if isinstance(value, list | tuple) else [value]
            total += sum(a.nbytes for a in arrays if isinstance(a, mx.array))
    return total


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_bytes_are_what_a_lab_of_its_own_holds(family: str) -> None:
    path = stock.folder(family)
    few = {"prompts": PROMPTS[:1], "prefix": 10, "tokens": 3, "progress": False}
    actions = ["load", "drop", "low_bit", LowBit(bits=3)]
    found = sweep(path, [6, 9, 16], on_miss=actions, **few).frame  # type: ignore[arg-type]
    assert (found["bytes"] == found.filter(like="bytes_").drop(columns="bytes_read").sum(axis=1)
            ).all()  # fmt: skip
    labels = ["load", "drop", "low_bit", "low_bit(bits=3)"]
    for capacity in (6, 9, 16):
        for action, label in zip(actions, labels, strict=True):
            with moelab.load(path, capacity, on_miss=action) as lab:  # type: ignore[arg-type]
                memory = lab.memory()
            row = found[(found["capacity"] == capacity) & (found["on_miss"] == label)].iloc[0]
            assert row["bytes_slots"] == memory.slots + memory.resident_experts
            assert row["bytes_low_bit"] == memory.low_bit
            assert row["bytes_trunk"] == memory.trunk
            assert row["bytes"] - row["bytes_cache"] == memory.total
            assert (memory.low_bit > 0) == (label.startswith("low_bit") and capacity < 16)
    assert found["bytes_cache"].nunique() == 1


def test_the_cache_is_counted_as_it_is_at_the_windows_end() -> None:
    text = [{"id": "a", "text": "def area(r):\n    return 3.14159 * r * r\n\nprint(area(2))\n"}]
    few: dict[str, Any] = {"prompts": text, "prefix": 8, "tokens": 4, "progress": False}
    found = sweep("lab", 16, on_miss=["load", "drop"], kv_bits=[None, 8, 4], **few).frame
    sizes = found.groupby("kv_bits", dropna=False)["bytes_cache"].unique()
    assert all(len(size) == 1 for size in sizes)
    with moelab.load("lab", 16) as lab:
        (window,) = windows_of(lab.tokenizer, text, prefix=8, tokens=4)
        for bits in (None, 8, 4):
            cache: Any = make_prompt_cache(lab.model)
            mx.eval(lab.model(mx.array([list(window.tokens[:8])]), cache=cache))
            mx.eval([part.state for part in cache])
            cache = quantised(copied(cache), bits)
            for token in window.fed:
                mx.eval(lab.model(mx.array([[token]]), cache=cache))
            (told,) = found.loc[
                found["kv_bits"].isna() if bits is None else found["kv_bits"] == bits,
                "bytes_cache",
            ].unique()
            flat = [a for part in cache for a in _arrays(part)]
            assert told == sum(a.nbytes for a in flat) == cache_bytes(cache)
            if bits is None:
                assert told == held(cache)
    few_bits, more_bits, own = sizes[4.0][0], sizes[8.0][0], sizes[np.nan][0]
    assert few_bits < more_bits < own


def _arrays(value: Any) -> list[mx.array]:
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, list | tuple):
        return [a for item in value for a in _arrays(item)]
    return [a for item in vars(value).values() for a in _arrays(item)] if _holds(value) else []


def _holds(value: Any) -> bool:
    return hasattr(value, "__dict__") and type(value).__module__.startswith("mlx_lm")


def test_facts_of_a_model() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 6) as lab:
        facts = facts_of(lab)
        memory = lab.memory()
        assert facts.slots_bytes([6] * len(lab.sites)) == memory.slots
        assert facts.trunk == memory.trunk
        lab.resize(16)
        assert facts_of(lab) == facts
        assert lab.memory().resident_experts == facts.slots_bytes([16] * len(lab.sites))


# -- at equal bytes --------------------------------------------------------------------------


def rows(points: list[tuple[str, int, int, list[float]]]) -> pd.DataFrame:
    """A frame of points: action, capacity, bytes, and the metric of each prompt."""
    return pd.DataFrame(
        {
            "on_miss": action, "policy": "lru", "pins": "none", "kv_bits": np.nan, "seed": 0,
            "capacity": capacity, "bytes": size, "prompt": f"p{number}", "domain": "all",
            "tokens": 10 + number, "kl_mean": value, "nll": value,
        }
        for action, capacity, size, values in points
        for number, value in enumerate(values)
    )  # fmt: skip


def test_the_largest_point_under_each_budget() -> None:
    frame = rows([
        ("drop", 8, 100, [3.0, 2.0]), ("drop", 16, 200, [1.0, 1.5]), ("drop", 32, 400, [0.1, 0.1]),
        ("low_bit", 8, 150, [0.9, 0.8]), ("low_bit", 16, 250, [0.4, 0.2]),
    ])  # fmt: skip
    found = at_equal_bytes(frame)
    told = [(r.budget, r.on_miss, r.capacity, r.bytes) for r in found.itertuples()]
    assert told == [
        (150, "drop", 8, 100), (150, "low_bit", 8, 150),
        (200, "drop", 16, 200), (200, "low_bit", 8, 150),
        (250, "drop", 16, 200), (250, "low_bit", 16, 250),
        (400, "drop", 32, 400), (400, "low_bit", 16, 250),
    ]  # fmt: skip
    assert found["kl_mean"].iloc[0] == pytest.approx((3 * 10 + 2 * 11) / 21)
    assert found["prompts"].tolist() == [2] * 8 and found["tokens"].tolist() == [21] * 8
    ppl = at_equal_bytes(frame, "ppl", [199])
    assert ppl["ppl"].tolist() == pytest.approx([np.exp(52 / 21), np.exp((9 + 8.8) / 21)])


points_of = st.lists(
    st.tuples(st.sampled_from(["drop", "low_bit", "load"]), st.integers(1, 64),
              st.integers(1, 30), st.floats(0, 5)),
    min_size=1, max_size=20, unique_by=(lambda p: (p[0], p[1])),
)  # fmt: skip


@given(points_of, st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
@settings(max_examples=40, deadline=None)
def test_at_equal_bytes_by_brute_force(
    points: list[tuple[str, int, int, float]], budgets: list[int]
) -> None:
    frame = rows([(a, c, size, [v, v / 2]) for a, c, size, v in points])
    least = max(min(p[2] for p in points if p[0] == a) for a in {p[0] for p in points})
    if min(budgets) < least:
        with pytest.raises(StudyError, match="holds no point"):
            at_equal_bytes(frame, "kl_mean", budgets)
        return
    found = at_equal_bytes(frame, "kl_mean", budgets)
    assert len(found) == len(budgets) * len({p[0] for p in points})
    for row in found.itertuples():
        fitting = [p for p in points if p[0] == row.on_miss and p[2] <= row.budget]
        best = max(fitting, key=lambda p: (p[2], p[1]))
        assert (row.bytes, row.capacity) == (best[2], best[1])
        assert row.kl_mean == pytest.approx((10 * best[3] + 11 * best[3] / 2) / 21)


def test_a_sweep_at_equal_bytes() -> None:
    made = sweep(stock.folder("olmoe"), [6, 9, 12], on_miss=["drop", "low_bit"],
                 prompts=PROMPTS[:2], prefix=10, tokens=3, progress=False)  # fmt: skip
    found = made.at_equal_bytes("kl_mean")
    low = found[found["on_miss"] == "low_bit"].set_index("budget")
    drop = found[found["on_miss"] == "drop"].set_index("budget")
    assert (low["capacity"] <= drop["capacity"]).all() and (low["bytes"] <= low.index).all()
    assert (low["capacity"] < drop["capacity"]).any(), "copies take the room of experts"
    with pytest.raises(StudyError, match="holds no point"):
        made.at_equal_bytes("kl_mean", [1000])


@pytest.mark.parametrize("column", [*CURVE, "capacity", "bytes", "prompt", "tokens", "kl_mean"])
def test_a_column_that_is_missing_is_named(column: str) -> None:
    frame = rows([("drop", 8, 100, [3.0, 2.0])]).drop(columns=column)
    with pytest.raises(SchemaError, match=repr(column)):
        at_equal_bytes(frame)


def test_what_cannot_be_compared() -> None:
    frame = rows([("drop", 8, 100, [3.0, 2.0]), ("low_bit", 8, 150, [1.0, 1.0])])
    with pytest.raises(StudyError, match="no rows"):
        at_equal_bytes(frame.iloc[:0])
    with pytest.raises(StudyError, match="1 rows, and the frame 2 prompts"):
        at_equal_bytes(frame.iloc[:-1])
    with pytest.raises(SchemaError, match="domain"):
        at_equal_bytes(frame, "domain")
    with pytest.raises(StudyError, match=r"whole number of bytes, got 1\.5"):
        at_equal_bytes(frame, "kl_mean", [1.5])  # type: ignore[list-item]
