"""Hits, misses, loads and the three miss figures, against brute force written from the rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlx_lm.generate import batch_generate

import moelab
from moelab.lab import Lab
from moelab.routing.metrics import expert_shares, miss_rates
from moelab.routing.recording import Recording
from tests.support import stock, tiny

EVENT = ["run", "step"]


class BruteLRU:
    """A bank of C slots, from DESIGN's rules: one step at one layer is one event."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.resident: set[int] = set()
        self.used: dict[int, tuple[int, int]] = {}
        self.events = 0

    def event(self, ids: set[int]) -> tuple[set[int], set[int]]:
        """Serves one event; returns the hits and what was loaded."""
        hits = ids & self.resident
        misses = sorted(ids - self.resident)
        self.events += 1
        for e in ids:  # renewed once an event; of one event's, the lowest id is the oldest
            self.used[e] = (self.events, e)
        if len(ids) <= self.capacity:
            for e in misses:
                if len(self.resident) == self.capacity:
                    self.resident.remove(min(self.resident - ids, key=self.used.__getitem__))
                self.resident.add(e)
            return hits, set(misses)
        # Swept: hits first, with the misses that fit beside them; then the others, each once.
        # Whoever was served may leave, and whoever is in the slots at the end stays.
        stay = hits | set(misses[: self.capacity - len(hits)])
        waiting = misses[self.capacity - len(hits) :]
        self.resident = stay
        while waiting:
            now, waiting = waiting[: self.capacity], waiting[self.capacity :]
            leave = sorted(self.resident, key=self.used.__getitem__)[: len(now)]
            self.resident = self.resident - set(leave) | set(now)
        return hits, set(misses)


def replay(rec: Recording, capacities: dict[int, int]) -> int:
    """Checks `hit` and `loads` against the brute-force bank; returns how many events it swept."""
    swept = 0
    routing = rec.routing.reset_index(names="row")
    # The order of events: as rows appear, a step at a time.
    routing["event"] = routing.groupby(EVENT, sort=False).ngroup()
    loads = rec.loads.groupby([*EVENT, "layer"])["expert"].agg(list).to_dict()
    for layer, capacity in capacities.items():
        bank = BruteLRU(capacity)
        rows = routing[routing["layer"] == layer]
        for _, event in rows.groupby("event"):
            ids = set(event["expert"])
            hits, loaded = bank.event(ids)
            assert event["hit"].tolist() == [e in hits for e in event["expert"]]
            key = (*event[EVENT].iloc[0], layer)
            assert sorted(loads.pop(key, [])) == sorted(loaded), "each miss is read once"
            swept += len(ids) > bank.capacity
    assert not loads, "loads that nobody asked for"
    return swept


def record(lab: Lab, **options: Any) -> Recording:
    lab.reset()
    with lab.record(**options) as rec:
        lab.generate(tiny.prompt(40), 30, template=False, prefill_step_size=24)
        batch_generate(
            lab.model, lab.tokenizer, [tiny.prompt(9, 1), tiny.prompt(3, 2)], max_tokens=5
        )
        lab.generate(tiny.prompt(11, seed=4), 8, template=False, prefill_step_size=4)
    return rec


@pytest.fixture(scope="module")
def recording() -> Recording:
    with moelab.load(stock.folder("qwen3_next"), 8) as lab:
        return record(lab)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hits_and_loads_are_an_lrus(family: str) -> None:
    swept = evicted = 0
    for capacity in tiny.capacities(family)[:-1]:
        with moelab.load(stock.folder(family), capacity) as lab:
            rec = record(lab)
            sizes = {layer.layer: layer.loader.expert_disk_bytes
                     for layer in lab.attachment.bank.layers}  # fmt: skip
        swept += replay(rec, dict.fromkeys(tiny.moe_layers(family), capacity))
        evicted += len(rec.loads) - capacity * len(sizes)
        books(rec, tiny.experts(family)[1], sizes)
    assert swept and evicted > 0, "neither sweeps nor evictions: this tests nothing"


