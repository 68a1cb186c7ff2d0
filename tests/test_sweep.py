"""A sweep that reads while it computes: the same loads, the same residents, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import moelab
from moelab.experts import switch as switch_module
from moelab.experts.bank import LayerBank
from moelab.experts.residency import Load
from moelab.lab import Lab
from tests.support import stock, tiny

LENGTHS = (40, 25, 1, 3, 60)

Split = Callable[[Sequence[Load]], list[Sequence[Load]]]


def whole(loads: Sequence[Load]) -> list[Sequence[Load]]:
    """A round that is read as a whole."""
    return [loads]


def run(lab: Lab) -> tuple[list[mx.array], stock.Tally]:
    tally = stock.Tally(lab, slot_bytes=True)
    outputs = [lab.model(mx.array([tiny.prompt(n, seed=n)])) for n in LENGTHS]
    mx.eval(outputs)
    return outputs, tally


def history(tally: stock.Tally) -> list[tuple[list[Load], frozenset[int] | None]]:
    """What each event loaded, in order and without its rounds, and who was there after it."""
    return [([load for loads in e.rounds for load in loads], e.after) for e in tally.events]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("share", [0, 1])
def test_halves_change_nothing(family: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder(family)
    capacity = tiny.capacities(family)[share]
    model, _ = stock.stock(path)
    seen = []
    for split in (whole, switch_module._halves):
        monkeypatch.setattr(switch_module, "_halves", split)
        with moelab.load(path, capacity) as lab:
            outputs, tally = run(lab)
        assert tally.sweeps and tally.evictions
        for n, y in zip(LENGTHS, outputs, strict=True):
            assert stock.equal(y, model(mx.array([tiny.prompt(n, seed=n)])))
        seen.append((history(tally), sum(len(e.rounds) for e in tally.events)))
    assert seen[0][0] == seen[1][0], "the same loads in the same order, the same residents"
    assert seen[1][1] > seen[0][1], "rounds were read in halves"


def test_halves() -> None:
    loads = [Load(e, e, None) for e in range(5)]
    assert switch_module._halves(loads) == [loads[:3], loads[3:]]
    assert switch_module._halves(loads[:2]) == [loads[:1], loads[1:2]]
    assert switch_module._halves(loads[:1]) == [loads[:1]]
    assert switch_module._halves([]) == [[]]


@pytest.mark.parametrize("split", [whole, switch_module._halves], ids=["whole", "halves"])
def test_a_slot_is_overwritten_only_after_what_used_it(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each read, whatever was computed from its slots in this sweep has been evaluated."""
    monkeypatch.setattr(switch_module, "_halves", split)
    evaluated: list[mx.array] = []
    evaluate, load = mx.eval, LayerBank.load
    users: list[tuple[LayerBank, set[int], mx.array]] = []
    checked = 0

    def watched_eval(*arrays: Any) -> None:
        evaluate(*arrays)
        evaluated.extend(a for group in arrays for a in (group if type(group) is list else [group]))

    def watched_load(layer: LayerBank, loads: Sequence[Load]) -> None:
        nonlocal checked
        slots = {read.slot for read in loads}
        for owner, used, y in users:
            if owner is layer and used & slots:
                assert any(y is done for done in evaluated)
                checked += 1
        load(layer, loads)

    with moelab.load(stock.folder("qwen3_next"), 4) as lab:
        for layer in lab.attachment.bank.layers:
            compute = layer.switch

            def watched(x: mx.array, ids: mx.array, layer: Any = layer, f: Any = compute) -> Any:
                y = f(x, ids)
                users.append((layer, set(np.array(ids).reshape(-1).tolist()), y))
                return y

            layer.switch = watched
        monkeypatch.setattr(LayerBank, "load", watched_load)
        monkeypatch.setattr(mx, "eval", watched_eval)
        for n in LENGTHS:
            if n > 8:  # only sweeps: other events leave their output to the next one
                evaluate(lab.model(mx.array([tiny.prompt(n, seed=n)])))
                users.clear()
                evaluated.clear()
    assert checked > 50


def test_an_interrupted_sweep_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at any load, with the other half under way, the next run is right."""
    path = stock.folder("olmoe")
    model, _ = stock.stock(path)
    tokens = mx.array([tiny.prompt(40)])
    load, left = LayerBank.load, 0

    def tripped(layer: LayerBank, loads: Sequence[Load]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        load(layer, loads)

    monkeypatch.setattr(LayerBank, "load", tripped)
    with moelab.load(path, 4) as lab:
        for number in range(1, 100):
            left = number
            try:
                mx.eval(lab.model(tokens))
            except KeyboardInterrupt:
                left = 0
                assert stock.equal(lab.model(tokens), model(tokens)), number
                for layer in lab.attachment.bank.layers:
                    stock.check_slots(layer)
                    stock.check_slot_bytes(layer)
                continue
            break
        assert number > 10
