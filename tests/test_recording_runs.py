"""Phases, positions, sequences and runs, in every generation loop of mlx-lm; and surprise."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pandas as pd
import pytest
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import moelab
from moelab.lab import Lab
from moelab.routing.recorder import _Scorer
from moelab.routing.recording import Recording
from tests.support import stock, tiny

PROMPT = tiny.prompt(13)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Recurrent and attention layers."""
    with moelab.load(stock.folder("qwen3_next", chat_template=True), 8) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def attention() -> Iterator[Lab]:
    """Attention alone: its cache can be trimmed and quantised."""
    with moelab.load(stock.folder("qwen3_moe"), 4) as loaded:
        yield loaded


def check(rec: Recording) -> None:
    """What holds for every recording."""
    tokens, routing = rec.tokens, rec.routing
    keys = ["run", "sequence", "step", "position"]
    counted = routing.groupby(keys, sort=False).agg(routed=("hit", "size"), hits=("hit", "sum"))
    merged = tokens.merge(counted.reset_index(), on=keys, suffixes=("", "_of_routing"))
    assert len(merged) == len(tokens) and not tokens.duplicated(keys).any()
    assert (merged["hits"] == merged["hits_of_routing"]).all()
    assert (merged["hits"] + merged["misses"] == merged["routed"]).all()
    assert (tokens["seconds"] > 0).all()
    for _, run in tokens.groupby("run"):
        steps = run["step"].to_numpy()
        assert steps[0] == 0 and set(np.diff(steps)) <= {0, 1}
    assert rec.run["problems"] == []


def sequence(tokens: pd.DataFrame, run: int = 0, number: int = 0) -> pd.DataFrame:
    """A sequence without its padding."""
    mine = tokens[(tokens["run"] == run) & (tokens["sequence"] == number)]
    return mine[mine["phase"] != "padding"]


def expect(
    frame: pd.DataFrame, prompt: Sequence[int], generated: Sequence[int], at: int = 0
) -> None:
    """The frame is these tokens, in order, from position `at` on."""
    assert frame["token_id"].tolist() == [*prompt, *generated]
    assert frame["position"].tolist() == list(range(at, at + len(frame)))
    phases = ["prefill"] * len(prompt) + ["decode"] * len(generated)
    assert frame["phase"].tolist() == phases


@pytest.mark.parametrize("chunk", [2048, 12, 5, 1])
def test_generate_and_stream(lab: Lab, chunk: int) -> None:
    with lab.record() as rec:
        responses = list(lab.stream(PROMPT, 6, prefill_step_size=chunk))
    check(rec)
    expect(rec.tokens, PROMPT, [r.token for r in responses])
    # mlx-lm sends all but the prompt's last token in chunks, and that one by itself.
    chunks = [min(chunk, 12 - i) for i in range(0, 12, chunk)]
    assert rec.tokens.groupby("step").size().tolist() == [*chunks, 1, *[1] * 6]
    assert rec.tokens["run"].eq(0).all() and rec.tokens["sequence"].eq(0).all()
    texts = [lab.tokenizer.decode([t]) for t in rec.tokens["token_id"]]
    assert rec.tokens["token"].tolist() == texts


def test_stopped_early(lab: Lab) -> None:
    with lab.record() as rec:
        stream = lab.stream(PROMPT, 20)
        seen = [next(stream).token for _ in range(3)]
    check(rec)
    expect(rec.tokens, PROMPT, seen)


def test_end_of_text(lab: Lab) -> None:
    """The token that ends a text was generated, and the loop had looked ahead past it."""
    tokens = [r.token for r in lab.stream(PROMPT, 6)]
    ids = lab.tokenizer.eos_token_ids
    try:
        lab.tokenizer._eos_token_ids = {tokens[3]}
        with lab.record() as rec:
            last = list(lab.stream(PROMPT, 6))[-1]
    finally:
        lab.tokenizer._eos_token_ids = ids
    assert last.finish_reason == "stop"
    expect(rec.tokens, PROMPT, tokens[: tokens.index(tokens[3]) + 1])


