"""Eviction by expected price, against a brute-force twin, and how it is judged."""

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
from moelab.errors import PolicyError, StudyError
from moelab.experts.policies import LFRU, make_policy
from moelab.experts.residency import Residency
from moelab.study.price_model import fit_prices
from moelab.study.price_policy import (
    RECORDED,
    PricePolicy,
    compare_policies,
    judge_policies,
    price_by_expert,
)
from moelab.study.price_results import Prices
from tests.support import tiny
from tests.test_misses import folder
from tests.test_prices import LINE, made


class Brute:
    """Counts, last uses and prices in dictionaries; the lowest value leaves, then the lowest id."""

    def __init__(self, price: list[float], reuse: str, power: float) -> None:
        self.price, self.reuse, self.power = price, reuse, power
        self.uses: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.now = 0

    def use(self, experts: list[int]) -> None:
        self.now += 1
        for e in experts:
            self.uses[e] = self.uses.get(e, 0) + 1
            self.last[e] = self.now

    def worth(self, e: int) -> float:
        chance = (self.uses[e] if self.reuse == "lfru" else 1) / (self.now - self.last[e] + 1)
        return self.price[e] ** self.power * chance

    def leaving(self, residents: set[int], kept: set[int], count: int) -> list[int]:
        order = sorted(residents - kept, key=lambda e: (self.worth(e), e))
        return order[:count]


def play(policy: Any, events: list[list[int]], capacity: int) -> list[tuple[int, int | None]]:
    bank = Residency(capacity, policy)
    found = []
    for needed in events:
        misses = bank.begin(needed)
        for load in bank.admit(needed, misses):
            bank.arrived(load)
            found.append((load.expert, load.evicted))
        bank.end()
    return found


def brute(twin: Brute, events: list[list[int]], capacity: int) -> list[tuple[int, set[int]]]:
    residents: set[int] = set()
    found = []
    for needed in events:
        twin.use(needed)
        misses = [e for e in needed if e not in residents]
        short = len(residents) + len(misses) - capacity
        out = twin.leaving(residents, set(needed), max(short, 0))
        residents = (residents - set(out)) | set(misses)
        found.append((len(misses), set(out)))
    return found


events_of = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True).map(sorted),
    min_size=5, max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    events=events_of,
    # Powers of two, so that equal values are equal floats.
    price=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0]), min_size=10, max_size=10),
    reuse=st.sampled_from(["lfru", "lru"]),
    power=st.sampled_from([1.0, 2.0]),
)
def test_equals_brute_force(
    events: list[list[int]], price: list[float], reuse: Any, power: float
) -> None:
    policy = PricePolicy({3: price, 4: price[::-1]}, reuse, power)
    policy.placed(3)
    twin = Brute(price, reuse, power)
    played = play(policy, events, 5)
    at = 0
    for (missed, out), needed in zip(brute(twin, events, 5), events, strict=True):
        part = played[at : at + missed]
        at += missed
        assert {e for e, _ in part} <= set(needed)
        assert {evicted for _, evicted in part if evicted is not None} == out


@settings(max_examples=40, deadline=None)
@given(events=events_of)
def test_with_equal_prices_it_is_lfru(events: list[list[int]]) -> None:
    policy = PricePolicy({0: [3.0] * 10})
    policy.placed(0)
    assert play(policy, events, 4) == play(LFRU(), events, 4)
    free = PricePolicy({0: np.arange(1, 11)}, power=0.0)
    free.placed(0)
    assert play(free, events, 4) == play(LFRU(), events, 4)


def test_the_cheap_one_leaves() -> None:
    events = [[0], [0], [1], [2]]
    for price, leaves in (([1.0, 1, 1], 1), ([1.0, 9, 1], 0)):
        policy = PricePolicy({7: price})
        policy.placed(7)
        assert play(policy, events, 2)[-1] == (2, leaves)


def test_each_layer_has_its_own_prices_live_and_replayed() -> None:
    experts, _ = tiny.experts("olmoe")
    random = np.random.default_rng(0)
    layers = tiny.moe_layers("olmoe")
    table = {layer: random.lognormal(0, 2, experts) for layer in layers}
    tokens = tiny.prompt(60)
    with moelab.load(folder("olmoe"), 6, policy=PricePolicy(table)) as lab:
        assert lab.policy == "price_lfru"
        with lab.record() as rec:
            cache = make_prompt_cache(lab.model)
            for token in tokens:
                mx.eval(lab.model(mx.array([[token]]), cache=cache))
        for layer in lab.attachment.bank.layers:
            policy: Any = layer.residency.policy
            ratio = policy._price / table[layer.layer]
            np.testing.assert_allclose(ratio, ratio[0])
        replayed = moelab.replay(rec, PricePolicy(table))
        live = rec.loads[["layer", "expert"]].reset_index(drop=True)
        told = replayed.loads[["layer", "expert"]].reset_index(drop=True)
        pd.testing.assert_frame_equal(live, told, check_dtype=False)
        plain = moelab.replay(rec, "lfru").loads[["layer", "expert"]]
        assert len(plain) != len(told) or not plain.equals(told)
        # It goes on after a change of capacity, and under a lossy action.
        lab.resize(7)
        lab.on_miss = "drop"
        mx.eval(lab.model(mx.array([tokens])), lab.model(mx.array([tokens[:1]])))
        assert all(b.residency.policy.name == "price_lfru" for b in lab.attachment.bank.layers)