def books(rec: Recording, top_k: int, sizes: dict[int, int]) -> None:
    """Every routed slot, load and byte is accounted for, by phase."""
    tokens, routing, loads = rec.tokens, rec.routing, rec.loads
    assert len(routing) == len(tokens) * top_k * len(sizes)
    for phase, rows in tokens.groupby("phase", observed=True):
        slots = routing[routing["phase"] == phase]
        assert rows["hits"].sum() == slots["hit"].sum()
        assert rows["misses"].sum() == (~slots["hit"]).sum()
        assert rows["hits"].sum() + rows["misses"].sum() == len(rows) * top_k * len(sizes)
    assert (loads["bytes"] == loads["layer"].map(sizes)).all()
    assert (loads["seconds"] > 0).all()
    # A token's bytes are those of the loads that it was first, in its step, to ask for.
    missed = routing[~routing["hit"]].sort_values(["run", "step"], kind="stable")
    first = missed.drop_duplicates([*EVENT, "layer", "expert"])
    keys = ["run", "sequence", "step", "position"]
    expected = first.assign(bytes=first["layer"].map(sizes)).groupby(keys)["bytes"].sum()
    read = tokens.set_index(keys)["bytes_read"]
    assert read[read > 0].sort_index().to_dict() == expected.sort_index().to_dict()
    assert Counter(zip(*(first[k] for k in [*keys, "layer", "expert"]), strict=True)) == Counter(
        zip(*(loads[k] for k in [*keys, "layer", "expert"]), strict=True)
    )


def test_all_resident() -> None:
    """Capacity E: everything hits and nothing is read; the rest of the record is the same."""
    with moelab.load(stock.folder("qwen3_next"), 1.0) as lab:
        full = record(lab)
    with moelab.load(stock.folder("qwen3_next"), 8) as lab:
        part = record(lab)
    assert full.routing["hit"].all() and full.loads.empty
    assert full.tokens["misses"].eq(0).all() and full.tokens["bytes_read"].eq(0).all()
    assert full.tokens["seconds"].isna().all()
    for name in ("routing", "tokens"):
        other = {"hit", "outcome", "hits", "misses", "bytes_read", "seconds"}
        same = [column for column in getattr(full, name).columns if column not in other]
        pd.testing.assert_frame_equal(getattr(full, name)[same], getattr(part, name)[same])


def test_layers_of_different_sizes() -> None:
    """A layer that is stock beside layers that are not, and a top-k of each layer's own."""
    with moelab.load(stock.folder("qwen2_moe"), 4) as lab:
        # Layer 1 chooses three; layer 2 is left stock.
        lab.model.layers[1].mlp.top_k = 3
        lab.sites[1] = replace(lab.sites[1], top_k=3)
        last = lab.sites[2]
        del lab.attachment.switches[last.layer]
        last.parent[last.key] = stock.stock(lab.path)[0].layers[2].mlp.switch_mlp
        lab.sites[2] = replace(last, switch=last.parent[last.key])
        rec = record(lab)
    sizes = rec.routing.groupby("layer").size() / len(rec.tokens)
    assert sizes.to_dict() == {0: 2, 1: 3, 2: 2}
    assert rec.routing.groupby("layer")["rank"].max().to_dict() == {0: 1, 1: 2, 2: 1}
    assert rec.routing[rec.routing["layer"] == 2]["hit"].all()
    replay(rec, {0: 4, 1: 4})
    ordered = rec.routing.groupby(["run", "sequence", "step", "position", "layer"])["weight"]
    assert ordered.is_monotonic_decreasing.all()


