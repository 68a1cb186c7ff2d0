"""The smallest capacity within a tolerance, the set of the best, and what splits are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from moelab.errors import SchemaError, StudyError
from moelab.quality.intervals import simultaneous
from moelab.study.statements import (
    best_set,
    capacities_within,
    capacity_within,
    check_split,
    label_split,
)

CAPACITIES = np.array([8, 16, 24, 32, 48, 64])


def sweep(
    cost: Any, noise: float = 0.01, seed: int = 0, documents: int = 12, **extra: Any
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    truth = np.array([cost(c) for c in CAPACITIES])
    level = rng.normal(size=(documents, 1))
    values = truth * (1 + noise * level + noise * rng.normal(size=(documents, len(truth))))
    return pd.DataFrame(
        {
            "capacity": np.tile(CAPACITIES, documents),
            "prompt": np.repeat([f"p{n}" for n in range(documents)], len(truth)),
            "domain": np.repeat([f"d{n % 3}" for n in range(documents)], len(truth)),
            "tokens": np.repeat(rng.integers(64, 200, documents), len(truth)),
            "ln_ppl_ratio": values.ravel(),
            "on_miss": "drop",
            "split": "test",
            **extra,
        }
    )


def falling(c: float) -> float:
    return 0.3 * (1 - c / 64) ** 2


def test_the_smallest_capacity_is_read_off_the_bounds() -> None:
    frame = sweep(falling)
    table = simultaneous(
        frame, "ln_ppl_ratio", "capacity", cluster="prompt", weights="tokens", sides=1
    ).set_index("capacity")["high"]
    for tolerance in (0.01, 0.05, 0.2):
        want = None
        for c in CAPACITIES[::-1]:  # in plain words: down from the top until one fails
            if not table[c] < np.log(1 + tolerance):
                break
            want = c
        got = capacity_within(frame, tolerance)
        assert got.capacity == want and got.points == 6 and got.documents == 12
        assert got.bound == table[want]
        assert f"capacity {want}" in repr(got) and "6 points" in got.why
        assert got._repr_html_().startswith("<table>")
    assert capacity_within(frame, 0.05).capacity == 48, "0.3 · 0.25² = 0.019, and at 32 0.075"


def test_a_larger_capacity_that_fails_stops_it() -> None:
    frame = sweep(lambda c: 0.5 if c == 48 else falling(c))
    assert capacity_within(frame, 0.2).capacity == 64
    none = capacity_within(sweep(lambda c: 1.0), 0.2)
    assert none.capacity is None and np.isnan(none.bound)
    assert "No tested capacity" in none.why and "+17" in none.why


def test_noise_is_not_read_as_quality() -> None:
    """The mean is within 5% everywhere, the bound is not."""
    frame = sweep(lambda c: 0.03 if c < 64 else 0.0, noise=1.0, seed=1)
    means = capacity_within(frame, 0.05).frame.set_index("capacity")["mean"]
    assert means.max() < np.log(1.05)
    assert capacity_within(frame, 0.05).capacity == 64


def test_bounds_hold_for_all_points_and_curves() -> None:
    """At the tolerance itself no capacity may be named in more than 5% of studies."""
    named = 0
    for seed in range(200):
        frame = sweep(lambda c: np.log(1.05), noise=0.3, seed=seed)
        rng = np.random.default_rng(seed)
        frame["ln_ppl_ratio"] = np.log(1.05) + 0.02 * rng.normal(size=len(frame))
        named += capacity_within(frame, 0.05, resamples=1000).capacity is not None
    assert named <= 20
    frame = pd.concat([sweep(falling), sweep(lambda c: 2 * falling(c), on_miss="wrong_slot")])
    rows = capacities_within(frame, (0.05, 0.2))
    assert rows["on_miss"].tolist() == ["drop", "drop", "wrong_slot", "wrong_slot"]
    assert rows["points"].tolist() == [12] * 4 and rows["split"].unique().tolist() == ["test"]
    alone = [
        capacity_within(frame[frame["on_miss"] == action], tolerance)
        for action in ("drop", "wrong_slot")
        for tolerance in (0.05, 0.2)
    ]
    assert rows["capacity"].tolist() == [one.capacity for one in alone]
    assert (rows["bound"].to_numpy() >= [one.bound for one in alone]).all()
    bad = capacities_within(sweep(lambda c: 1.0), (0.05,))
    assert bad["capacity"].isna().all() and bad["rise"].isna().all()


def test_bad_input_to_tolerances() -> None:
    frame = sweep(falling)
    with pytest.raises(StudyError, match="one capacity only, 8"):
        capacity_within(frame[frame["capacity"] == 8], 0.05)
    with pytest.raises(StudyError, match=r"'on_miss' is drop, load"):
        capacity_within(pd.concat([frame, frame.assign(on_miss="load")]), 0.05)
    with pytest.raises(StudyError, match=r"several curves: 'split'"):
        capacity_within(pd.concat([frame, frame.assign(split="selection")]), 0.05)
    with pytest.raises(StudyError, match=r"capacity=8 has 11 documents|capacity=16 has 12"):
        capacity_within(frame.iloc[1:], 0.05)
    with pytest.raises(StudyError, match="share above 0"):
        capacity_within(frame, 0.0)
    with pytest.raises(SchemaError, match="no column 'tokens'"):
        capacity_within(frame.drop(columns="tokens"), 0.05)
    with pytest.raises(SchemaError, match="no column 'on_miss'"):
        capacities_within(frame.drop(columns="on_miss"))
    frame.loc[3, "ln_ppl_ratio"] = np.nan
    with pytest.raises(StudyError, match="NaN"):
        capacity_within(frame, 0.05)
    one_each = sweep(falling, documents=3)
    assert "each stratum has one document" in capacity_within(one_each, 0.05).why


def settings(means: dict[str, float], seed: int, noise: float = 0.1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    level = rng.normal(size=12)
    parts = [
        pd.DataFrame(
            {
                "policy": name,
                "prompt": [f"p{n}" for n in range(12)],
                "domain": [f"d{n % 3}" for n in range(12)],
                "tokens": 100,
                "kl_mean": mean + level + noise * rng.normal(size=12),
            }
        )
        for name, mean in means.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_the_set_of_the_best() -> None:
    frame = settings({"far": 1.0, "best": 0.0, "near": 0.01}, 0)
    rows = best_set(frame, "policy")
    assert set(rows[rows["best"]]["policy"]) == {"best", "near"}
    assert rows["behind"].is_monotonic_increasing and rows["behind"].iloc[0] == 0
    far = rows.set_index("policy").loc["far"]
    assert 0 < far["behind_low"] < 1 < far["behind_high"] < 1.5, "documents' levels cancel"
    turned = best_set(frame, ["policy"], best="high")
    assert turned[turned["best"]]["policy"].tolist() == ["far"]


def test_the_truly_best_is_in_the_set() -> None:
    missed = wrong = 0
    for seed in range(150):
        frame = settings({"a": 0.0, "b": 0.0, "c": 0.05, "d": 0.1}, seed)
        rows = best_set(frame, "policy", resamples=1000, level=0.9).set_index("policy")
        missed += not rows.loc["a", "best"]
        truth = {"a": 0.0, "b": 0.0, "c": 0.05, "d": 0.1}
        wrong += not all(
            rows.loc[k, "behind_low"] <= v <= rows.loc[k, "behind_high"] for k, v in truth.items()
        )
    assert missed <= 15 and wrong <= 22


def test_bad_input_to_the_set() -> None:
    frame = settings({"a": 0.0, "b": 1.0}, 0)
    with pytest.raises(StudyError, match="one setting"):
        best_set(frame[frame["policy"] == "a"], "policy")
    with pytest.raises(StudyError, match="policy=b has 11"):
        best_set(frame.iloc[:-1], "policy")
    with pytest.raises(StudyError, match="'low' or 'high'"):
        best_set(frame, "policy", best="most")
    with pytest.raises(SchemaError, match="no column 'pins'"):
        best_set(frame, "pins")
    with pytest.raises(StudyError, match="several curves: 'capacity'"):
        best_set(pd.concat([frame.assign(capacity=8), frame.assign(capacity=9)]), "policy")


def test_splits() -> None:
    frame = pd.DataFrame({"split": ["test", "calibration"]})
    check_split(frame, ("calibration", "test"), "Figures are reported")
    with pytest.raises(StudyError, match=r"Pins are learned on the split calibration.*of test"):
        check_split(frame, "calibration", "Pins are learned")
    with pytest.raises(SchemaError, match="'split'"):
        check_split(frame.rename(columns={"split": "s"}), "test", "It is")
    assert label_split("test") == label_split("") == ""
    assert "selection split" in label_split("selection")
    assert "selection split" in capacity_within(sweep(falling, split="selection"), 0.05).why
