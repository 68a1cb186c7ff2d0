"""Gaps to MIN and their parts, skew and recency, and the table of policies by document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.errors import CapacityError, PolicyError, SchemaError, StudyError
from moelab.experts.policies import LRU
from moelab.quality.intervals import paired
from moelab.routing.gaps import belady_gap, skew_and_recency
from moelab.routing.policies import policy_summary, policy_table
from moelab.routing.trace import export_trace, read_trace
from tests.support import frames, recordings

FRAME = recordings.routing([6, 1, 4, 5], [30, 20, 25, 9], seed=4)
REC = recordings.recording(FRAME)
NAMES = {0: ("a", "prose"), 1: ("b", "code"), 2: ("c", "prose"), 3: ("d", "code")}


def by_hand(policy: Any, capacity: int, others: str, reset: bool) -> pd.DataFrame:
    """Slots, misses, needed and loads of decoded tokens by run, from single replays."""
    frame = FRAME if others == "advance" else FRAME[FRAME["phase"] == "decode"]
    parts = []
    for one in [part for _, part in frame.groupby("run")] if reset else [frame]:
        events = moelab.replay(one, policy, capacity=capacity, experts=20).events
        kinds = one.drop_duplicates(["run", "step"]).set_index(["run", "step"])["phase"]
        here = [kinds[key] == "decode" for key in zip(events["run"], events["step"], strict=True)]
        parts.append(events[here])
    events = pd.concat(parts)
    events = events.assign(misses=events["slots"] - events["hits"], loads=events["missed"])
    return events.groupby("run")[["slots", "misses", "needed", "loads"]].sum()


@pytest.mark.parametrize("reset", ["run", None])
@pytest.mark.parametrize("others", ["advance", "exclude"])
def test_the_table_is_what_single_replays_give(others: Any, reset: Any) -> None:
    names = ["lfru", "lru", "min", "sieve", "min_forced"]
    table = policy_table(
        REC, names, capacities=[4, 0.5], others=others, reset=reset, documents=NAMES
    )
    assert table["policy"].unique().tolist() == names
    assert table["capacity"].unique().tolist() == [4, 6]
    for (policy, capacity), rows in table.groupby(["policy", "capacity"]):
        want = by_hand(policy, capacity, others, reset == "run")
        got = rows.set_index("run")
        assert got["document"].tolist() == ["a", "b", "c", "d"]
        assert got["domain"].tolist() == ["prose", "code"] * 2
        pd.testing.assert_frame_equal(
            got[list(want.columns)], want, check_dtype=False, check_index_type=False
        )
        np.testing.assert_allclose(got["miss_ratio"], want["misses"] / want["slots"])


def test_the_table_of_all_policies_by_layer() -> None:
    table = policy_table(FRAME, capacities=[5], by="layer")
    assert set(table["policy"]) == set(moelab.policies()["name"]) - {"static"}
    assert len(table) == table["policy"].nunique() * 4 * 3
    whole = policy_table(FRAME, capacities=[5])
    summed = table.groupby(["policy", "run"])["loads"].sum()
    assert summed.equals(whole.set_index(["policy", "run"])["loads"].sort_index())
    assert table["document"].unique().tolist() == ["run 0", "run 1", "run 2", "run 3"]


def test_a_policy_of_ones_own_and_a_full_bank() -> None:
    class Mine(LRU):
        name = "mine"

    table = policy_table(REC, [Mine, "lru"], capacities=[12, 1.0], phase="all", reset=None)
    mine, lru = (table[table["policy"] == name]["loads"].tolist() for name in ("mine", "lru"))
    assert mine == lru and sum(lru) == 36, "every expert of the three layers once"


def test_policies_are_compared_in_pairs() -> None:
    table = policy_table(REC, ["lfu", "min"], capacities=[5], documents=NAMES)
    told = policy_summary(table).set_index("policy")
    sums = table.groupby("policy")[["misses", "slots"]].sum()
    for name in ("lfu", "min"):
        assert told.loc[name, "miss_ratio"] == pytest.approx(
            sums.loc[name, "misses"] / sums.loc[name, "slots"]
        )
        assert told.loc[name, "low"] < told.loc[name, "miss_ratio"] < told.loc[name, "high"]
    gap = paired(table, "miss_ratio", "policy", ("lfu", "min"), weights="slots")
    want = told.loc["lfu", "miss_ratio"] - told.loc["min", "miss_ratio"]
    assert gap["mean"].item() == pytest.approx(want)


def test_the_gap_to_min_is_split_into_admission_and_victims() -> None:
    found = belady_gap(REC, ["lru", "lfu"], capacities=[4, 6], documents=NAMES)
    assert found["policy"].tolist() == ["lru", "lru", "lfu", "lfu"]
    for row in found.itertuples():
        want = {
            name: by_hand(name, row.capacity, "exclude", True)["loads"].sum()
            for name in (row.policy, "min_forced", "min")
        }
        assert (row.loads, row.loads_min_forced, row.loads_min) == tuple(want.values())
        needed = by_hand("lru", row.capacity, "exclude", True)["needed"].sum()
        assert row.needed == needed
        assert row.gap == pytest.approx((row.loads - row.loads_min) / needed)
        assert row.admission + row.victim == pytest.approx(row.gap)
        assert row.admission_share == pytest.approx(row.admission / row.gap)
        assert row.victim_share == pytest.approx(row.victim / row.gap)
        for name in ("gap", "admission", "victim", "admission_share"):
            low, value, high = (getattr(row, name + end) for end in ("_low", "", "_high"))
            assert low < value < high
        assert row.admission > 0 and row.victim > 0 and row.documents == 4


def test_gaps_by_layer_and_where_there_is_none() -> None:
    found = belady_gap(REC, capacities=[5], by="layer")
    whole = belady_gap(REC, capacities=[5])
    assert found["layer"].tolist() == list(recordings.LAYERS)
    assert found["loads_min"].sum() == whole["loads_min"].item()
    none = belady_gap(REC, "lru", capacities=[12])
    assert none["gap"].item() == 0 and np.isnan(none["admission_share"].item())
    assert set(belady_gap(REC, "all", capacities=[5])["policy"]) == set(
        moelab.policies().query("live")["name"]
    ) - {"static"}


def test_skew_and_recency_where_the_answer_is_known() -> None:
    """Uniform routing has neither; favourites are skew; repetition is recency."""
    even = frames.uniform(16, 2, 4000, seed=1)
    told = skew_and_recency(even, capacities=[4]).set_index("layer").loc[0]
    assert abs(told["skew"]) < 0.01 and abs(told["recency"]) < 0.02
    assert told["uniform"] == pytest.approx(0.25, abs=0.01) and told["chance"] == 0.25

    favourites = even.assign(
        expert=np.where(even["expert"] > 7, even["expert"] - 8, even["expert"])
    )
    favourites = favourites.drop_duplicates(["step", "expert"])
    told = skew_and_recency(favourites, capacities=[8], experts=16).iloc[0]
    assert told["shuffled"] > 0.99 and told["skew"] > 0.4 and abs(told["recency"]) < 0.001

    slow = even.assign(expert=(even["step"] // 200 % 8) * 2 + even["rank"])
    told = skew_and_recency(slow, capacities=[4], shuffles=8).iloc[0]
    assert abs(told["skew"]) < 0.03 and told["recency"] > 0.7 and told["real"] > 0.98
    assert 0 < told["recency_se"] < 0.01 and told["skew_se"] > told["recency_se"]


def test_what_tokens_stay_in() -> None:
    """Each run has an expert of its own: within runs nothing is left to recency."""
    events = {0: [[run] for run in range(4) for _ in range(50)]}
    frame = frames.from_events(events, runs=[run for run in range(4) for _ in range(50)])
    domains = {run: (f"d{run}", "ab"[run // 2]) for run in range(4)}
    options: dict[str, Any] = {"capacities": [1], "documents": domains, "shuffles": 20}
    found = {
        within: skew_and_recency(frame, within=within, **options).iloc[0]
        for within in (None, "domain", "run")
    }
    assert found["run"]["recency"] == pytest.approx(0) and found["run"]["real"] == 1 - 4 / 200
    assert found[None]["shuffled"] == pytest.approx(0.25, abs=0.04)
    assert found["domain"]["shuffled"] == pytest.approx(0.5, abs=0.04)
    again = skew_and_recency(frame, within="domain", **options).iloc[0]
    assert again.equals(found["domain"]), "the same seed gives the same"
    reset = skew_and_recency(frame, within="run", reset="run", **options).iloc[0]
    assert reset["real"] == 1 - 4 / 200 and reset["shuffled"] == pytest.approx(reset["real"])


def test_tokens_keep_their_experts_in_all_layers(tmp_path: Path) -> None:
    found = skew_and_recency(REC, capacities=[5])
    assert found["layer"].tolist() == [*recordings.LAYERS, -1]
    whole = found.iloc[-1]
    assert whole["slots"] == found["slots"].iloc[:-1].sum() and whole["experts"] == 12
    for name in ("uniform", "shuffled", "real"):
        assert whole[name] == pytest.approx(found[name].iloc[:-1].mean())
    decoded = FRAME[FRAME["phase"] == "decode"]
    hits = moelab.replay(decoded, capacity=5, experts=20).hit_rate
    assert whole["real"] == pytest.approx(hits)
    path = export_trace(REC, tmp_path / "x", provenance="generated", documents=NAMES)
    trace = read_trace(path)
    pd.testing.assert_frame_equal(skew_and_recency(trace, capacities=[5]), found)
    options: dict[str, Any] = {"capacities": [5]}
    two = policy_table(path, "lfu", **options), policy_table(REC, "lfu", documents=NAMES, **options)
    pd.testing.assert_frame_equal(two[0].drop(columns=["document", "domain"]),
                                  two[1].drop(columns=["document", "domain"]))  # fmt: skip
    domains = skew_and_recency(trace, within="domain", capacities=[5])
    pd.testing.assert_frame_equal(
        domains, skew_and_recency(REC, within="domain", documents=NAMES, capacities=[5])
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: policy_table(REC, [], capacities=[5]), StudyError, "policies is empty"),
        (lambda: policy_table(REC, ["lru", "lru"], capacities=[5]), StudyError, "one twice"),
        (lambda: policy_table(REC, "lruu", capacities=[5]), PolicyError, "no policy 'lruu'"),
        (lambda: policy_table(REC, capacities=[2]), CapacityError, "between 3"),
        (lambda: policy_table(REC, capacities=[5], phase="x"), StudyError, "got 'x'"),
        (
            lambda: policy_table(REC, "lru", capacities=[5], documents={0: "a"}),
            StudyError,
            "says nothing of the runs",
        ),
        (
            lambda: policy_table(
                REC, "lru", capacities=[5],
                documents=pd.DataFrame({"run": [0, 0], "document": ["a", "b"]}),
            ),
            SchemaError,
            "two names for run 0",
        ),
        (
            lambda: policy_table(FRAME, capacities=[0.5], experts={1: 12, 3: 16, 4: 12}),
            StudyError,
            "from 12 to 16 experts",
        ),
        (lambda: belady_gap(REC, "min", capacities=[5]), StudyError, "name another"),
        (lambda: skew_and_recency(REC, shuffles=0), StudyError, "got 0"),
        (lambda: skew_and_recency(REC, within="token"), StudyError, "got 'token'"),  # type: ignore
        (lambda: skew_and_recency(REC, phase="x"), StudyError, "got 'x'"),
        (lambda: skew_and_recency(FRAME.iloc[:9], phase="prefill"), StudyError, "nothing to mix"),
        (lambda: skew_and_recency(FRAME.iloc[:-4]), StudyError, "cut short"),
        (lambda: skew_and_recency([]), StudyError, "no layer"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
