"""Capacity by memory, by budget and by layer."""

from __future__ import annotations

import gc
import itertools
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
from moelab.errors import CapacityError
from moelab.experts import budget as budget_module
from moelab.experts.budget import Need, automatic, needs, within
from moelab.experts.capacity import resolve_capacity
from moelab.experts.footprint import Footprint
from moelab.experts.memory import Memory
from moelab.families import find_switches
from tests import spread_figure
from tests.support import stock, tiny

TOLERANCE = 0.03
NOTHING = Footprint(context=1, chunk=1, kv_bits=None, growing=0, constant=0, prefill=0)


def settled() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


class Site:
    """What a budget must know of an MoE layer."""

    def __init__(self, layer: int, experts: int, top_k: int) -> None:
        self.layer, self.experts, self.top_k = layer, experts, top_k


# -- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_budget_is_honoured(family: str) -> None:
    """MLX's own count of what the lab holds is within 3%, or an expert where that is more."""
    path = stock.folder(family)
    with moelab.load(path, 1.0) as lab:
        use = lab.memory()
        least = max(site.top_k / site.experts for site in lab.sites)
    del lab
    for share in (least + 0.03, 0.5, 0.8):
        asked = use.trunk + share * use.resident_experts
        before = settled()
        with moelab.load(path, budget_gb=asked / 1e9) as lab:
            assert lab.budget is not None and lab.budget.weights == lab.memory().total
            near = max(TOLERANCE * asked, *lab.budget.need.experts)
            assert asked - near <= lab.memory().total <= asked
            assert settled() - before == pytest.approx(asked, abs=near)
            lab.generate(tiny.prompt(40), 4)
            assert settled() - before == pytest.approx(asked, abs=near)
            assert max(lab.capacities) - min(lab.capacities) <= 1
            assert lab.capacities == sorted(lab.capacities, reverse=True)
        del lab


@pytest.mark.parametrize("gigabytes", [0.006, 0.009, 0.0121, 0.017])
def test_the_lab_models_budget(gigabytes: float) -> None:
    before = settled()
    with moelab.load("lab", budget_gb=gigabytes) as lab:
        assert settled() - before == pytest.approx(gigabytes * 1e9, rel=TOLERANCE)
        assert lab.memory().total <= gigabytes * 1e9
        assert lab.budget is not None and 0 <= lab.budget.left < 2 * max(lab.budget.need.experts)


def test_with_a_context_cache_and_prefill_are_in_the_budget() -> None:
    """The process's peak while a prompt of that length is read, and not the weights alone."""
    asked = 0.026
    before = settled()
    with moelab.load("lab", budget_gb=asked, context=200) as lab:
        assert lab.capacity < 64
        peaks = []
        for _ in range(2):
            settled()
            mx.reset_peak_memory()
            lab.generate(tiny.prompt(196, vocab=4000), 4)
            peaks.append(mx.get_peak_memory() - before)
        assert min(peaks) <= asked * 1e9 * (1 + TOLERANCE)
        assert min(peaks) >= asked * 1e9 * 0.85, "the estimate of prefill is not a waste"
    with pytest.raises(CapacityError, match="200 tokens"):
        moelab.load("lab", budget_gb=0.015, context=200)
    with moelab.load("lab", budget_gb=0.015) as lab:
        assert "on top of the budget" in repr(lab.budget)


def test_a_budget_counts_what_is_converted_to_float32() -> None:
    path = stock.folder("olmoe", "none", dtype="bfloat16")
    before = settled()
    asked = 0.9e6
    with moelab.load(path, budget_gb=asked / 1e9, dtype="float32") as lab:
        assert lab.budget is not None and lab.capacity < 16
        near = max(TOLERANCE * asked, *lab.budget.need.experts)
        assert asked - near <= lab.memory().total == lab.budget.weights <= asked
        assert settled() - before == pytest.approx(asked, abs=near)


