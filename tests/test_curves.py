"""Miss-ratio curves: against the replay, against brute force, and against known values."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
from moelab.bench.curves import bench_curves, write_made_up
from moelab.errors import CapacityError, PolicyError, ReplayError, SchemaError, StudyError
from moelab.routing.curves import curves
from moelab.routing.stacks import next_uses
from tests.support import brute, frames

EXPERTS = 9
COUNTS = ("slots", "misses", "needed", "loads")

event = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True).map(sorted)
small = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True).map(sorted)


@st.composite
def recordings(draw: Any, of: Any = event) -> pd.DataFrame:
    """Two layers, two runs taking turns, prompts of several tokens and decoded ones."""
    count = draw(st.integers(1, 14))
    one = st.lists(st.one_of(small, of), min_size=count, max_size=count)
    runs = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    frame = frames.from_events({2: draw(one), 5: draw(one)}, draw(st.integers(1, 3)), runs)
    kinds = draw(st.lists(st.sampled_from(["prefill", "decode"]), min_size=count, max_size=count))
    frame["phase"] = np.array(kinds)[frame.groupby(["run", "step"], sort=False).ngroup()]
    return frame


def replayed(
    frame: pd.DataFrame, policy: str, capacity: int, phase: str, **options: Any
) -> pd.DataFrame:
    """What the replay counts in the events of a phase, by run and layer."""
    result = moelab.replay(frame, policy, capacity=capacity, experts=EXPERTS + 5, **options)
    events = result.events.merge(
        frame[["run", "step", "phase"]].drop_duplicates(), on=["run", "step"]
    )
    if phase != "all":
        events = events[events["phase"] == phase]
    events = events.assign(misses=events["slots"] - events["hits"], loads=events["missed"])
    return events.groupby(["run", "layer"])[list(COUNTS)].sum()


def check(found: pd.DataFrame, want: pd.DataFrame, policy: str, capacity: int) -> None:
    rows = found[(found["policy"] == policy) & (found["capacity"] == capacity)]
    rows = rows[rows["layer"] >= 0].set_index(["run", "layer"]).sort_index()
    pd.testing.assert_frame_equal(
        rows[list(COUNTS)], want.sort_index(), check_dtype=False, check_index_type=False
    )


@pytest.mark.parametrize("policy", ["lru", "min", "min_forced"])
@settings(max_examples=20, deadline=None)
@given(
    recordings(),
    st.sampled_from(["decode", "prefill", "all"]),
    st.integers(0, 2),
    st.lists(st.integers(3, EXPERTS + 4), min_size=3, max_size=3, unique=True),
)
def test_every_capacity_agrees_with_the_replay(
    policy: str, frame: pd.DataFrame, phase: str, pinned: int, capacities: list[int]
) -> None:
    """Event for event in sums by run, layer and phase; with prompts that are swept."""
    if phase != "all" and phase not in set(frame["phase"]):
        return
    pins = list(range(1, 1 + pinned))
    options = {"experts": EXPERTS + 5, "pins": pins}
    found = curves(frame, phase=phase, by="run", **options).frame  # type: ignore[arg-type]
    for capacity in {max(c, int(frame["rank"].max()) + 1 + pinned) for c in capacities}:
        want = replayed(frame, policy, capacity, phase, pins=pins)
        check(found, want, policy, capacity)
    again = curves(frame, phase=phase, **options).frame  # type: ignore[arg-type]
    summed = found.groupby(["layer", "policy", "capacity"], observed=True)[list(COUNTS)].sum()
    whole = again.set_index(["layer", "policy", "capacity"]).sort_index()[list(COUNTS)]
    pd.testing.assert_frame_equal(summed.sort_index(), whole, check_index_type=False)


@settings(max_examples=20, deadline=None)
@given(recordings(), st.sampled_from(["lru", "min", "min_forced"]), st.integers(3, EXPERTS))
def test_reset_and_exclude_are_what_they_say(
    frame: pd.DataFrame, policy: str, capacity: int
) -> None:
    """As if each run, and only the events of one phase, had been recorded by itself."""
    phase = str(frame["phase"].iloc[0])
    apart = [
        replayed(one, policy, capacity, phase)
        for _, one in frame.groupby("run")
        if phase in set(one["phase"])
    ]
    options = {"experts": EXPERTS + 5, "by": "run", "phase": phase}
    found = curves(frame, reset="run", **options).frame  # type: ignore[arg-type]
    check(found, pd.concat(apart), policy, capacity)
    alone = frame[frame["phase"] == phase]
    found = curves(frame, others="exclude", **options).frame  # type: ignore[arg-type]
    check(found, replayed(alone, policy, capacity, phase), policy, capacity)


def test_every_capacity_of_a_long_trace_agrees_with_the_replay() -> None:
    """Long enough for the stacks to be full and to change; single slots as the replay has them."""
    frame = frames.uniform(16, 3, 1500, seed=2)
    found = curves(frame).frame
    assert found["phase"].unique().tolist() == ["all"]
    for policy in ("lru", "min", "min_forced"):
        for capacity in range(3, 17):
            events = moelab.replay(frame, policy, capacity=capacity).events
            rows = found[(found["policy"] == policy) & (found["capacity"] == capacity)]
            assert rows["layer"].tolist() == [0, -1]
            assert rows["misses"].tolist() == [int(events["missed"].sum())] * 2
    assert not found["swept"].any()


def test_the_next_use_ends_where_the_bank_is_emptied() -> None:
    start, expert = np.array([0, 2, 3, 4]), np.array([0, 1, 0, 1], np.int32)
    kept = next_uses(start, expert, np.array([True, False, False]), 2)
    emptied = next_uses(start, expert, np.array([True, False, True]), 2)
    assert kept.tolist() == [1, 2, 3, 3] and emptied.tolist() == [1, 3, 3, 3]


TINY = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True), max_size=6)


@settings(max_examples=20, deadline=None)
@given(TINY.filter(len))
def test_bounds_are_the_least_that_any_choice_needs(events: list[list[int]]) -> None:
    """Every sequence of choices is tried."""
    frame = frames.from_events({0: [sorted(e) for e in events]})
    found = curves(frame, experts=5).by_layer.set_index(["policy", "capacity"])["loads"]
    for capacity in range(1, 6):
        least = brute.least_loads(events, capacity, forced=False)
        assert found["min", capacity] == least
        if capacity >= max(map(len, events)):
            assert found["min_forced", capacity] == brute.least_loads(events, capacity, forced=True)
        # The best fixed set, each member loaded at its first use: all sets are tried.
        uses = {e: sum(e in event for event in events) for e in range(5)}
        needed = sum(uses.values())
        sets = itertools.combinations(uses, capacity)
        best = max(sum(max(uses[e] - 1, 0) for e in one) for one in sets)
        assert found["best_static", capacity] == needed - best
        assert least <= min(found["best_static", capacity], found["lru", capacity])


TABLE = [
    (64, 8, (8, 16, 32), (0.125, 0.25, 0.5), (0.386, 0.563, 0.781)),
    (128, 8, (32,), (0.25,), (0.581,)),
    (8, 2, (4,), (0.5,), (0.729,)),
]
"""Experts, top-k, capacities; hits of atomic LRU and of MIN with bypass under uniform routing."""


@pytest.mark.parametrize(("experts", "top_k", "capacities", "lru", "least"), TABLE)
def test_uniform_routing_gives_known_values(
    experts: int,
    top_k: int,
    capacities: tuple[int, ...],
    lru: tuple[float, ...],
    least: tuple[float, ...],
) -> None:
    """200,000 tokens, within four standard errors; runs are blocks that give the error."""
    frame = frames.uniform(experts, top_k, 200_000, seed=experts)
    frame["run"] = (frame["step"] // 1000).astype("int32")
    found = curves(frame, capacities=capacities, experts=experts, by="run").by_layer
    for policy, values, rounding in (("lru", lru, 0.0), ("min", least, 0.0005)):
        for capacity, value in zip(capacities, values, strict=True):
            rows = found[(found["policy"] == policy) & (found["capacity"] == capacity)]
            hits = 1 - rows["miss_ratio"]
            error = float(hits.std(ddof=1)) / len(rows) ** 0.5
            assert len(rows) == 200 and 1e-5 < error < 1e-3
            assert abs(hits.mean() - value) < 4 * error + rounding, (policy, capacity)
            if policy == "lru":
                assert rows["chance"].unique() == pytest.approx([1 - value])


def test_first_uses_and_the_gate_weight_are_counted_apart() -> None:
    frame = frames.from_events({0: [[0, 1], [0, 2], [0, 1], [0, 1]]}, 2)
    frame["phase"] = ["prefill"] * 2 + ["decode"] * 6
    found = curves(frame).by_layer.set_index(["policy", "capacity"])
    row = found.loc[("lru", 2)]
    assert row[["slots", "misses", "compulsory", "needed", "loads"]].tolist() == [6, 2, 1, 6, 2]
    assert row["mass_ratio"] == pytest.approx(1.0 / 4.5), "ranks 0 and 1 weigh 1 and 1/2"
    assert row["miss_ratio"] == row["load_ratio"] == pytest.approx(1 / 3)
    assert found.loc[("lru", 3), "misses"] == found.loc[("min", 3), "misses"] == 1
    apart = curves(frame, others="exclude").by_layer.set_index(["policy", "capacity"])
    assert apart.loc[("lru", 3), "compulsory"] == 3
    assert curves(frame, phase="all").by_layer["slots"].unique().tolist() == [8]
    assert np.isnan(curves(frame.drop(columns="weight")).frame["mass_ratio"]).all()


def test_several_tokens_of_one_event_are_several_slots_and_one_load() -> None:
    frame = frames.from_events({0: [[0, 1, 2, 3], [0, 1]]}, 2)
    frame["expert"] = np.array([0, 1, 0, 1, 2, 3], np.int32)
    frame["phase"] = ["prefill"] * 4 + ["decode"] * 2
    row = curves(frame, phase="prefill", capacities=[2]).by_layer.iloc[0]
    assert row[["slots", "misses", "needed", "loads"]].tolist() == [4, 4, 2, 2]


def test_layers_of_other_sizes_are_summed_where_they_all_have_the_capacity() -> None:
    frame = frames.from_events({0: [[0, 1], [2, 3], [0, 1]], 4: [[0], [1], [0]]}, 1)
    result = curves(frame, experts={0: 6, 4: 3}, bounds=False)
    assert result.by_layer.groupby("layer")["capacity"].agg(["min", "max"]).to_numpy().tolist() == [
        [1, 6],
        [1, 3],
    ]
    overall, own = result.overall.set_index("capacity"), result.by_layer
    assert overall.index.tolist() == [1, 2, 3, 4, 5, 6]
    big = own[own["layer"] == 0].set_index("capacity")["misses"]
    small_one = own[own["layer"] == 4].set_index("capacity")["misses"]
    assert overall.loc[2, "misses"] == big[2] + small_one[2]
    assert overall.loc[6, "misses"] == big[6] + small_one[3]
    shares = curves(frame, experts={0: 6, 4: 3}, capacities=[0.5], bounds=False)
    assert shares.by_layer["capacity"].tolist() == [3, 2] and shares.overall.empty
    assert "no capacity in common" in repr(shares)


def test_padding_belongs_to_its_event() -> None:
    frame = frames.from_events({0: [[0, 1, 2], [2, 1, 0]]}, 1)
    frame.loc[2, "phase"] = "padding"
    assert curves(frame).overall["slots"].unique().tolist() == [6]


def test_what_it_shows_and_draws() -> None:
    frame = frames.uniform(16, 2, 200)
    result = curves(frame)
    for text in (repr(result), result._repr_html_()):
        assert "400 routed slots of phase all" in text and "at 8" in text and "min misses" in text
    assert result.frame.attrs["experts"] == 16
    assert result.plot().get_title(loc="left") == "Misses by capacity, all layers"
    kept = result.frame
    assert kept.dtypes.astype(str).to_dict() == {
        **dict.fromkeys(["phase", "policy"], "category"),
        "layer": "int16",
        "capacity": "int32",
        "experts": "int32",
        "swept": "bool",
        **dict.fromkeys(["slots", "misses", "compulsory"], "int64"),
        **dict.fromkeys(["needed", "loads", "compulsory_loads"], "int64"),
        **dict.fromkeys(["miss_ratio", "load_ratio", "mass_ratio", "chance"], "float64"),
    }


FRAME = frames.from_events({0: [[0, 1], [2, 3]], 1: [[0, 1], [6, 7]]}, 2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"phase": "decoded"}, StudyError, "got 'decoded'"),
        ({"phase": "prefill"}, StudyError, "4 of decode"),
        ({"others": "skip"}, StudyError, "got 'skip'"),
        ({"reset": True}, StudyError, "got True"),
        ({"by": "document"}, StudyError, "got 'document'"),
        ({"capacities": []}, CapacityError, "empty"),
        ({"capacities": 4}, CapacityError, "list of numbers"),
        ({"capacities": [1]}, CapacityError, "between 2"),
        ({"capacities": [9]}, CapacityError, "8 .all its experts"),
        ({"capacities": [1.5]}, CapacityError, "between 0 and 1"),
        ({"capacities": [True]}, CapacityError, "got True"),
        ({"capacities": ["4"]}, CapacityError, "got '4'"),
        ({"capacities": [3], "pins": [0, 1]}, CapacityError, "and 2 pins"),
        ({"experts": 7}, CapacityError, "has expert 7"),
        ({"experts": {0: 8}}, CapacityError, "nothing of layer 1"),
        ({"pins": [8]}, PolicyError, r"experts \[8\]"),
        ({"pins": range(7)}, PolicyError, "7 pins are too many"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        curves(FRAME, **options)


@pytest.mark.parametrize(
    ("frame", "error", "words"),
    [
        (FRAME.drop(columns="step"), ReplayError, "lacks the columns step"),
        (FRAME.iloc[:0], ReplayError, "no rows"),
        (FRAME.assign(outcome="drop"), ReplayError, "lossy miss action .drop."),
        (FRAME.assign(expert=-1), ReplayError, "under 0"),
        (FRAME.assign(phase="decoding"), SchemaError, "column phase has 'decoding'"),
        (FRAME.assign(expert=FRAME["expert"] + 0.5), SchemaError, "column expert .* float64"),
        (FRAME.assign(expert=1 << 20), SchemaError, "column expert has 1048576"),
        (FRAME.assign(layer=pd.array([1, None] * 4, "Int16")), SchemaError, "layer .* with gaps"),
        (FRAME.assign(weight="x"), SchemaError, "column weight"),
        ([], StudyError, "no layer"),
        (7, ReplayError, "got int"),
    ],
)
def test_bad_frames(frame: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        curves(frame)


def test_the_bench_measures_what_it_says(tmp_path: Path) -> None:
    """Small: only that it runs, counts the same as the curves do, and writes its page."""
    made = tmp_path / "made.parquet"
    write_made_up(made, 200, 2, 256, 4, 3, False)
    result = bench_curves(tokens=200, layers=2, experts=256, top_k=4, seed=3, progress=False)
    overall = curves(made).overall.set_index(["policy", "capacity"])["miss_ratio"]
    for policy, ratios in result.misses.items():
        for capacity, ratio in ratios.items():
            assert ratio == overall[policy, int(capacity)]
    assert result.base_bytes <= result.peak_bytes < 2**30
    assert result.curves[0] > 0 and result.lru[0] < result.compile[0]
    result.save(tmp_path)
    assert "1,600 routed slots (seed 3)" in (tmp_path / "bench-curves.md").read_text()
    with pytest.raises(StudyError, match="at least 256 experts"):
        bench_curves(experts=64)
