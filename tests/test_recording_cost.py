"""What a recording takes: at most 10 MB for 1,000 tokens of a 48-layer top-10 model."""

from __future__ import annotations

import gc
import logging
import time
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from mlx_lm.models.cache import KVCache

import moelab
from moelab.experts.event import LayerEvent
from moelab.experts.residency import Load
from moelab.lab import Lab
from moelab.routing.loop import GENERATED, LAST_OF_PROMPT, view
from moelab.routing.recorder import Recorder
from moelab.routing.recording import Recording, frame_builder
from moelab.routing.steps import Step
from moelab.routing.store import Store
from tests.support import tiny

log = logging.getLogger(__name__)
"""`--log-cli-level=INFO` shows the figures."""

LAYERS, EXPERTS, TOP_K, VOCAB = 48, 512, 10, 151_936
"""Qwen3-Next-80B's."""

TOKENS = 1000
LIMIT = 10e6
MISS_RATE = 0.3


def passes(tokens: int, seed: int = 0) -> Iterator[Callable[[], Step]]:
    """Forward passes of the large model's shapes, as arrays of MLX; made as they are asked for."""
    rng = np.random.default_rng(seed)
    cache = [KVCache() for _ in range(LAYERS)]

    logits = rng.standard_normal(VOCAB, np.float32)

    def make(serial: int) -> Step:
        step = Step(serial, mx.array([[serial % 1000]]), cache, serial,
                    GENERATED if serial else LAST_OF_PROMPT, ended=True, seconds=0.05)  # fmt: skip
        chosen = rng.random((LAYERS, EXPERTS)).argpartition(TOP_K)[:, :TOP_K].astype(np.uint32)
        missed = rng.random((LAYERS, TOP_K)) < MISS_RATE
        weights = [
            mx.array(w).reshape(1, 1, TOP_K, 1) for w in rng.random(chosen.shape, np.float32)
        ]
        for layer, ids in enumerate(chosen):
            missing = ids[missed[layer]].tolist()
            event = LayerEvent(layer, ids.reshape(1, 1, TOP_K), frozenset(missing), weights[layer])
            step.events.append(event)
            loads = [Load(e, i, None) for i, e in enumerate(missing)]
            if loads:
                step.loads.append((layer, loads, [1e-3] * len(loads)))
        step.logits = mx.array(logits).reshape(1, 1, VOCAB)
        mx.eval(step.inputs, step.logits, weights)
        return step

    for serial in range(tokens):
        yield lambda serial=serial: make(serial)  # type: ignore[misc]


def recorder() -> tuple[Store, Recorder]:
    store = Store([(layer, TOP_K) for layer in range(LAYERS)], EXPERTS)
    return store, Recorder(store, EXPERTS)


def test_memory_of_the_large_model() -> None:
    """The recorder by itself, on the large model's shapes: columns, lagging steps and logits."""
    for make in passes(3):  # what numpy and MLX allocate once
        recorder()[1].begins(make())
    store, listener = recorder()
    gc.collect()
    tracemalloc.start()
    before, active = tracemalloc.get_traced_memory()[0], mx.get_active_memory()
    most = 0
    for i, make in enumerate(passes(TOKENS)):
        listener.begins(make())
        if i % 50 == 0 or i == TOKENS - 1:
            held = tracemalloc.get_traced_memory()[0] - before
            most = max(most, held + max(mx.get_active_memory() - active, 0))
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    on_mlx = mx.get_active_memory() - active
    log.info(
        "%d tokens: %.2f MB by tracemalloc, %.2f MB by MLX, %.2f MB of both at most",
        TOKENS, held / 1e6, on_mlx / 1e6, most / 1e6,
    )  # fmt: skip
    loads = len(store.loads())
    assert loads == pytest.approx(TOKENS * LAYERS * TOP_K * MISS_RATE, rel=0.05)
    assert len(store) >= TOKENS - 2 and most >= store.nbytes > 3e6
    assert most <= LIMIT, f"{most / 1e6:.1f} MB"
    # MLX holds the lagging steps' arrays, logits above all, however long it goes on.
    assert 4 * VOCAB < on_mlx <= 4.5 * 4 * VOCAB
    assert listener.problems == []


