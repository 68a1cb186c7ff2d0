"""Promise 9 under a lossy action: an interrupt at any point leaves a lab that can go on."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import pytest

import moelab
from moelab.experts.attach import Attachment
from moelab.experts.bank import LayerBank
from moelab.experts.lossy import LossyEngine, LossyLayer
from moelab.experts.residency import Residency
from moelab.experts.selection import Selection
from moelab.lab import Lab
from tests.support import stock, tiny
from tests.test_interrupts import Trip

PROMPT = tiny.prompt(6, seed=4)
TOKENS = 4

RUNNING: list[tuple[Any, str]] = [
    (os, "preadv"), (mx, "eval"), (Residency, "exchange"), (Residency, "_place"),
    (Residency, "arrived"), (LayerBank, "exchange"), (LayerBank, "load"), (LossyEngine, "settle"),
    (LossyEngine, "compute"), (LossyLayer, "refresh"), (Selection, "select"), (Selection, "stub"),
]  # fmt: skip
SETTING: list[tuple[Any, str]] = [
    (os, "preadv"), (mx, "eval"), (Residency, "fill"), (Residency, "arrived"), (LayerBank, "fill"),
    (LayerBank, "clear"), (LossyEngine, "install"), (LossyEngine, "restart"),
    (LossyLayer, "refresh"), (Selection, "install"), (Selection, "remove"), (Attachment, "_put"),
]  # fmt: skip


def steps(lab: Lab) -> stock.Steps:
    return stock.steps(lab.stream(PROMPT, TOKENS))


def check(lab: Lab) -> None:
    for layer in lab.attachment.bank.layers:
        layer.mend()
        stock.check_slots(layer)
        stock.check_slot_bytes(layer)


@pytest.mark.parametrize("action", ["drop", "substitute"])
@pytest.mark.parametrize(("owner", "name"), RUNNING, ids=[name for _, name in RUNNING])
def test_while_running(owner: Any, name: str, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder("olmoe", "none")
    with moelab.load(path, 4, on_miss=action) as fresh:
        wanted = steps(fresh)
        fresh.on_miss = "load"
        exact = steps(fresh)
    with moelab.load(path, 4, on_miss=action) as lab:
        for number in range(1, 60, 8):
            trip = Trip(getattr(owner, name), after=number % 2 == 0)
            trip.left = number
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda *a, t=trip, **k: t(*a, **k))
                try:
                    steps(lab)
                    break
                except KeyboardInterrupt:
                    pass
            steps(lab)  # it goes on as it is
            check(lab)
            lab.reset()
            assert stock.same_steps(steps(lab), wanted), number
            lab.reset()
        lab.on_miss = "load"
        assert stock.same_steps(steps(lab), exact)
        assert number > 1 or (name in ("select", "stub") and action == "drop")


@pytest.mark.parametrize(("owner", "name"), SETTING, ids=[name for _, name in SETTING])
def test_while_changing(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder("olmoe", "none")
    actions = ("substitute", "drop", "low_bit", "load")
    wanted = {}
    for action in actions:
        with moelab.load(path, 4, on_miss=action) as fresh:
            wanted[action] = steps(fresh)
    stopped = 0
    with moelab.load(path, 4) as lab:
        for number in range(1, 40, 5):
            for action in actions:
                trip = Trip(getattr(owner, name), after=number % 2 == 1)
                trip.left = number
                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, lambda *a, t=trip, **k: t(*a, **k))
                    try:
                        lab.on_miss = action
                    except KeyboardInterrupt:
                        stopped += 1
                # Whatever it says that it is, it is that.
                lab.reset()
                assert stock.same_steps(steps(lab), wanted[lab.on_miss]), (number, action)
                lab.on_miss = action
                assert stock.same_steps(steps(lab), wanted[action]), (number, action)
                check(lab)
    assert stopped