def test_a_chat_is_one_run(lab: Lab) -> None:
    with lab.record() as rec:
        # A random model's bytes are no text; an answer that is text again keeps the cache.
        answer = lab.tokenizer.encode("the router sends", add_special_tokens=False)
        chat = lab.chat(system="the experts")
        for message in ("the router", "in memory", "on disk"):
            forced = iter(answer)
            chat.say(message, 4, logits_processors=[
                lambda _, logits, forced=forced: mx.where(
                    mx.arange(logits.shape[-1])[None] == next(forced), 0.0, -1e9
                )
            ])  # fmt: skip
        lab.chat().say("the router", 3)
    check(rec)
    first = sequence(rec.tokens, 0)
    assert first["position"].tolist() == list(range(len(first)))
    turns = (first["phase"] != first["phase"].shift()).sum()
    assert turns == 6, "three prompts, three answers"
    assert first["phase"].eq("decode").sum() == 12
    assert sequence(rec.tokens, 1)["position"].iloc[0] == 0
    assert rec.tokens["run"].nunique() == 2 and len(rec.run["generations"]) == 4


def test_mlx_lm_functions(lab: Lab) -> None:
    with lab.record() as rec:
        mlx_lm.generate(lab.model, lab.tokenizer, PROMPT, max_tokens=3)
        streamed = [
            r.token for r in mlx_lm.stream_generate(lab.model, lab.tokenizer, PROMPT, max_tokens=4)
        ]
        stepped = [t for t, _ in generate_step(mx.array(PROMPT), lab.model, max_tokens=5)]
    check(rec)
    assert stepped[:4] == streamed
    for run, count in enumerate((3, 4, 5)):
        expect(sequence(rec.tokens, run), PROMPT, stepped[:count])


def test_interleaved_generators(lab: Lab) -> None:
    other = tiny.prompt(9, seed=3)
    alone = [[r.token for r in lab.stream(p, 6)] for p in (PROMPT, other)]
    with lab.record() as rec:
        both = [lab.stream(p, 6) for p in (PROMPT, other)]
        tokens = [[r.token for r in pair] for pair in zip(*both, strict=True)]
    check(rec)
    assert [list(t) for t in zip(*tokens, strict=True)] == alone
    expect(sequence(rec.tokens, 0), PROMPT, alone[0])
    expect(sequence(rec.tokens, 1), other, alone[1])


@pytest.mark.parametrize("cached", [True, False])
def test_direct_calls(lab: Lab, cached: bool) -> None:
    cache = make_prompt_cache(lab.model) if cached else None
    x = mx.array([PROMPT])
    with lab.record() as rec:
        lab.model(x, cache=cache)
        lab.model(x[:, :1], cache)
        lab.model(mx.concatenate([x, x[:, ::-1]])[:, :4])
    check(rec)
    if cached:
        expect(sequence(rec.tokens, 0), PROMPT, PROMPT[:1])
    else:
        expect(sequence(rec.tokens, 0), PROMPT, [])
        expect(sequence(rec.tokens, 1), [], PROMPT[:1])
    rows = sequence(rec.tokens, 1 if cached else 2, 1)
    expect(rows, PROMPT[::-1][:4], [])