def test_bad_policies() -> None:
    for prices, told in (
        ({}, "has none"),
        ({0: [1.0, 0.0]}, "layer 0"),
        ({0: [1.0, np.nan]}, "layer 0"),
    ):
        with pytest.raises(PolicyError, match=told):
            PricePolicy(prices)
    with pytest.raises(PolicyError, match="'lfru' or 'lru'"):
        PricePolicy({0: [1.0]}, reuse="fifo")  # type: ignore[arg-type]
    policy = make_policy(PricePolicy({0: [1.0, 1.0]}))()
    policy.used([0])
    policy.admitted([0])
    with pytest.raises(PolicyError, match="told its layer"):
        policy.evict(1, {0}, ())
    with pytest.raises(PolicyError, match="none of 5"):
        PricePolicy({0: [1.0]}).placed(5)
    with pytest.raises(PolicyError, match="none of"):
        moelab.load(folder("olmoe"), 6, policy=PricePolicy({99: [1.0]}))


def test_price_by_expert_equals_its_definition() -> None:
    frame = made(0).assign(layer=0, depth=0.0)
    frame.loc[::2, ["layer", "depth"]] = 1, 0.5
    prices = Prices(frame, pd.DataFrame(), {})
    random = np.random.default_rng(1)
    routing = pd.DataFrame(
        {
            "layer": np.repeat([0, 1], 50), "expert": random.integers(0, 5, 100),
            "rank": random.integers(0, 2, 100), "weight": random.uniform(0, 1, 100),
        }
    )  # fmt: skip
    table = price_by_expert(prices, routing, "drop", experts={0: 7, 1: 8})
    assert {layer: len(values) for layer, values in table.items()} == {0: 7, 1: 8}
    model = fit_prices(frame, action="drop", predictors=RECORDED, resamples=2)
    for layer, values in table.items():
        mine = routing[routing["layer"] == layer].assign(depth=layer * 0.5)
        means = [model.expected(mine[mine["expert"] == e]).mean() for e in range(5)]
        np.testing.assert_allclose(values[:5], means)
        np.testing.assert_allclose(values[5:], np.mean(means))
    with pytest.raises(StudyError, match="margin"):
        price_by_expert(prices, routing, "drop", predictors=["margin"])
    with pytest.raises(StudyError, match=r"layers \[4\]"):
        price_by_expert(prices, routing.assign(layer=4), "drop")


def rows(gain: float, documents: int = 24, noise: float = 0.01) -> pd.DataFrame:
    """A sweep's rows in which the price policy's KL is lower by `gain`, document by document."""
    random = np.random.default_rng(0)
    parts = []
    level = random.lognormal(-2, 0.5, documents)
    for policy, less in (("price_lfru", gain), ("lru", 0.0), ("lfru", 0.0)):
        kl = np.maximum(level - less + random.normal(0, noise, documents), 0)
        parts.append(
            pd.DataFrame(
                {
                    "on_miss": "drop", "capacity": 8, "policy": policy,
                    "domain": ["x", "y"] * (documents // 2),
                    "prompt": [f"p{i}" for i in range(documents)], "tokens": 40,
                    "bytes": 1000, "kl_mean": kl,
                }
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.03, "better"), (-0.03, "worse"), (0.0, "not told apart")]
)
def test_judgement(gain: float, verdict: str) -> None:
    found = judge_policies(rows(gain), {"drop": "price_lfru"}, ["lru", "lfru"])
    assert found["verdict"].tolist() == [verdict] * 2
    assert found["gain"].to_numpy() == pytest.approx(gain, abs=0.01)
    assert (found["low"] < found["gain"]).all() and (found["gain"] < found["high"]).all()
    assert found["gain"].to_numpy() == pytest.approx(
        (found["kl_baseline"] - found["kl_price"]).to_numpy()
    )


def test_unequal_bytes_are_refused() -> None:
    frame = rows(0.1)
    frame.loc[frame["policy"] == "lru", "bytes"] = 999
    with pytest.raises(StudyError, match="same bytes"):
        judge_policies(frame, {"drop": "price_lfru"}, ["lru"])
    with pytest.raises(StudyError, match="same documents"):
        judge_policies(frame.iloc[1:], {"drop": "price_lfru"}, ["lfru"])


def test_compare_policies() -> None:
    experts, _ = tiny.experts("olmoe")
    random = np.random.default_rng(0)
    table = {layer: random.lognormal(0, 1, experts) for layer in tiny.moe_layers("olmoe")}

    def texts(start: int) -> list[dict[str, str]]:
        return [
            {"text": LINE.format(i, 7 * i) * 2, "domain": "ab"[i % 2], "id": f"text-{i}"}
            for i in range(start, start + 4)
        ]

    options: dict[str, Any] = {"prefix": 8, "tokens": 6, "progress": False}
    with moelab.load(folder("olmoe"), 6) as lab:
        found = compare_policies(
            lab, {"drop": table}, [6], selection=texts(0), test=texts(4), **options
        )
        with pytest.raises(StudyError, match="in both splits"):
            compare_policies(
                lab, {"drop": table}, [6], selection=texts(0), test=texts(3), **options
            )
        with pytest.raises(StudyError, match="tables is empty"):
            compare_policies(lab, {}, [6])
    told = found.selection
    assert set(told["policy"]) == {"price_lfru", "price_lfru^0.5", "price_lru", "lru", "lfru"}
    ours = told[told["policy"].str.startswith("price")]
    assert found.chosen["drop"] == ours.loc[ours["kl_mean"].idxmin(), "policy"]
    assert set(found.frame["policy"]) == {found.chosen["drop"], "lru", "lfru"}
    assert set(found.frame["prompt"]) == {f"text-{i}" for i in range(4, 8)}
    assert found.summary["baseline"].tolist() == ["lru", "lfru"]
    assert found.statement.startswith("Eviction by expected price")
    assert ("does not win" in found.statement) == (not found.wins)
    assert "drop, 6, lru" in repr(found) and "<table>" in found._repr_html_()
