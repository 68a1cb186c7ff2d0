"""The rules of the bank, watched from outside while a model runs."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.errors import CheckpointError
from moelab.experts import loader
from moelab.lab import Lab
from tests.support import stock, tiny

FAMILIES = [(f, layout) for f in tiny.FAMILIES for layout in stock.layouts(f, "affine4")[1:]]


def run(lab: Lab, lengths: tuple[int, ...] = (40, 1, 1, 3, 1, 20, 1)) -> list[mx.array]:
    """Forward passes of these lengths over one cache."""
    cache = make_prompt_cache(lab.model)
    return [
        lab.model(mx.array([tiny.prompt(n, seed=i)]), cache=cache) for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_slots_hold_the_disk_bytes_at_every_step(family: str, layout: dict[str, Any]) -> None:
    path = stock.folder(family, **layout)
    for capacity in tiny.capacities(family)[:-1]:
        with moelab.load(path, capacity) as lab:
            tally = stock.Tally(lab, slot_bytes=True)
            run(lab)
            assert tally.sweeps and tally.evictions
            assert all(len(e.after or ()) <= capacity for e in tally.events)


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_each_expert_is_read_once_an_event(
    family: str, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the bytes come in: no piece twice in an event, and no hit at all."""
    read = os.preadv
    pieces: Counter[tuple[int, int]] = Counter()

    def counted(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        at = offset
        for buffer in buffers:  # what lies side by side is read by one call
            pieces[os.fstat(fd).st_ino, at] += 1
            at += memoryview(buffer).nbytes
        return read(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", counted)
    with moelab.load(stock.folder(family, **layout), tiny.capacities(family)[0]) as lab:
        tally = stock.Tally(lab)
        layers = lab.attachment.bank.layers
        for layer in layers:
            inner = layer.end

            def ended(layer: Any = layer, inner: Callable[[], None] = inner) -> None:
                inner()
                event = tally.events[-1]
                places = [t.place(e) for e in event.misses for t in layer.loader._tensors]
                assert pieces == Counter((p.stat().st_ino, offset) for p, offset in places)
                pieces.clear()

            layer.__dict__["end"] = ended
        run(lab)
        assert tally.sweeps and len(tally.events) >= 7 * len(layers)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_next"])
def test_hits_are_served_first(family: str) -> None:
    """In a sweep the first round holds every hit; later ones only misses, in ascending order."""
    with moelab.load(stock.folder(family), tiny.experts(family)[0] // 4) as lab:
        tally = stock.Tally(lab)
        run(lab, (1, 1, 30, 30, 1, 5))
        swept = [e for e in tally.events if e.swept and e.before & set(e.needed)]
        assert swept
        for event in swept:
            first = event.rounds[0]
            assert not {load.evicted for load in first} & set(event.needed)
            assert [load.expert for loads in event.rounds for load in loads] == event.misses


def test_whoever_sits_in_the_slots_stays() -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        tally = stock.Tally(lab)
        run(lab)
        known: dict[int, frozenset[int]] = {}
        for event in tally.events:
            assert event.before == known.get(event.layer.layer, frozenset())
            assert event.after is not None
            known[event.layer.layer] = event.after
            if event.swept:
                assert len(event.after) == 4
                assert event.after >= {load.expert for load in event.rounds[-1]}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_nothing_is_read_twice_into_a_full_bank(family: str) -> None:
    """A bank of E − 1 slots that was filled reads at most what did not fit."""
    experts, _ = tiny.experts(family)
    with moelab.load(stock.folder(family), experts - 1) as lab:
        tally = stock.Tally(lab)
        run(lab, (60,))
        first = len(tally.loads)
        run(lab, (60,))
        layers = len(lab.attachment.bank.layers)
        assert len(tally.loads) - first <= layers
        assert first >= layers * (experts // 2)


def test_reset_empties_the_bank() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 4) as lab:
        tally = stock.Tally(lab)
        mx.eval(run(lab))
        first = len(tally.events), tally.loads
        lab.reset()
        assert all(not layer.residency.slot_of for layer in lab.attachment.bank.layers)
        want = run(lab)
        assert tally.loads[len(first[1]) :] == first[1], "after a reset the same reads follow"
        lab.reset()  # with outputs still held
        run(lab)
    with moelab.load(path, 4) as lab:
        assert all(stock.equal(a, b) for a, b in zip(want, run(lab), strict=True))


@pytest.mark.parametrize("layout", stock.layouts("olmoe", "affine4"))
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_short_reads_are_continued(
    layout: dict[str, Any], dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may give fewer bytes than asked for."""
    path = stock.folder("olmoe", dtype="bfloat16", **layout)
    with moelab.load(path, 4, dtype=dtype) as lab:
        want = run(lab)
        mx.eval(want)
    read = os.preadv
    short = []

    def stingy(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        *whole, last = [memoryview(buffer).cast("B") for buffer in buffers]
        some = last[: max(1, len(last) * 2 // 3)]
        short.append(len(some))
        return read(fd, [*whole, some], offset, *flags)

    monkeypatch.setattr(os, "preadv", stingy)
    with moelab.load(path, 4, dtype=dtype) as lab:
        got = run(lab)
        mx.eval(got)
        assert len(short) > 100
    assert all(stock.equal(a, b) for a, b in zip(got, want, strict=True))


def test_parallel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several readers at once, in an order of their own, fill the same slots."""
    read = os.preadv
    threads = set()

    def noted(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        threads.add(threading.current_thread().name)
        return read(fd, buffers, offset, *flags)

    path = stock.folder("qwen3_next")
    with moelab.load(path, 8) as lab:
        want = run(lab)
        mx.eval(want)
    monkeypatch.setattr(loader, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(os, "preadv", noted)
    with moelab.load(path, 8) as lab:
        tally = stock.Tally(lab, slot_bytes=True)
        assert all(stock.equal(a, b) for a, b in zip(run(lab), want, strict=True))
        assert tally.sweeps
    assert len(threads) >= 2
    assert not [t for t in threading.enumerate() if t.name.startswith("moelab-read")]


def test_watchers_hear_of_every_load() -> None:
    class Heard:
        def __init__(self) -> None:
            self.loads: list[Any] = []

        def loaded(self, layer: int, loads: Any, seconds: Any) -> None:
            assert len(loads) == len(seconds) and all(s >= 0 for s in seconds)
            self.loads += [(layer, load) for load in loads]

    with moelab.load(stock.folder("olmoe"), 4) as lab:
        heard = Heard()
        lab.attachment.bank.watchers.append(heard)
        tally = stock.Tally(lab)
        run(lab)
        assert [load for _, load in heard.loads] == tally.loads
        assert {layer for layer, _ in heard.loads} == {0, 1}


@pytest.mark.parametrize("layout", stock.layouts("olmoe", "affine4"))
def test_a_failed_read_says_which(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with moelab.load(stock.folder("olmoe", **layout), 4) as lab:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match=r"expert \d+ .*Input/output error"):
            run(lab)
        monkeypatch.undo()
        run(lab)


def test_slots_are_the_arrays_that_the_model_computes_with() -> None:
    """Written through a view of their memory, not through copies that MLX does not see."""
    with moelab.load(stock.folder("gpt_oss", dtype="bfloat16"), 4) as lab:
        run(lab)
        layer = lab.attachment.bank.layers[0]
        arrays = [
            a for p in layer.switch.values() if hasattr(p, "num_experts")
            for a in p.values() if isinstance(a, mx.array)
        ]  # fmt: skip
        held = sorted(np.array(a.view(mx.uint8)).tobytes() for a in arrays)
        assert held == sorted(t.slots.tobytes() for t in layer.loader._tensors)
        assert sum(a.nbytes for a in arrays) == layer.nbytes
        assert all(a.shape[0] == 4 for a in arrays)