def test_a_cache_that_was_there_before(lab: Lab, tmp_path: Any) -> None:
    cache = make_prompt_cache(lab.model)
    lab.model(mx.array([PROMPT]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    with lab.record() as rec:
        lab.model(mx.array([PROMPT]), cache=cache)
        for _ in range(2):  # saved and loaded: two other caches
            again = load_prompt_cache(str(tmp_path / "cache.safetensors"))
            lab.generate(PROMPT, 2, prompt_cache=again)
            del again
            gc.collect()
    assert rec.tokens["run"].nunique() == 3
    assert all(sequence(rec.tokens, run)["position"].iloc[0] == 13 for run in range(3))


def test_quantised_caches(attention: Lab) -> None:
    """Quantising exchanges every part of a cache; it stays one run."""
    with attention.record() as rec:
        for _ in range(2):
            stream = attention.stream(PROMPT, 5, kv_bits=8, kv_group_size=32, prefill_step_size=4)
            tokens = [r.token for r in stream]
        cache = make_prompt_cache(attention.model)
        options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 15}
        later = [t for t, _ in generate_step(mx.array(PROMPT), attention.model, max_tokens=6,
                                             prompt_cache=cache, **options)]  # fmt: skip
    check(rec)
    assert type(cache[0]).__name__ == "QuantizedKVCache"
    assert rec.tokens["run"].nunique() == 3
    expect(sequence(rec.tokens, 1), PROMPT, tokens)
    expect(sequence(rec.tokens, 2), PROMPT, later)


def test_caches_in_the_same_place_are_different_runs(attention: Lab) -> None:
    """A freed list's id is used again at once: of 12 caches here several share one."""
    places = set()
    with attention.record() as rec:
        for i in range(12):
            cache = make_prompt_cache(attention.model)
            places.add(id(cache))
            attention.model(mx.array([PROMPT[: 3 + i % 2]]), cache=cache)
            attention.model(mx.array([PROMPT[:1]]), cache=cache)
            del cache
            gc.collect()
    assert len(places) < 12, "no id was used again: this tests nothing"
    assert rec.tokens["run"].nunique() == 12
    assert rec.tokens.groupby("run")["position"].min().eq(0).all()


def test_a_trimmed_cache(attention: Lab) -> None:
    """What follows a trimmed token was not drawn from its logits."""
    cache = make_prompt_cache(attention.model)
    with attention.record() as rec:
        attention.model(mx.array([PROMPT]), cache=cache)
        mlx_lm.models.cache.trim_prompt_cache(cache, 3)
        attention.model(mx.array([PROMPT[:1]]), cache=cache)
        attention.model(mx.array([PROMPT[:1]]), cache=cache)
    assert rec.tokens["run"].nunique() == 1
    assert rec.tokens["position"].tolist() == [*range(13), 10, 11]
    assert rec.tokens["logprob"].isna().tolist() == [True] * 14 + [False]


def speculative(lab: Lab, draft: Any, max_tokens: int = 9) -> list[int]:
    return [
        r.token
        for r in mlx_lm.stream_generate(
            lab.model, lab.tokenizer, PROMPT, max_tokens=max_tokens, draft_model=draft,
            num_draft_tokens=3,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("draft", ["same", "other"])
def test_speculative_decoding(attention: Lab, draft: str) -> None:
    """Of the rows of one position the last one stands, and it has the right surprise."""
    plain = [r.token for r in attention.stream(PROMPT, 9)]
    seed = 0 if draft == "same" else 5
    model, _ = stock.stock(stock.folder("qwen3_moe", seed=seed))
    with attention.record() as rec:
        assert speculative(attention, model) == plain
    assert rec.run["problems"] == [] and rec.tokens["run"].eq(0).all()
    if draft == "other":
        assert rec.tokens["position"].duplicated().any(), "no draft was rejected"
    last = rec.tokens.drop_duplicates("position", keep="last")
    last = last.sort_values("position").iloc[: len(PROMPT) + 8]
    expect(last, PROMPT, plain[:8])
    logprob, entropy = reference(attention, [*PROMPT, *plain[:8]])
    np.testing.assert_allclose(last["logprob"][-8:], logprob[-8:], atol=2e-5)
    np.testing.assert_allclose(last["entropy"][-8:], entropy[-8:], atol=2e-5)


def test_speculative_decoding_with_itself(attention: Lab) -> None:
    """The draft model is recorded too where it is the same: as a run of its own."""
    with attention.record() as rec:
        tokens = speculative(attention, attention.model)
    assert rec.tokens["run"].nunique() == 2
    for run in range(2):
        mine = rec.tokens[rec.tokens["run"] == run]
        assert mine["phase"].eq("prefill").sum() == len(PROMPT)
        assert mine["token_id"][:16].tolist() == [*PROMPT, *tokens[:3]]


PROMPTS = [tiny.prompt(n, seed=n) for n in (11, 4, 1, 7)]
LENGTHS = [5, 3, 6, 4]


@pytest.mark.parametrize("which", ["lab", "attention"])
@pytest.mark.parametrize("chunk", [2048, 4])
def test_batch_generate(request: Any, which: str, chunk: int) -> None:
    lab: Lab = request.getfixturevalue(which)
    with lab.record(prompt_logprobs=True) as rec:
        answer = batch_generate(
            lab.model, lab.tokenizer, PROMPTS, max_tokens=LENGTHS, prefill_step_size=chunk,
            return_token_ids=True,
        )  # fmt: skip
    check(rec)
    assert answer.token_ids is not None and rec.tokens["run"].eq(0).all()
    assert rec.tokens["phase"].eq("padding").any()
    for number, (prompt, generated) in enumerate(zip(PROMPTS, answer.token_ids, strict=True)):
        mine = sequence(rec.tokens, 0, number)
        if len(generated) < LENGTHS[number]:  # mlx-lm leaves out the token that ended it
            generated.append(lab.tokenizer.eos_token_id)
        expect(mine, prompt, generated)
        surprise(lab, mine, [*prompt, *generated], first=1, atol=1e-3)
    padding = rec.tokens[rec.tokens["phase"] == "padding"]
    assert padding["logprob"].isna().all() and padding["entropy"].isna().all()


def test_batches_with_late_insertion_and_history(lab: Lab) -> None:
    cache = make_prompt_cache(lab.model)
    lab.model(mx.array([PROMPT]), cache=cache)
    with lab.record() as rec:
        generator = BatchGenerator(lab.model, max_tokens=7)
        generator.insert(PROMPTS[:2])
        tokens: dict[int, list[int]] = {}

        def advance(count: int) -> None:
            for _ in range(count):
                for r in generator.next_generated():
                    tokens.setdefault(r.uid, []).append(r.token)

        advance(3)
        generator.insert([PROMPTS[0]])
        generator.insert([PROMPTS[3]], caches=[cache])
        advance(3)
        other = batch_generate(lab.model, lab.tokenizer, PROMPTS[:2], max_tokens=2,
                               return_token_ids=True)  # fmt: skip
        advance(12)
        generator.close()
    check(rec)
    assert other.token_ids is not None
    assert rec.tokens["run"].nunique() == 2
    for number, prompt in enumerate([*PROMPTS[:2], PROMPTS[0]]):
        assert len(tokens[number]) == 7
        expect(sequence(rec.tokens, 0, number), prompt, tokens[number])
        if number < 2:
            expect(sequence(rec.tokens, 1, number), prompt, other.token_ids[number])
    expect(sequence(rec.tokens, 0, 3), PROMPTS[3], tokens[3], at=len(PROMPT))


def reference(lab: Lab, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and entropy by stock mlx-lm, over the whole sequence at once."""
    model, _ = stock.stock(lab.path)
    logits = np.array(model(mx.array([tokens]))[0].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1)
    chosen = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    return np.array([np.nan, *chosen]), np.array([np.nan, *entropy[:-1]])


def surprise(lab: Lab, frame: pd.DataFrame, tokens: Sequence[int], first: int, atol: float) -> None:
    """The frame's surprise is the reference's from token `first` on, and NaN before."""
    for name, values in zip(("logprob", "entropy"), reference(lab, tokens), strict=True):
        assert frame[name][:first].isna().all(), name
        np.testing.assert_allclose(frame[name][first:], values[first:], atol=atol, err_msg=name)


@pytest.mark.parametrize("prompt_logprobs", [False, True])
@pytest.mark.parametrize("chunk", [2048, 5])
@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "deepseek_v3"])
def test_surprise(family: str, chunk: int, prompt_logprobs: bool) -> None:
    with moelab.load(stock.folder(family), 0.5) as lab:
        with lab.record(prompt_logprobs=prompt_logprobs) as rec:
            tokens = [
                r.token
                for r in lab.stream(PROMPT, 6, prefill_step_size=chunk, temperature=2.0, seed=3,
                                    template=False, repetition_penalty=1.5)
            ]  # fmt: skip
        first = 1 if prompt_logprobs else len(PROMPT)
        surprise(lab, rec.tokens, [*PROMPT, *tokens], first, atol=1e-4)


def test_surprise_of_impossible_tokens() -> None:
    score = _Scorer()
    logits = np.array([0.0, 1.0, -np.inf, -3.0], np.float32)
    p = np.exp([0.0, 1.0, -3.0]) / np.exp([0.0, 1.0, -3.0]).sum()
    logprob, entropy = score(logits, 1)
    assert logprob == pytest.approx(np.log(p[1])) and entropy == pytest.approx(
        -(p * np.log(p)).sum()
    )
    assert score(logits, 2)[0] == -np.inf
    certain = np.array([-np.inf, 5.0, -np.inf], np.float32)
    assert score(certain, 1) == (0.0, 0.0)
    far = np.array([0.0, -2000.0, 3e4], np.float32)
    assert score(far, 2) == (0.0, 0.0) and score(far, 1)[0] == -32000.0
