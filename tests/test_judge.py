"""One window judged: against stock mlx-lm and scipy, for several kinds of cache and action."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)
from scipy import special, stats

import moelab
from moelab.errors import MoelabError, StudyError
from moelab.experts.misses import Reroute
from moelab.experts.router import Exchanges
from moelab.lab import Lab
from moelab.quality import judge as judging
from moelab.quality.divergence import check_finite, diverge, log_softmax, standardised_shift
from moelab.quality.judge import Reference, judge, quantised
from moelab.quality.store import ArrayStore, Rows
from moelab.quality.window import Window, windows_of
from tests.support import stock, tiny

TOKENS = tuple(tiny.prompt(30))
WINDOW = Window("a text", "prose", TOKENS[:24], 12)
CACHES = ["qwen3_next", "gpt_oss", "deepseek_v3"]
"""Recurrent states, sliding windows, compressed keys and values."""


def exact_logits(path: Any, window: Window, prefill: int | None = None) -> np.ndarray:
    """Stock mlx-lm's logits of the judged tokens, one token at a time."""
    model, _ = stock.stock(path)
    cache = make_prompt_cache(model)
    step = prefill or window.prefix
    for start in range(0, window.prefix, step):
        model(mx.array([window.tokens[start : min(start + step, window.prefix)]]), cache=cache)
    rows = [model(mx.array([[t]]), cache=cache)[0, -1] for t in window.tokens[window.prefix : -1]]
    return np.array(mx.stack(rows).astype(mx.float32))


def lossy_logits(lab: Lab, window: Window, action: Any, budget: int | None) -> np.ndarray:
    """The same tokens under an action, by the lab's public interface alone."""
    lab.set_on_miss("load")
    cache = make_prompt_cache(lab.model)
    mx.eval(lab.model(mx.array([window.tokens[: window.prefix]]), cache=cache))
    lab.set_on_miss(action, swap_budget=budget)
    rows = []
    for token in window.tokens[window.prefix : -1]:
        rows.append(lab.model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32))
        mx.eval(rows[-1])
    return np.array(mx.stack(rows))


def expected(full: np.ndarray, lossy: np.ndarray, window: Window) -> pd.DataFrame:
    """What a judged window must say, by scipy."""
    p, q = (special.log_softmax(x.astype(np.float64), axis=-1) for x in (full, lossy))
    rows, wanted = np.arange(window.judged), list(window.tokens[window.prefix + 1 :])
    return pd.DataFrame(
        {
            "position": range(window.prefix + 1, len(window.tokens)),
            "token_id": wanted,
            "logprob": q[rows, wanted],
            "logprob_reference": p[rows, wanted],
            "kl": special.rel_entr(np.exp(p), np.exp(q)).sum(-1),
            "same_top1": full.argmax(-1) == lossy.argmax(-1),
            "entropy": stats.entropy(np.exp(q), axis=-1),
            "entropy_reference": stats.entropy(np.exp(p), axis=-1),
        }
    )


def check(frame: pd.DataFrame, wanted: pd.DataFrame) -> None:
    for name in wanted.columns:
        np.testing.assert_allclose(
            frame[name].astype(float), wanted[name].astype(float), rtol=1e-9, atol=1e-12
        )


# -- divergence ----------------------------------------------------------------------------

LOGITS = st.integers(0, 2**31).map(
    lambda seed: np.random.default_rng(seed).normal(0, 10 ** (seed % 3 - 1), (2, 5, 37))
)


@settings(max_examples=40, deadline=None)
@given(LOGITS, st.integers(0, 36))
def test_divergence_is_scipys(pair: np.ndarray, token: int) -> None:
    a, b = pair.astype(np.float32)
    window = Window("d", "x", (0, 0, *[token] * 5), 1)
    found = diverge(a, b, np.array(window.wanted))
    wanted = expected(a, b, window)
    for name in ("logprob", "logprob_reference", "kl", "same_top1", "entropy", "entropy_reference"):
        np.testing.assert_allclose(getattr(found, name), wanted[name], rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(-3, 3))