def test_more_than_the_model_needs() -> None:
    with moelab.load(stock.folder("olmoe"), budget_gb=1) as lab:
        assert lab.capacity == 16 and lab.budget is not None
        assert "all of them" in repr(lab.budget) and lab.budget.left > 0


sites_and_bytes = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 8), st.integers(1, 50)), min_size=1, max_size=6
)


@given(layers=sites_and_bytes, room=st.integers(1, 2000), trunk=st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_budgets_fill_up(layers: list[tuple[int, int, int]], room: int, trunk: int) -> None:
    """Against a plain reference: levels from below, then one more for the first layers."""
    sites: Any = [Site(i, k + more, k) for i, (k, more, _) in enumerate(layers)]
    each = tuple(n for _, _, n in layers)

    def cost(slots: list[int]) -> int:
        return sum(c * n for c, n in zip(slots, each, strict=True))

    best = None
    for level in range(14):
        slots = [min(max(s.top_k, level), s.experts) for s in sites]
        if cost(slots) + trunk <= room:
            best = slots, level
    found = within(room / 1e9, sites, Need(trunk, each, NOTHING), whole=True)

    if best is None:
        assert not any(found.capacities) and found.left < 0
        return
    slots, level = best

    left = room - trunk - cost(slots)
    for i, site in enumerate(sites):
        if slots[i] == level < site.experts and each[i] <= left:
            slots[i] += 1
            left -= each[i]
    assert list(found.capacities) == slots
    assert found.left == left >= 0
    assert sum(row.nbytes for row in found.rows) == found.left


def test_automatic_is_a_sum() -> None:
    path = stock.folder("qwen2_moe")
    model = stock.stock(path)[0]
    sites = find_switches(model, "qwen2_moe")
    need = needs(model, sites, {}, context=500, extra_bytes=5_000)
    one = sum(need.experts)
    memory = int((need.trunk + 5_000 + need.footprint.cache + need.footprint.prefill + 6.5 * one)
                 / (1 - budget_module.MARGIN))  # fmt: skip
    found = automatic(Memory(memory, "here"), sites, need)
    assert set(found.capacities) == {6}
    rows = {row.name: row.nbytes for row in found.rows}
    assert rows["there is"] == memory and rows["trunk"] == -need.trunk
    assert rows["copies"] == -5_000
    assert rows["cache"] == -need.footprint.cache and rows["prefill"] == -need.footprint.prefill
    assert rows["resident experts"] == -6 * one
    assert found.left == sum(rows.values()) == pytest.approx(0.5 * one, abs=2)
    for text in (repr(found), found._repr_html_()):
        for word in ("here", "margin", "500 tokens", "6 of 16", "left", "copies"):
            assert word in text


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"budget_gb": 0}, ("positive number of GB", "got 0")),
        ({"budget_gb": -3}, ("got -3",)),
        ({"budget_gb": math.nan}, ("got nan",)),
        ({"budget_gb": math.inf}, ("got inf",)),
        ({"budget_gb": "8"}, ("got '8'",)),
        ({"budget_gb": True}, ("got True",)),
        ({"budget_gb": 1e-6}, ("too little memory", "your budget: 1.00 kB", "trunk", "left")),
        ({"budget_gb": 1, "capacity": 8}, ("capacity=8 and budget_gb=1", "one of them")),
        ({"budget_gb": 1, "capacity": 0.5}, ("capacity=0.5 and budget_gb=1",)),
        ({"capacity": 8, "context": 100}, ("capacity=8 they would do nothing",)),
        ({"capacity": 8, "kv_bits": 8}, ("would do nothing", "give kv_bits to lab.generate")),
        ({"budget_gb": 1, "context": -1}, ("context must be a positive",)),
        ({"budget_gb": 1, "context": 10, "kv_bits": 5}, ("kv_bits must be 8, 4 or None",)),
        ({"capacity": [4]}, ("has 1 numbers and the model has 2 MoE layers (0, 1)", "got [4]")),
        ({"capacity": [4, 4, 4]}, ("has 3 numbers",)),
        ({"capacity": []}, ("has 0 numbers",)),
        ({"capacity": [4, 1]}, ("capacity 1 is 1 experts in layer 1", "between 2")),
        ({"capacity": [4, 17]}, ("17 experts in layer 1",)),
        ({"capacity": [4, 4.0]}, ("layer 1 must be an int", "got 4.0")),
        ({"capacity": [True, 4]}, ("layer 0 must be an int", "got True")),
        ({"capacity": {0: 4}}, ("leaves out 1", "MoE layers 0, 1")),
        ({"capacity": {0: 4, 1: 4, 7: 4}}, ("names layers 7 that have no routed experts",)),
        ({"capacity": {"0": 4, "1": 4}}, ("names layers 0, 1", "leaves out 0, 1")),
    ],
    ids=repr,
)
def test_refused(options: dict[str, Any], texts: tuple[str, ...]) -> None:
    with pytest.raises(CapacityError) as caught:
        moelab.load(stock.folder("olmoe"), **options)
    for text in texts:
        assert text in str(caught.value)


