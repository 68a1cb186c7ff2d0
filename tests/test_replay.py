"""Replay: against brute force, against known values, and against bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
from moelab.errors import CapacityError, PolicyError, ReplayError
from moelab.experts.policies import LRU
from tests.support import brute, frames

EXPERTS = 10
NAMES = [*brute.RULES, "min"]

event = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True).map(sorted)


@st.composite
def recordings(draw: Any) -> tuple[dict[int, list[list[int]]], int, list[int]]:
    """Two layers' events, top-k and the run of each step, two runs taking turns."""
    count = draw(st.integers(1, 12))
    one = st.lists(event, min_size=count, max_size=count)
    runs = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return {2: draw(one), 5: draw(one)}, draw(st.integers(1, 2)), runs


def expected(
    name: str, events: list[list[int]], capacity: int, pins: list[int], first: list[int], top_k: int
) -> tuple[list[set[int]], list[tuple[int, int, int, bool]]]:
    """Residents at each event's start, and the loads (event, expert, evicted, admitted)."""
    starts, loads = [], []
    if name == "min":
        contents = list(dict.fromkeys([*pins, *first]))[:capacity]
        inside = set(contents)
        for i, (misses, after) in enumerate(brute.minimum(events, capacity, pins, contents)):
            starts.append(inside)
            loads += [(i, e, -2, e in after) for e in misses]
            inside = after
        return starts, loads
    bank = brute.Bank(name, capacity, pins, first, top_k, events)
    for i, needed in enumerate(events):
        starts.append(set(bank.inside))
        _, parts = bank.event(needed)
        for part in parts:
            for expert, left in part.loads:
                loads.append((i, expert, -1 if left is None else left, bank.rule.admits))
    return starts, loads


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(recordings(), st.integers(0, 3), st.integers(0, 2), st.lists(st.integers(0, 9), max_size=9))
def test_agrees_with_brute_force(
    name: str, made: Any, spare: int, pinned: int, first: list[int]
) -> None:
    layers, top_k, runs = made
    capacity = {2: top_k + pinned + spare, 5: top_k + pinned}
    pins = {2: list(range(pinned)), 5: list(range(3, 3 + pinned))}
    frame = frames.from_events(layers, top_k, runs)
    result = moelab.replay(
        frame, name, capacity=capacity, pins=pins, initial=first, experts=EXPERTS + 9
    )
    loads, events = result.loads, result.events
    hits = slots = 0
    steps = [(run, runs[:i].count(run)) for i, run in enumerate(runs)]
    for layer, needed in layers.items():
        starts, want = expected(name, needed, capacity[layer], pins[layer], first, top_k)
        got = loads[loads["layer"] == layer]
        assert [steps[i] for i, *_ in want] == list(zip(got["run"], got["step"], strict=True))
        assert [e for _, e, _, _ in want] == got["expert"].tolist()
        assert [a for *_, a in want] == got["admitted"].tolist()
        if name != "min":
            assert [left for _, _, left, _ in want] == got["evicted"].tolist()
        of_layer = events[events["layer"] == layer]
        assert steps == list(zip(of_layer["run"], of_layer["step"], strict=True))
        assert of_layer["needed"].tolist() == [len(n) for n in needed]
        assert of_layer["missed"].tolist() == [
            len(set(n) - start) for n, start in zip(needed, starts, strict=True)
        ]
        rows = frame[frame["layer"] == layer]
        resident = [
            expert in starts[steps.index((run, step))]
            for run, step, expert in zip(rows["run"], rows["step"], rows["expert"], strict=True)
        ]
        assert result.routing.loc[rows.index, "hit"].tolist() == resident
        hits, slots = hits + sum(resident), slots + len(rows)
    assert result.hit_rate == hits / slots
    assert (loads["evicted"] >= 0).sum() == events["evicted"].sum()
    assert result.by_layer["loads"].sum() == len(loads)
    assert result.by_layer["hits"].sum() == hits
    total = result.misses()
    assert total["misses"].item() == slots - hits
    assert total["distinct"].item() == events["missed"].sum() / events["needed"].sum()
    assert not frame["hit"].any(), "the frame that was given is as it was"


