"""What running takes beside the weights, against what stock mlx-lm's cache and MLX really hold."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from moelab.errors import CapacityError
from moelab.experts.footprint import default_context, footprint
from moelab.families import find_switches
from tests.support import stock, tiny

CASES = [(64, 65), (128, 257), (256, 700)]


def cache_bytes(cache: list[Any]) -> int:
    return sum(entry.nbytes for entry in cache)


def run(
    model: Any, tokens: list[int], chunk: int, kv_bits: int | None = None, times: int = 2
) -> tuple[int, int]:
    """The most bytes of cache, and MLX's peak above the model, of reading a prompt with stock."""
    best = None
    for _ in range(times):
        gc.collect()
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        cache = make_prompt_cache(model)
        held = [0]
        options = {} if kv_bits is None else {"kv_bits": kv_bits, "quantized_kv_start": 0}

        def look(*_: int, cache: list[Any] = cache, held: list[int] = held) -> None:
            held[0] = max(held[0], cache_bytes(cache))

        steps = generate_step(
            mx.array(tokens), model, max_tokens=1, prompt_cache=cache, prefill_step_size=chunk,
            prompt_progress_callback=look, **options,
        )  # fmt: skip
        for token, _ in steps:
            del token
        look()
        peak = mx.get_peak_memory() - base
        best = peak if best is None else min(best, peak)
        most = held[0]
        del cache, steps, look
    assert best is not None
    return most, best


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cache_and_peak(family: str) -> None:
    """The cache to the byte; the peak of prefill as far as an estimate goes."""
    path = stock.folder(family)
    model = stock.stock(path)[0]
    sites = find_switches(model, family)
    for chunk, context in CASES:
        found = footprint(model, sites, context=context, chunk=chunk)
        cache, peak = run(model, tiny.prompt(context), chunk)
        assert found.cache == cache, (chunk, context)
        assert found.cache + found.prefill == pytest.approx(peak, rel=0.5), (chunk, context)
        if context == 700:
            assert found.cache + found.prefill == pytest.approx(peak, rel=0.3)


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_lab_model(kv_bits: int | None, lab_path: Path) -> None:
    model = stock.stock(lab_path)[0]
    sites = find_switches(model, "qwen3_next")
    found = footprint(model, sites, context=300, chunk=128, kv_bits=kv_bits)
    cache, peak = run(model, tiny.prompt(300, vocab=4000), 128, kv_bits, times=1)
    assert found.cache == cache
    assert found.cache + found.prefill == pytest.approx(peak, rel=0.2)
    one = footprint(model, sites, context=1, chunk=128, kv_bits=kv_bits)
    assert found.constant == one.constant > 0, "the recurrent state is the same at any length"
    assert found.growing > one.growing > 0


def test_windows_stop_growing() -> None:
    """gpt_oss has a window of 16 in every other layer; the other layers go on growing."""
    model = stock.stock(stock.folder("gpt_oss"))[0]
    sites = find_switches(model, "gpt_oss")
    a, b = (footprint(model, sites, context=n, chunk=8).growing for n in (1024, 2048))
    full = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, width, bytes
    assert b - a == 1024 * full


def test_what_is_traced_is_left_as_it_was_found() -> None:
    path = stock.folder("qwen3_next")
    model = stock.stock(path)[0]
    sites = find_switches(model, "qwen3_next")
    before = [(id(s.parent[s.key]), sorted(vars(s.parent))) for s in sites]
    attention = mx.fast.scaled_dot_product_attention
    held = mx.get_active_memory()
    footprint(model, sites, context=100_000)
    gc.collect()
    assert mx.get_active_memory() <= held + 1000, "nothing was evaluated"
    assert mx.fast.scaled_dot_product_attention is attention
    assert [(id(s.parent[s.key]), sorted(vars(s.parent))) for s in sites] == before


def test_widened(lab_path: Path) -> None:
    """A bfloat16 model that will be converted to float32 has a cache of twice the bytes."""
    model = stock.stock(stock.folder("olmoe", "none", dtype="bfloat16"))[0]
    sites = find_switches(model, "olmoe")
    narrow, wide = (footprint(model, sites, context=300, widen=w) for w in (False, True))
    assert wide.cache == 2 * narrow.cache and wide.prefill > 1.9 * narrow.prefill


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"context": 0}, "context must be a positive number of tokens, got 0"),
        ({"context": -5}, "got -5"),
        ({"context": True}, "got True"),
        ({"context": 10.5}, "got 10.5"),
        ({"context": 10, "chunk": 0}, "prefill_step_size must be a positive"),
        ({"context": 10, "kv_bits": 3}, "kv_bits must be 8, 4 or None, got 3"),
        ({"context": 10, "kv_bits": 8}, "cannot be quantised to 8 bits"),  # heads of 16
    ],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    model = stock.stock(stock.folder("olmoe"))[0]
    with pytest.raises(CapacityError, match=text):
        footprint(model, find_switches(model, "olmoe"), **options)


def test_default_context() -> None:
    assert default_context({"max_position_embeddings": 4096}) == 4096
    assert default_context({"max_position_embeddings": 10**6}) == 8192
    assert default_context({"text_config": {"max_position_embeddings": 100}}) == 100
    assert default_context({}) == default_context({"max_position_embeddings": None}) == 8192