def test_frames_of_the_large_model() -> None:
    """480,000 routed slots become frames in seconds; and no warning was needed."""
    store, listener = recorder()
    for make in passes(300):
        listener.begins(make())
    listener.finish()
    load_bytes = dict.fromkeys(range(LAYERS), 1_769_472)
    recording = Recording({}, frame_builder(store, lambda ids: f"t{ids[0]}", load_bytes))
    recording.complete()
    assert pd.__version__  # its import is not counted
    begin = time.perf_counter()
    routing, tokens, loads = recording.routing, recording.tokens, recording.loads
    seconds = (time.perf_counter() - begin) * TOKENS / 300
    assert len(routing) == 300 * LAYERS * TOP_K and len(tokens) == 300
    assert loads["bytes"].sum() == tokens["bytes_read"].sum() == len(loads) * 1_769_472
    assert tokens["misses"].sum() == len(loads) == (~routing["hit"]).sum()
    assert tokens["logprob"].notna().sum() == 299
    log.info("frames of %d tokens: %.2f s", TOKENS, seconds)
    assert seconds < 3, f"{seconds:.1f} s for {TOKENS} tokens"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: Any) -> Iterator[Lab]:
    """A model that runs: 48 layers, top-10 of 64, at a capacity where a third or more misses."""
    folder = tmp_path_factory.mktemp("deep")
    overrides = {
        "num_hidden_layers": LAYERS, "mlp_only_layers": [], "num_experts": 64,
        "num_experts_per_tok": TOP_K, "moe_intermediate_size": 32, "head_dim": 32,
        "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    tiny.build(folder, "qwen3_moe", overrides=overrides)
    with moelab.load(folder, 14) as lab:
        yield lab


def growth(lab: Lab, tokens: int) -> float:
    """Bytes a token by which what Python and MLX hold grows while a model generates."""
    stream = lab.stream(tiny.prompt(8), tokens + 8, template=False, temperature=1.5, seed=0)
    for _ in range(5):  # the lagging steps, and what is allocated once
        next(stream)
    tracemalloc.start()
    try:
        held = []
        for _ in range(2):
            for _ in range(tokens // 2):
                next(stream)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0] + mx.get_active_memory())
    finally:
        tracemalloc.stop()
    return (held[1] - held[0]) / (tokens // 2)


def test_memory_of_a_run(deep: Lab) -> None:
    """A model that runs, with and without recording, by both counts."""
    growth(deep, 10)
    without = growth(deep, 40)
    with deep.record() as rec:
        recorded = growth(deep, 40)
    per_thousand = (recorded - max(without, 0)) * TOKENS
    log.info("a run: %.2f MB for %d tokens", per_thousand / 1e6, TOKENS)
    decoded = rec.tokens[rec.tokens["phase"] == "decode"]
    missed = decoded["misses"].mean() / (LAYERS * TOP_K)
    assert missed > 0.25, "too few misses: what their loads take is to be measured"
    assert 3e6 < per_thousand <= LIMIT, f"{per_thousand / 1e6:.1f} MB"
    assert decoded["logprob"].notna().all()
    assert len(rec.routing) == len(rec.tokens) * LAYERS * TOP_K


def test_time(deep: Lab) -> None:
    """A bound against blunders; the figure of promise 4 is `moelab bench decode`'s."""
    store = Store([(layer, TOP_K) for layer in range(LAYERS)], 64)
    settled: list[Step] = []
    listener = SimpleNamespace(begins=settled.append)
    deep.watch.add(listener)
    begin = time.perf_counter()
    for _ in deep.stream(tiny.prompt(8), 40, template=False):
        pass
    decode = (time.perf_counter() - begin) / 40
    deep.watch.remove(listener)
    mx.eval([s.logits for s in settled if s.logits is not None])
    rec, best = Recorder(store, 64), float("inf")
    for step in settled:
        begin = time.perf_counter()
        rec._settle(step)
        if step.inputs.size == 1:
            best = min(best, time.perf_counter() - begin)
    log.info("settling %.0f µs of a token's %.0f", best * 1e6, decode * 1e6)
    assert best < 0.1 * decode, f"{best * 1e6:.0f} µs of {decode * 1e6:.0f}"


def test_time_of_a_view() -> None:
    """Reading the callers' frames costs microseconds."""

    def under(depth: int) -> float:
        if depth:
            return under(depth - 1)
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            view(1)
            times.append(time.perf_counter() - begin)
        return min(times)

    assert under(14) < 1e-4