TABLE = [
    (64, 8, 8, 0.125, 0.386),
    (64, 8, 16, 0.250, 0.563),
    (64, 8, 32, 0.500, 0.781),
    (128, 8, 32, 0.250, 0.581),
    (8, 2, 4, 0.500, 0.729),
]
"""Experts, top-k, capacity; share of hits of LRU (exactly capacity ÷ experts) and of MIN with
bypass (to three decimals), under uniform routing."""
TOKENS = 200_000


def error_of_mean(hits: np.ndarray, blocks: int = 200) -> float:
    """Standard error of a mean over time, from the means of blocks."""
    means = hits[: len(hits) // blocks * blocks].reshape(blocks, -1).mean(axis=1)
    return float(means.std(ddof=1) / blocks**0.5)


@pytest.mark.parametrize(("experts", "top_k", "capacity", "lru", "least"), TABLE)
def test_uniform_routing_gives_known_values(
    experts: int, top_k: int, capacity: int, lru: float, least: float
) -> None:
    frame = frames.uniform(experts, top_k, TOKENS, seed=capacity)
    for name, value, rounding in (("lru", lru, 0.0), ("min", least, 0.0005)):
        result = moelab.replay(frame, name, capacity=capacity, experts=experts)
        shares = (result.events["hits"] / top_k).to_numpy()
        error = error_of_mean(shares)
        assert 1e-5 < error < 1e-3
        assert abs(result.hit_rate - value) < 4 * error + rounding, (name, result.hit_rate, error)
        assert len(result.loads) == round(TOKENS * top_k * (1 - result.hit_rate))


def test_access_by_access_is_something_else() -> None:
    """Each slot an event of its own: LRU's known value then, far from the atomic one."""
    frame = frames.uniform(64, 8, 25_000, seed=3)
    frame["step"] = np.arange(len(frame), dtype=np.int32)
    result = moelab.replay(frame, "lru", capacity=16)
    hits = result.events["hits"].to_numpy()
    assert abs(result.hit_rate - 0.206) < 4 * error_of_mean(hits) + 0.0005
    assert result.hit_rate < 0.22


def test_runs_that_take_turns_and_frames_that_were_sorted() -> None:
    """In order of rows; but a run's steps are never turned round."""
    layers = {0: [[0], [1], [2], [0], [1], [2]]}
    mixed = frames.from_events(layers, runs=[4, 4, 1, 1, 4, 1])
    apart = mixed.sort_values(["run", "step"], ascending=[False, True], ignore_index=True)
    turned = mixed.iloc[::-1]

    def order(frame: pd.DataFrame) -> list[tuple[int, int]]:
        events = moelab.replay(frame, capacity=1).events
        return list(zip(events["run"], events["step"], strict=True))

    assert order(mixed) == [(4, 0), (4, 1), (1, 0), (1, 1), (4, 2), (1, 2)]
    assert order(apart) == [(4, 0), (4, 1), (4, 2), (1, 0), (1, 1), (1, 2)]
    assert order(turned) == [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2)]


def test_the_bank_is_kept_from_run_to_run() -> None:
    frame = frames.from_events({0: [[1], [1]]}, runs=[0, 1])
    assert moelab.replay(frame, capacity=1).hit_rate == 0.5


def test_padding_counts_and_order_within_a_step_does_not() -> None:
    frame = frames.from_events({0: [[0, 1, 2], [2, 1, 0]]}, 1)
    frame.loc[2, "phase"] = "padding"
    result = moelab.replay(frame, capacity=3)
    assert result.loads["expert"].tolist() == [0, 1, 2]
    again = moelab.replay(frame.iloc[[2, 0, 1, 5, 3, 4]], capacity=3)
    assert again.loads.equals(result.loads)
    assert result.loads.dtypes["run"] == frame.dtypes["run"]
    assert result.loads.dtypes["expert"] == frame.dtypes["expert"]


def test_capacity_is_a_count_a_share_or_by_layer() -> None:
    frame = frames.from_events({0: [[0, 9]], 3: [[1, 2]]}, 2)
    assert moelab.replay(frame, capacity=4).capacity == {0: 4, 3: 4}
    assert moelab.replay(frame, capacity=0.25).capacity == {0: 3, 3: 3}, "2.5, half up"
    assert moelab.replay(frame, capacity=0.25, experts=16).capacity == {0: 4, 3: 4}
    assert moelab.replay(frame, capacity={0: 2, 3: 0.5}).capacity == {0: 2, 3: 5}
    by = moelab.replay(frame, capacity={0: 0.5, 3: 0.5}, experts={0: 10, 3: 4})
    assert by.capacity == {0: 5, 3: 2}


