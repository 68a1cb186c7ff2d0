"""Promise 6: memory is what was asked for, and turns add nothing."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import moelab
from moelab.checkpoint.headers import read_headers
from moelab.lab import Lab
from tests.support import stock, tiny

TOLERANCE = 0.03
CHUNKS = (16, 64, 128)
PROMPT = tiny.prompt(128, vocab=4000)


def settled() -> int:
    """Bytes that MLX holds, once nothing waits to be freed."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def promised(path: Path, lab: Lab) -> float:
    """Trunk + C experts a layer, from the files' headers alone."""
    routed = [".switch_mlp.", ".mlp.experts."]
    total = 0.0
    for name, span in read_headers(path).items():
        is_expert = any(part in name for part in routed)
        total += span.nbytes * (lab.capacity / lab.sites[0].experts if is_expert else 1)
    return total


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bytes_of_parameters_and_slots(family: str) -> None:
    path = stock.folder(family)
    before = settled()
    for capacity in tiny.capacities(family):
        with moelab.load(path, capacity) as lab:
            use, held = lab.memory(), settled() - before
            assert use.total == pytest.approx(promised(path, lab), rel=TOLERANCE)
            assert held == pytest.approx(promised(path, lab), rel=TOLERANCE)
            lab.generate(tiny.prompt(40), 4)
            assert settled() - before == pytest.approx(held, rel=TOLERANCE)
            full = capacity == tiny.experts(family)[0]
            assert (use.slots == 0) == full == (use.resident_experts > 0)
        del lab
        assert settled() - before < 1000, "a closed lab frees everything"


def test_widened_slots_count_as_they_are() -> None:
    path = stock.folder("olmoe", "none", dtype="bfloat16")
    before = settled()
    with moelab.load(path, 4, dtype="float32") as lab:
        assert settled() - before == pytest.approx(2 * promised(path, lab), rel=TOLERANCE)
        assert lab.memory().total == pytest.approx(2 * promised(path, lab), rel=TOLERANCE)


@pytest.mark.parametrize("capacity", [6, 16, 32])
def test_lab_model(capacity: int, lab_path: Path) -> None:
    before = settled()
    with moelab.load("lab", capacity) as lab:
        assert settled() - before == pytest.approx(promised(lab_path, lab), rel=TOLERANCE)
        assert lab.memory().total == pytest.approx(promised(lab_path, lab), rel=TOLERANCE)


def excess(model: Any, tokenizer: Any, chunk: int) -> int:
    """Peak above what the model itself takes, of a prefill in chunks and some decoding."""
    found = []
    for _ in range(2):
        base = settled()
        mx.reset_peak_memory()
        for response in mlx_lm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=4, prefill_step_size=chunk
        ):
            del response
        found.append(mx.get_peak_memory() - base)
    return min(found)


@pytest.fixture(scope="module")
def stock_excess(lab_path: Path) -> Iterator[dict[int, int]]:
    model, tokenizer = mlx_lm.load(str(lab_path))[:2]
    yield {chunk: excess(model, tokenizer, chunk) for chunk in CHUNKS}


@pytest.mark.parametrize("capacity", [6, 16, 32])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_peak(capacity: int, chunk: int, stock_excess: dict[int, int], lab_path: Path) -> None:
    """A swept prefill's peak is at most stock's own above the promise, plus 3%."""
    with moelab.load("lab", capacity) as lab:
        ours = excess(lab.model, lab.tokenizer, chunk)
        whole = promised(lab_path, lab) + stock_excess[chunk]
        assert promised(lab_path, lab) + ours <= whole * (1 + TOLERANCE)
        assert ours > stock_excess[chunk] / 2, "nothing was measured"


def test_host_memory_does_not_grow() -> None:
    """Python's own memory, over steps that load and evict all the time."""
    with moelab.load(stock.folder("qwen2_moe"), 2) as lab:
        tally = stock.Tally(lab)

        def steps(count: int, start: int) -> None:
            for i in range(count):
                mx.eval(lab.model(mx.array([tiny.prompt(3, seed=start + i)])))
            seen = len(tally.loads)
            tally.events.clear()
            assert seen > count

        tracemalloc.start()
        try:
            steps(50, 0)
            gc.collect()
            first = tracemalloc.get_traced_memory()[0]
            steps(300, 50)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - first < 20_000
        finally:
            tracemalloc.stop()


def test_twenty_turns_add_nothing() -> None:
    """Twenty conversations and twenty generations, each of the same size."""
    path = stock.folder("qwen3_next", chat_template=True)
    with moelab.load(path, 8) as lab:
        sizes = []
        for turn in range(20):
            chat = lab.chat()
            chat.say("the router sends each token", 6, seed=turn)
            held = settled()
            lab.generate("an expert that is not in memory", 6)
            assert settled() <= held + 1000
            del chat
            sizes.append(settled())
        assert max(sizes[1:]) <= sizes[0] + 1000


def test_a_conversation_holds_its_cache_and_no_more() -> None:
    path = stock.folder("qwen3_moe", chat_template=True)
    with moelab.load(path, 4) as lab:
        base = settled()
        chat = lab.chat(temperature=0.0)
        sizes = []
        for turn in range(20):
            chat.say(f"turn {turn}", 4)
            sizes.append(settled() - base)
        cache = sum(part.nbytes for part in chat._cache or ())
        assert sizes[-1] <= cache * 1.1 + 10_000
        del chat
        assert settled() - base < 2000


def test_the_pieces_are_shown() -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        assert "4 of 16" in repr(lab) and "top-2" in repr(lab) and "on disk" in repr(lab)
        assert "4 of 16" in lab._repr_html_()


@pytest.mark.parametrize("action", ["drop", "substitute", "reroute", "low_bit"])
def test_turns_under_a_lossy_action_add_nothing(action: str) -> None:
    """20 turns, recorded or not: neither MLX's memory nor Python's objects grow."""
    with moelab.load(stock.folder("qwen3_next"), 8, on_miss=action) as lab:

        def turns(number: int) -> int:
            for turn in range(number):
                lab.generate(tiny.prompt(20, seed=turn), 6)
                with lab.record():
                    lab.generate(tiny.prompt(8, seed=turn), 3)
            mx.eval(lab.attachment.bank.pending)
            gc.collect()
            mx.clear_cache()
            return mx.get_active_memory()

        few = turns(3)
        objects = len(gc.get_objects())
        assert turns(20) <= few + 4096
        assert len(gc.get_objects()) < objects + 500
        assert len(lab.attachment.bank.pending) <= 4 * len(lab.sites)