# -- by layer ----------------------------------------------------------------------------------


def test_capacity_by_layer_is_exact() -> None:
    path = stock.folder("qwen3_moe")  # layer 1 is dense
    tokens = mx.array([tiny.prompt(30)])
    want = stock.stock(path)[0](tokens)
    given_ways: list[Any] = [[3, 16], (3, 16), {0: 3, 2: 16}, {2: 16, 0: 3}]
    for capacity in given_ways:
        with moelab.load(path, capacity) as lab:
            assert lab.capacities == [3, 16] and list(lab.attachment.switches) == [0]
            tally = stock.Tally(lab, slot_bytes=True)
            assert stock.equal(lab.model(tokens), want)
            assert tally.sweeps and tally.evictions
            assert lab.budget is None


def frame(counts: dict[int, list[int]]) -> pd.DataFrame:
    rows = [(layer, e, n) for layer, values in counts.items() for e, n in enumerate(values)]
    return pd.DataFrame(rows, columns=["layer", "expert", "count"])


small = st.integers(1, 4).flatmap(
    lambda layers: st.lists(
        st.lists(st.integers(0, 9), min_size=2, max_size=5), min_size=layers, max_size=layers
    )
)


@given(counts=small, data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_spread_has_more_static_hits(counts: list[list[int]], data: st.DataObject) -> None:
    """Brute force over every spread: the sum of the most used residents' counts is the best."""
    top_k = data.draw(st.integers(1, 2))
    total = data.draw(st.integers(top_k * len(counts), sum(map(len, counts))))
    by_layer = {3 * i: values for i, values in enumerate(counts)}

    def hits(slots: tuple[int, ...]) -> int:
        return sum(sum(sorted(v)[::-1][:c]) for v, c in zip(counts, slots, strict=True))

    best = max(
        hits(slots)
        for slots in itertools.product(*(range(top_k, len(v) + 1) for v in counts))
        if sum(slots) == total
    )
    found = moelab.spread_capacity(frame(by_layer), total, top_k=top_k)
    assert list(found) == list(by_layer) and sum(found.values()) == total
    assert all(top_k <= c <= len(by_layer[layer]) for layer, c in found.items())
    assert hits(tuple(found.values())) == best
    json.dumps(found)


def test_equal_use_is_spread_evenly() -> None:
    found = moelab.spread_capacity(frame({i: [5] * 8 for i in range(4)}), 18, top_k=2)
    assert found == {0: 5, 1: 5, 2: 4, 3: 4}


def test_rows_of_domains_and_phases_add_up() -> None:
    one, two = frame({0: [9, 0, 0, 0], 1: [3, 3, 3, 0]}), frame({0: [1, 0, 0, 0], 1: [0, 0, 0, 4]})
    found = moelab.spread_capacity(pd.concat([one, two]), 5, top_k=1)
    assert found == moelab.spread_capacity(frame({0: [10, 0, 0, 0], 1: [3, 3, 3, 4]}), 5, top_k=1)
    assert found == {0: 1, 1: 4}


def test_a_spread_is_taken_as_capacity() -> None:
    class Profile:
        """What `moelab.profile` gives, as far as a spread needs it."""

        usage = frame({0: [9] + [0] * 15, 1: list(range(16))})
        top_k = {0: 2, 1: 2}  # noqa: RUF012

    spread = moelab.spread_capacity(Profile(), 12)
    assert spread == {0: 2, 1: 10}
    with moelab.load(stock.folder("olmoe"), spread) as lab:
        assert lab.capacities == [2, 10]


def test_a_spread_pays_where_layers_differ() -> None:
    """Layer 0 goes back and forth between 4 experts, layer 1 uses all 16: held-out hits, LRU."""
    rng = np.random.default_rng(0)

    def text() -> np.ndarray:
        few = rng.permuted(np.tile(np.arange(4), (80, 1)), axis=1)[:, :2]
        many = rng.permuted(np.tile(np.arange(16), (80, 1)), axis=1)[:, :2]
        return np.stack([few, many], axis=1)

    spread, rates = spread_figure.compare([text()], [text() for _ in range(5)], 8, 16, 2)
    assert spread == {0: 4, 1: 12}
    for uniform, ours in (rates[:2], rates[2:]):
        assert (ours > uniform + 0.05).all()


@pytest.mark.parametrize(
    ("usage", "total", "options", "text"),
    [
        (frame({0: [1, 2, 3]}), 4, {"top_k": 1}, "between 1 .* and 3 .*got 4"),
        (frame({0: [1, 2, 3]}), 1, {"top_k": 2}, "between 2 .*got 1"),
        (frame({0: [1, 2, 3]}), 2.0, {"top_k": 2}, "got 2.0"),
        (frame({0: [1, 2, 3]}), True, {"top_k": 1}, "got True"),
        (frame({0: [1, 2, 3]}), 2, {}, "Give top_k"),
        (frame({0: [1, 2, 3]}), 2, {"top_k": 4}, "between 1 and its 3 experts, got 4"),
        (frame({0: [1, 2, 3]}), 2, {"top_k": {1: 1}}, "got None"),
        (frame({0: [1, -2, 3]}), 2, {"top_k": 1}, "negative"),
        (frame({0: [1, 2]}).assign(count=[1, np.nan]), 2, {"top_k": 1}, "no numbers"),
        (frame({0: [1, 2]})[["layer", "count"]], 2, {"top_k": 1}, "columns layer, expert"),
        (frame({0: [1, 2]})[["layer", "expert"]], 2, {"top_k": 1}, "neither count nor share"),
        ([1, 2], 2, {"top_k": 1}, "got list"),
    ],
)
def test_bad_spreads(usage: Any, total: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(CapacityError, match=text):
        moelab.spread_capacity(usage, total, **options)


def test_resolving_asks_for_memory_only_where_it_counts() -> None:
    def need() -> Need:
        raise AssertionError("not asked for")

    sites: Any = [Site(0, 8, 2), Site(4, 8, 2)]
    for capacity in (4, 0.5, [4, 4], {0: 4, 4: 4}):
        found = resolve_capacity(capacity, sites, need)
        assert found.capacities == [4, 4] and found.budget is None


def test_the_budget_holds_no_arrays(lab_path: Path) -> None:
    with moelab.load("lab", budget_gb=0.01) as lab:
        budget = lab.budget
    before = settled()
    del lab
    assert settled() < before, "what is kept is numbers"
    assert budget is not None and "left" in repr(budget)