def test_divergence_is_never_negative(pair: np.ndarray, ulps: int) -> None:
    a = pair[0].astype(np.float32)
    b = a.copy()
    b[:, 3] = a[:, 3] if ulps == 0 else a[:, 3] * np.float32(1 + ulps * 2.0**-23)
    kl = diverge(a, b, np.zeros(5, int)).kl
    assert (kl >= 0).all()
    assert (kl[(a == b).all(-1)] == 0).all()
    assert np.signbit(kl).sum() == 0


def test_equal_logits_diverge_by_nothing() -> None:
    a = np.random.default_rng(0).normal(0, 30, (50, 999)).astype(np.float32)
    found = diverge(a, a.copy(), np.zeros(50, int))
    assert (found.kl == 0).all() and found.same_top1.all()
    assert np.array_equal(found.entropy, found.entropy_reference)
    assert np.array_equal(found.logprob, found.logprob_reference)


def test_of_equal_logits_the_lowest_id_is_first() -> None:
    a = np.array([[1, 5, 5, 0]], np.float32)
    assert diverge(a, np.array([[1, 5, 4, 0]], np.float32), np.array([0])).same_top1[0]
    assert not diverge(a, np.array([[1, 4, 5, 0]], np.float32), np.array([0])).same_top1[0]


def test_large_logits_do_not_overflow() -> None:
    row = np.array([[3e38, 0, -3e38]], np.float32)
    assert np.isfinite(log_softmax(row)).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 9, 30)).astype(np.float32)
    whole = diverge(a, b, np.arange(9))
    monkeypatch.setattr("moelab.quality.divergence.BLOCK", 60)
    parts = diverge(a, b, np.arange(9))
    assert np.array_equal(whole.kl, parts.kl) and np.array_equal(whole.entropy, parts.entropy)


def test_vocabularies_of_other_sizes() -> None:
    with pytest.raises(StudyError, match="predicts 5 tokens and the constrained model 6"):
        diverge(np.zeros((1, 5)), np.zeros((1, 6)), np.array([0]))