def test_a_layer_that_holds_all_its_experts_loads_none() -> None:
    """As in the live bank, which leaves it stock; where it is not known, first uses are loads."""
    frame = frames.from_events({0: [[0, 9], [1, 2]]}, 2)
    assert len(moelab.replay(frame, capacity=10).loads) == 4
    whole = moelab.replay(frame, capacity=1.0, experts=10)
    assert len(whole.loads) == 0 and whole.hit_rate == 1
    assert whole.loads.columns.tolist() == moelab.replay(frame, capacity=4).loads.columns.tolist()


def test_what_it_shows() -> None:
    frame = frames.from_events({0: [[0, 1, 2, 3], [4, 0]], 1: [[5, 6, 7, 0], [1, 2]]}, 2)
    result = moelab.replay(frame, "lfu", capacity=3, pins=[0])
    text = repr(result)
    for part in (
        "lfu",
        "3 of 8 (highest id seen)",
        "1.0 of them pinned",
        "4 in 2 layers",
        "2 swept",
    ):
        assert part in text
    assert f"{result.hit_rate:.1%} hits" in text and "<table>" in result._repr_html_()
    assert result.pins == {0: [0], 1: [0]}


def test_a_policy_of_ones_own_is_replayed() -> None:
    class Mine(LRU):
        name = "mine"

    frame = frames.from_events({0: [[0], [1], [2], [0]]})
    for given_policy in (Mine, Mine()):
        result = moelab.replay(frame, given_policy, capacity=2)
        assert result.policy == "mine"
        assert result.loads.equals(moelab.replay(frame, "lru", capacity=2).loads)


FRAME = frames.from_events({0: [[0, 1], [2, 3]], 1: [[0, 1], [6, 7]]}, 2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"policy": "lruu"}, PolicyError, "Known: lru, lfu"),
        ({"capacity": 1}, CapacityError, "between 2"),
        ({"capacity": 0}, CapacityError, "between 2"),
        ({"capacity": 0.1}, CapacityError, "between 2"),
        ({"capacity": 1.5}, CapacityError, "between 0 and 1"),
        ({"capacity": True}, CapacityError, "got True"),
        ({"capacity": "auto"}, CapacityError, "got 'auto'"),
        ({"capacity": 9, "experts": 8}, CapacityError, "8 .all its experts"),
        ({"capacity": {0: 4}}, CapacityError, "nothing of layer 1"),
        ({"experts": 7}, CapacityError, "has expert 7"),
        ({"experts": {0: 8}}, CapacityError, r"nothing of layers \[1\]"),
        ({"pins": [0, 1, 2]}, PolicyError, "3 pins are too many for layer 0"),
        ({"pins": {1: [0, 1, 2]}}, PolicyError, "leaves 2 for"),
        ({"pins": {7: [0]}}, PolicyError, r"names layers \[7\]"),
        ({"pins": [8]}, PolicyError, r"experts \[8\]"),
        ({"pins": [-1]}, PolicyError, r"experts \[-1\]"),
        ({"initial": [99]}, PolicyError, "initial= names"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        moelab.replay(FRAME, **{"capacity": 4, **options})


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (FRAME.drop(columns=["step", "rank"]), "lacks the columns step, rank"),
        (FRAME.iloc[:0], "no rows"),
        ("routing.parquet", "got str"),
        (FRAME.assign(outcome=["hit"] * 7 + ["drop"]), "lossy miss action .drop."),
        (FRAME.assign(expert=-1), "under 0"),
    ],
)
def test_bad_frames(frame: Any, words: str) -> None:
    with pytest.raises(ReplayError, match=words) as caught:
        moelab.replay(frame, capacity=4)
    assert isinstance(caught.value, ValueError)


def test_a_lossless_outcome_is_replayed() -> None:
    outcome = pd.Categorical(["hit", "load"] * 4, categories=["hit", "load", "drop", "substitute"])
    frame = FRAME.assign(outcome=outcome)
    assert moelab.replay(frame, capacity=4).loads.equals(moelab.replay(FRAME, capacity=4).loads)