def by_hand(rec: Recording, keep: np.ndarray) -> dict[str, float]:
    """The three miss figures of some rows, in plain numpy."""
    run, step, layer, expert, weight, hit = (
        rec.routing[c].to_numpy()[keep] for c in ("run", "step", "layer", "expert", "weight", "hit")
    )
    distinct = {*zip(run.tolist(), step.tolist(), layer.tolist(), expert.tolist(), strict=True)}
    missed = {*zip(*(a[~hit].tolist() for a in (run, step, layer, expert)), strict=True)}
    mass = weight.astype(np.float64)
    return {
        "routed": len(hit),
        "hits": int(hit.sum()),
        "misses": int((~hit).sum()),
        "slots": 1 - hit.mean(),
        "distinct": len(missed) / len(distinct),
        "mass": mass[~hit].sum() / mass.sum(),
    }


@pytest.mark.parametrize(
    "by", [None, [], "layer", "phase", ["phase", "layer"], ["run", "step"], ["layer", "expert"]]
)
def test_the_three_figures(recording: Recording, by: Any) -> None:
    routing = recording.routing
    found = recording.misses(by)
    keys = [by] if isinstance(by, str) else list(by or [])
    groups = {(): np.ones(len(routing), bool)}
    if keys:
        labels = [tuple(row) for row in routing[keys].astype(object).to_numpy().tolist()]
        groups = {g: np.array([label == g for label in labels]) for g in dict.fromkeys(labels)}
    assert len(found) == len(groups)
    assert list(found.columns) == [*keys, "routed", "hits", "misses", "slots", "distinct", "mass"]
    assert not found["mass"].isna().any()
    for _, row in found.iterrows():
        expected = by_hand(recording, groups[tuple(row[k] for k in keys)])
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-9)
    assert found["routed"].sum() == len(routing)


def test_the_figures_differ(recording: Recording) -> None:
    """A rare expert weighs little: if the three agreed, one would do."""
    figures = recording.misses().iloc[0]
    assert len({round(figures[k], 6) for k in ("slots", "distinct", "mass")}) == 3


def test_figures_of_a_made_up_table() -> None:
    frame = pd.DataFrame(
        {
            "run": 0,
            "step": [0, 0, 0, 0, 1, 1],
            "layer": 3,
            "phase": ["prefill"] * 4 + ["decode"] * 2,
            "expert": [7, 2, 7, 5, 7, 1],
            "weight": [0.9, 0.1, 0.5, 0.5, 0.75, 0.25],
            "hit": [False, True, False, True, True, False],
        }
    )
    whole = miss_rates(frame).iloc[0]
    # 7 misses twice in step 0 and is one expert; with 1 in step 1, 2 of 5 distinct experts.
    assert (whole["routed"], whole["misses"]) == (6, 3)
    assert (whole["slots"], whole["distinct"]) == (0.5, 0.4)
    assert whole["mass"] == pytest.approx((0.9 + 0.5 + 0.25) / 3)
    decode = miss_rates(frame, "phase").set_index("phase").loc["decode"]
    assert (decode["slots"], decode["distinct"], decode["mass"]) == (0.5, 0.5, 0.25)
    shares = expert_shares(frame)
    assert shares.loc[3].tolist() == pytest.approx([0, 1 / 6, 1 / 6, 0, 0, 1 / 6, 0, 1 / 2])
    assert frame.columns.tolist()[-1] == "hit", "the caller's frame is left alone"


def test_figures_of_nothing() -> None:
    with moelab.load(stock.folder("mixtral"), 2) as lab, lab.record() as rec:
        pass
    assert rec.misses().empty and rec.misses("layer").empty and rec.expert_shares().empty


def test_expert_shares(recording: Recording) -> None:
    shares = recording.expert_shares()
    counts = np.zeros((4, 32))
    for layer, expert in zip(recording.routing["layer"], recording.routing["expert"], strict=True):
        counts[layer, expert] += 1
    width = int(np.flatnonzero(counts.any(axis=0)).max()) + 1
    np.testing.assert_allclose(shares, (counts / counts.sum(axis=1, keepdims=True))[:, :width])