def test_standardised_shift() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 40))
    t = stats.ttest_rel(a, b).statistic
    assert standardised_shift(a, b) == pytest.approx(t / np.sqrt(40))
    assert standardised_shift(a, a) == 0
    assert np.isnan(standardised_shift(a[:1], b[:1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_numbers_are_named(bad: float) -> None:
    logits = np.zeros((4, 9), np.float32)
    logits[2, 5] = bad
    kind = "NaN" if np.isnan(bad) else "infinite"
    with pytest.raises(
        StudyError, match=rf"constrained run has {kind} .* position 12 of 'doc' \(1"
    ):
        check_finite(logits, document="doc", first_position=10, run="constrained")


# -- against stock -------------------------------------------------------------------------


@pytest.mark.parametrize("family", CACHES)
def test_a_window_is_judged_as_stock_and_scipy_say(family: str) -> None:
    path = stock.folder(family)
    full = exact_logits(path, WINDOW)
    with moelab.load(path, 6, on_miss="substitute") as lab:
        reference = Reference(lab, WINDOW)
        assert np.array_equal(reference.logits(0, WINDOW.judged), full)
        exact = judge(lab, WINDOW, reference, "load")
        check(exact, expected(full, full, WINDOW))
        assert (exact["kl"] == 0).all() and exact["same_top1"].all()
        for action, budget in (("drop", None), (Reroute(strength=0.5), 2)):
            frame = judge(lab, WINDOW, reference, action, swap_budget=budget)
            assert frame["kl"].max() > 0
            wanted = expected(full, lossy_logits(lab, WINDOW, action, budget), WINDOW)
            check(frame, wanted)
            lab.set_on_miss("substitute")
            # Whatever ran in between, the same comes out again.
            again = judge(lab, WINDOW, reference, action, swap_budget=budget)
            pd.testing.assert_frame_equal(frame, again)


def test_the_lab_model_is_judged_as_stock_says(lab_path: Any) -> None:
    texts = moelab.labmodel.texts(split="test", domain="guide")[:1]
    with moelab.load("lab", 24) as lab:
        (window,) = windows_of(lab.tokenizer, texts, prefix=20, tokens=8)
        full = exact_logits(lab_path, window)
        frame = judge(lab, window, Reference(lab, window), "drop")
        check(frame, expected(full, lossy_logits(lab, window, "drop", None), window))
    assert (frame["document"] == texts[0]["id"]).all() and (frame["domain"] == "guide").all()


def test_columns() -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        frame = judge(lab, WINDOW, Reference(lab, WINDOW), "drop")
    types = frame.dtypes.astype(str).to_dict()
    assert list(types) == [
        "document", "domain", "position", "phase", "token_id", "logprob", "logprob_reference",
        "kl", "same_top1", "entropy", "entropy_reference",
    ]  # fmt: skip
    assert types["position"] == types["token_id"] == "int32" and types["same_top1"] == "bool"
    assert set(frame["phase"]) == {"decode"}


def test_chunks_are_one_step_each() -> None:
    """Chunk-wise, a chunk's tokens meet one bank, and both runs have the same passes."""
    path = stock.folder("olmoe")
    model, _ = stock.stock(path)
    with moelab.load(path, 4) as lab:
        reference = Reference(lab, WINDOW, chunk=5)
        cache, rows = make_prompt_cache(model), []
        model(mx.array([TOKENS[:12]]), cache=cache)
        for start in range(12, 23, 5):
            rows.append(model(mx.array([TOKENS[start : min(start + 5, 23)]]), cache=cache)[0])
        assert np.array_equal(reference.logits(0, WINDOW.judged), np.array(mx.concatenate(rows)))
        assert (judge(lab, WINDOW, reference, "load")["kl"] == 0).all()
        chunked = judge(lab, WINDOW, reference, "drop")
        single = judge(lab, WINDOW, Reference(lab, WINDOW), "drop")
    assert set(chunked["phase"]) == {"chunk"}
    assert not np.allclose(chunked["kl"], single["kl"])
    for bad in (0, True, 2.0):
        with pytest.raises(StudyError, match="chunk is how many tokens"):
            judging.checked_chunk(bad)  # type: ignore[arg-type]


def test_a_long_prefix_runs_in_chunks_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder("qwen3_next")
    monkeypatch.setattr(judging, "PREFILL_STEP", 5)
    with moelab.load(path, 6, on_miss="drop") as lab:
        found = Reference(lab, WINDOW).logits(0, WINDOW.judged)
    assert np.array_equal(found, exact_logits(path, WINDOW, prefill=5))


def test_the_prefix_is_exact_and_the_order_of_texts_is_nothing() -> None:
    windows = [Window(f"d{n}", "x", TOKENS[n:] + TOKENS[:n], 10) for n in range(2)]
    frames: dict[str, list[pd.DataFrame]] = {w.document: [] for w in windows}
    with moelab.load(stock.folder("olmoe"), 4, on_miss="drop") as lab:
        for order in (windows, windows[::-1]):
            for window in order:
                reference = Reference(lab, window)
                # Something in between that leaves the bank in another state.
                lab.model(mx.array([list(reversed(TOKENS))]))
                frames[window.document].append(judge(lab, window, reference, "drop"))
    for first, *others in frames.values():
        for other in others:
            pd.testing.assert_frame_equal(first, other)


def test_a_reference_holds_after_a_resize_and_from_another_lab() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 4) as lab, moelab.load(path, 9, on_miss="drop") as other:
        reference = Reference(lab, WINDOW)
        small = judge(lab, WINDOW, reference, "drop")
        # Another lab judged against it runs its own prefix, exactly.
        assert (judge(other, WINDOW, reference, "load")["kl"] == 0).all()
        assert other.on_miss == "drop"
        large = judge(other, WINDOW, reference, "drop")
        lab.resize(9)
        assert (judge(lab, WINDOW, reference, "load")["kl"] == 0).all()
        pd.testing.assert_frame_equal(judge(lab, WINDOW, reference, "drop"), large)
    assert not small["kl"].equals(large["kl"])


def test_kv_bits_are_mlx_lms() -> None:
    """After the prefix keys and values are held at 8 bits, as mlx-lm's own cache does it."""
    with moelab.load("lab", 64) as lab:
        tokens = lab.tokenizer.encode(
            moelab.labmodel.texts(split="test", domain="guide")[0]["text"]
        )
        window = Window("d", "x", tuple(tokens[:24]), 16)
        reference = Reference(lab, window)
        cache = make_prompt_cache(lab.model)
        lab.model(mx.array([window.tokens[:16]]), cache=cache)
        cache = [c.to_quantized(64, 8) if hasattr(c, "to_quantized") else c for c in cache]
        rows = [lab.model(mx.array([[t]]), cache=cache)[0, -1] for t in window.fed]
        frame = judge(lab, window, reference, "load", kv_bits=8)
        check(frame, expected(reference.logits(0, 7), np.array(mx.stack(rows)), window))
        assert frame["kl"].max() > 0
        with pytest.raises(StudyError, match="kv_bits must be 8, 4 or None"):
            judge(lab, window, reference, "load", kv_bits=3)
    with moelab.load(stock.folder("gpt_oss"), 4) as lab:
        reference = Reference(lab, WINDOW)
        with pytest.raises(StudyError, match=r"RotatingKVCache|KVCache cannot be held at 8 bits"):
            judge(lab, WINDOW, reference, "load", kv_bits=8)


def test_a_cache_that_would_stay_as_it_is_is_refused() -> None:
    """mlx-lm leaves lists of caches and recurrent states alone, and kv_bits would say nothing."""
    keys = mx.zeros((1, 1, 4, 64))
    inner = KVCache()
    inner.update_and_fetch(keys, keys)
    with pytest.raises(StudyError, match="CacheList"):
        quantised([inner, CacheList(inner, inner)], 8)
    with pytest.raises(StudyError, match="nothing to hold at 8 bits"):
        quantised([ArraysCache(2)], 8)
    part, state = quantised([inner, ArraysCache(2)], 8)
    assert isinstance(part, QuantizedKVCache) and isinstance(state, ArraysCache)


# -- the lab afterwards --------------------------------------------------------------------


@contextmanager
def failing(lab: Lab, at: int, how: Any) -> Iterator[None]:
    """Lets the model's call number `at` raise, or answer with something."""
    calls = itertools.count()

    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) != at:
            return call(*args, **kwargs)
        if isinstance(how, BaseException):
            call(*args, **kwargs)
            raise how
        return how(call(*args, **kwargs))

    with Exchanges() as exchanges:
        exchanges.around(lab.model, around)
        yield


def state(lab: Lab) -> Any:
    slots = [sorted(layer.residency.slot_of) for layer in lab.attachment.bank.layers]
    return lab.on_miss, lab.miss_action, lab.swap_budget, slots


@pytest.mark.parametrize("own", [("drop", 1), ("load", None)])
def test_the_lab_is_as_before(own: tuple[str, int | None]) -> None:
    action, budget = own
    with moelab.load(stock.folder("olmoe"), 4, on_miss=action, swap_budget=budget) as lab:
        before = state(lab)
        reference = Reference(lab, WINDOW)
        assert state(lab) == before
        judge(lab, WINDOW, reference, "substitute", swap_budget=3)
        assert state(lab) == before
        for at in (0, 1, 4):
            with failing(lab, at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
                Reference(lab, WINDOW)
            assert state(lab) == before
            with failing(lab, at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
                judge(lab, WINDOW, reference, "substitute")
            assert state(lab) == before
        frame = judge(lab, WINDOW, reference, "drop")
    with moelab.load(stock.folder("olmoe"), 4) as fresh:
        pd.testing.assert_frame_equal(frame, judge(fresh, WINDOW, Reference(fresh, WINDOW), "drop"))


def test_no_numbers_name_the_run() -> None:
    def spoil(logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == 7, mx.nan, logits)

    with moelab.load(stock.folder("olmoe"), 4) as lab:
        # The prefix is the first call; the fourth after it predicts token 12 + 4.
        with (
            failing(lab, 4, spoil),
            pytest.raises(StudyError, match=r"reference run has NaN .* position 16 of 'a text'"),
        ):
            Reference(lab, WINDOW)
        reference = Reference(lab, WINDOW)
        judge(lab, WINDOW, reference, "drop")  # asks the model for its rules, once
        with (
            failing(lab, 4, spoil),
            pytest.raises(StudyError, match=r"constrained run has NaN .* position 17 of 'a text'"),
        ):
            judge(lab, WINDOW, reference, "drop")
        assert lab.on_miss == "load"


def test_what_is_refused() -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        reference = Reference(lab, WINDOW)
        other = Window("another", "prose", TOKENS[:24], 12)
        with pytest.raises(StudyError, match=r"'a text', 24 tokens.*'another', 24 tokens"):
            judge(lab, other, reference, "drop")
        with pytest.raises(StudyError, match="arms=True"):
            judging.judged(lab, WINDOW, reference, "drop", arm="own")
        with lab.record():
            for run in (
                lambda: Reference(lab, WINDOW),
                lambda: judge(lab, WINDOW, reference, "drop"),
            ):
                with pytest.raises(MoelabError, match="being recorded"):
                    run()
        with pytest.raises(ValueError, match="on_miss must be one of"):
            judge(lab, WINDOW, reference, "forget")


def test_low_bit_copies_stay_while_the_full_model_runs() -> None:
    with moelab.load(stock.folder("olmoe"), 4, on_miss="low_bit") as lab:
        held, seen = lab.memory().low_bit, []

        def look(logits: mx.array) -> mx.array:
            seen.append((lab.memory().low_bit, lab.on_miss))
            return logits

        with failing(lab, 3, look):
            reference = Reference(lab, WINDOW)
        assert seen == [(held, "load")] and held > 0
        assert np.array_equal(reference.logits(0, WINDOW.judged), exact_logits(lab.path, WINDOW))
        assert lab.memory().low_bit == held


# -- what is kept --------------------------------------------------------------------------


def test_logits_in_a_file_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        memory, file = Reference(lab, WINDOW), Reference(lab, WINDOW, kept_bytes=100)
        assert memory._rows is not None and not memory._rows.in_file
        assert file._rows is not None and file._rows.in_file
        pd.testing.assert_frame_equal(
            judge(lab, WINDOW, memory, "drop"), judge(lab, WINDOW, file, "drop")
        )


def test_rows() -> None:
    want = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    for kept in (0, 7 * 11 * 4 - 1, 7 * 11 * 4):
        rows = Rows(7, 11, kept)
        assert rows.in_file == (kept < 7 * 11 * 4)
        rows.put(0, want[:4])
        rows.put(4, want[4:])
        assert np.array_equal(rows.get(2, 6), want[2:6])


@pytest.mark.parametrize("kept", [0, 50, 10**6])
def test_arrays_are_kept_bit_for_bit(kept: int) -> None:
    types = (mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.uint8, mx.bool_)
    arrays = [(mx.random.normal((3, n)) * 9).astype(d) for n, d in enumerate(types)]
    value = {"a": [arrays[0], None, (arrays[1], 3)], "b": arrays[2:], "c": arrays[3][1, 1:2]}
    store = ArrayStore(kept)
    put = store.put(value)
    more = store.put(mx.arange(40))
    got = store.get(put)
    assert got["a"][1] is None and got["a"][2][1] == 3
    pairs = [(got["a"][0], arrays[0]), (got["a"][2][0], arrays[1]), (got["c"], arrays[3][1, 1:2])]
    for a, b in [*pairs, *zip(got["b"], arrays[2:], strict=True)]:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert bool((a == b).all())
    assert store.get(more).tolist() == list(range(40))
