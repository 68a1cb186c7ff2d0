"""`lab.resize`: another capacity, up and down, with the model still the same."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import moelab
from moelab.errors import CapacityError, MoelabError, PinsError
from moelab.lab import Lab
from tests.support import stock, tiny
from tests.test_interrupts import stop_at

TOKENS = mx.array([tiny.prompt(40)])


def residents(lab: Lab) -> dict[int, set[int]]:
    return {b.layer: set(b.residency.slot_of) for b in lab.attachment.bank.layers}


def right(lab: Lab, path: Path) -> bool:
    model, _ = stock.stock(path)
    good = stock.equal(lab.model(TOKENS), model(TOKENS))
    for layer in lab.attachment.bank.layers:
        layer.mend()
        stock.check_slots(layer)
        stock.check_slot_bytes(layer)
    return good


@pytest.mark.parametrize("layout", [{}, {"layout": "per_expert", "shards": 2}], ids=str)
@pytest.mark.parametrize("policy", ["lru", "lfru", "s3_fifo", "static"])
def test_up_and_down(policy: str, layout: dict[str, Any]) -> None:
    path = stock.folder("olmoe", **layout)
    with moelab.load(path, 8, policy=policy, pins=[3]) as lab:
        assert right(lab, path)
        for before, after in pairwise([8, 4, 12, 16, 5, 16, 16, 3, 15]):
            was = residents(lab)
            full = lab.memory().total + (16 - before) * lab.memory().slots // max(before, 1)
            lab.resize(after)
            assert lab.capacities == [after] * 2
            assert len(lab.attachment.switches) == (0 if after == 16 else 2)
            now = residents(lab)
            if 16 not in (before, after):
                for layer, kept in now.items():
                    assert kept <= was[layer] and 3 in kept
                    most = after - 2 * (policy == "static")
                    assert len(kept) == min(len(was[layer]), most)
            if 16 not in (before, after):
                a, b = lab.memory().slots, lab.memory().trunk
                assert a + b + (16 - after) * a // after == full
            assert right(lab, path), (before, after)


def test_what_the_policy_holds_most_worth_keeping_stays() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 8) as lab:
        lab.generate(tiny.prompt(20), 6)
        wanted = {b.layer: set(b.residency.ranking()[-3:]) for b in lab.attachment.bank.layers}
        lab.resize(3)
        assert residents(lab) == wanted


def test_memory_is_given_back() -> None:
    with moelab.load("lab", 1.0) as lab:
        prompt = "def main():"
        answer = lab.generate(prompt, 8, temperature=0)
        whole = mx.get_active_memory()
        lab.resize(8)
        little = mx.get_active_memory()
        assert lab.memory().resident_experts == 0
        assert whole - little == pytest.approx(8 * 56 * lab.memory().slots / 64, rel=0.03)
        assert lab.generate(prompt, 8, temperature=0) == answer
        lab.resize(1.0)
        assert mx.get_active_memory() == pytest.approx(whole, rel=0.03)
        assert lab.generate(prompt, 8, temperature=0) == answer


@pytest.mark.parametrize("action", ["drop", "substitute", "low_bit"])
def test_a_lossy_lab(action: str) -> None:
    """It goes on with the same action, full, as one that was loaded at that capacity."""
    path = stock.folder("qwen3_next")
    with moelab.load(path, 8, on_miss=action) as lab:
        mx.eval(lab.model(TOKENS))
        for capacity in (20, 6, 32, 9):
            lab.resize(capacity)
            assert lab.on_miss == action
            assert all(len(r) == capacity for r in residents(lab).values())
            lab.reset()
            with moelab.load(path, capacity, on_miss=action) as fresh:
                assert stock.equal(lab.model(TOKENS), fresh.model(TOKENS)), capacity
                assert lab.memory() == fresh.memory()


def test_widened() -> None:
    path = stock.folder("olmoe", "none", dtype="bfloat16")
    with moelab.load(path, 16, dtype="float32") as lab:
        want = lab.model(TOKENS)
        for capacity in (4, 16, 8):
            lab.resize(capacity)
            assert stock.equal(lab.model(TOKENS), want)


def test_by_layer_and_recorded() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 16) as lab:
        for capacities in ([4, 16], [16, 6], [5, 7]):
            lab.resize(capacities)
            assert lab.capacities == capacities
            assert right(lab, path)
            with lab.record() as rec:
                lab.generate(tiny.prompt(5), 3)
            assert rec.run["capacity"] == capacities
            assert set(rec.routing["layer"]) == {0, 1}


def test_an_interrupt_at_any_line() -> None:
    path = stock.folder("olmoe", "none")
    with moelab.load(path, 8) as lab:
        for moment in range(1, 1500, 41):
            for capacity in (4, 16, 9):
                stop_at(moment, ("experts",), lambda c=capacity: lab.resize(c))  # type: ignore[misc]
                assert right(lab, path), (moment, capacity)
                lab.resize(capacity)
                assert right(lab, path) and lab.capacities == [capacity] * 2


def test_refused() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 8, pins=[1, 2, 3]) as lab:
        for bad in (1, 17, 0.0, True, "auto", None, [4], {0: 4}):
            with pytest.raises(CapacityError):
                lab.resize(bad)  # type: ignore[arg-type]
        with pytest.raises(PinsError):
            lab.resize(4)
        with lab.record(), pytest.raises(MoelabError, match="recorded"):
            lab.resize(9)
        assert lab.capacities == [8, 8] and right(lab, path)
