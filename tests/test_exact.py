"""Promise 1: with `on_miss="load"` a lab's output is stock mlx-lm's, bit for bit."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.experts.residency import Residency
from moelab.lab import Lab
from tests.support import stock, tiny

LONG = 72
"""Tokens of a prompt that needs more experts than half of them."""
EVERY = [(family, quant) for family in tiny.FAMILIES for quant in ("affine4", "none")]
OTHERS = [q for q in stock.QUANTS if q not in ("affine4", "none")]


def partial(family: str) -> list[int]:
    return [c for c in tiny.capacities(family) if c < tiny.experts(family)[0]]


def logits(model: Any, seed: int) -> list[mx.array]:
    """A swept prefill, a short one and decoding, on caches of their own."""
    found = []
    for length, decoded in ((LONG, 4), (5, 6), (1, 2)):
        tokens = tiny.prompt(length + decoded, seed=seed)
        cache = make_prompt_cache(model)
        for chunk in [tokens[:length], *([t] for t in tokens[length:])]:
            found.append(model(mx.array([chunk]), cache=cache))
            mx.eval(found)
    return found


@functools.cache
def stock_logits(path: Path, seed: int) -> list[mx.array]:
    return logits(stock.stock(path)[0], seed)


def compare(path: Path, lab: Lab, seed: int = 0, dtype: Any = mx.float32) -> None:
    theirs = stock_logits(path, seed)
    for number, (a, b) in enumerate(zip(logits(lab.model, seed), theirs, strict=True)):
        assert a.dtype == dtype
        assert stock.equal(a, b), f"forward pass {number}"


@pytest.mark.parametrize(("family", "quant"), EVERY)
def test_every_family_layout_and_capacity(family: str, quant: str) -> None:
    experts, _ = tiny.experts(family)
    for number, layout in enumerate(stock.layouts(family, quant)):
        path = stock.folder(family, quant, seed=number, **layout)
        for capacity in tiny.capacities(family):
            with moelab.load(path, capacity) as lab:
                tally = stock.Tally(lab)
                compare(path, lab, seed=number)
                if capacity < experts:
                    assert tally.sweeps and tally.evictions, (layout, capacity)
                    decode = [e for e in tally.events if not e.swept]
                    assert any(load.evicted is not None for e in decode
                               for loads in e.rounds for load in loads)  # fmt: skip
                else:
                    assert not lab.attachment.switches and not tally.events


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("quant", OTHERS)
def test_other_quantisations(family: str, quant: str) -> None:
    path = stock.folder(family, quant, seed=1)
    for capacity in (partial(family)[0], partial(family)[-1]):
        with moelab.load(path, capacity) as lab:
            tally = stock.Tally(lab)
            compare(path, lab, seed=7)
            assert tally.sweeps and tally.evictions


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_scales(family: str) -> None:
    path = stock.folder(family, "affine4", dtype="bfloat16", shards=2)
    with moelab.load(path, partial(family)[0]) as lab:
        tally = stock.Tally(lab)
        compare(path, lab, dtype=mx.bfloat16)
        assert tally.sweeps and tally.evictions


@pytest.mark.parametrize("quant", ["none", "affine4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_widened(family: str, quant: str) -> None:
    """`dtype="float32"` is stock's model after `set_dtype`, through both layouts."""
    for layout in stock.layouts(family, quant)[1:]:
        path = stock.folder(family, quant, dtype="bfloat16", **layout)
        model, _ = mlx_lm.load(str(path), lazy=True)
        model.set_dtype(mx.float32)
        with moelab.load(path, partial(family)[0], dtype="float32") as lab:
            tally = stock.Tally(lab)
            for length in (LONG, 5, 1):
                tokens = mx.array([tiny.prompt(length, seed=length)])
                got = lab.model(tokens)
                assert got.dtype == mx.float32
                assert stock.equal(got, model(tokens))
            assert tally.sweeps and tally.evictions


def test_float16_widened(tmp_path: Path) -> None:
    path = tiny.build(tmp_path, "olmoe", quant=None)
    for file in tiny.shard_files(path):
        halved = {k: v.astype(mx.float16) for k, v in mx.load(str(file)).items()}  # type: ignore[union-attr]
        mx.eval(halved)
        mx.save_safetensors(str(file), halved, metadata={"format": "mlx"})
    model, _ = mlx_lm.load(str(path), lazy=True)
    model.set_dtype(mx.float32)
    tokens = mx.array([tiny.prompt(LONG)])
    with moelab.load(path, 4, dtype="float32") as lab:
        assert stock.equal(lab.model(tokens), model(tokens))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generate(family: str) -> None:
    path = stock.folder(family)
    for seed, chunk in ((0, 2048), (1, 16), (2, 3)):
        prompt = tiny.prompt(50, seed=seed)
        with moelab.load(path, partial(family)[-1]) as lab:
            tally = stock.Tally(lab)
            ours = stock.steps(lab.stream(prompt, 12, prefill_step_size=chunk))
            theirs = stock.stock_steps(path, prompt, 12, prefill_step_size=chunk)
            assert stock.same_steps(ours, theirs)
            assert tally.evictions and (tally.sweeps or chunk == 3)
            model, tokenizer = stock.stock(path)
            text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
            assert lab.generate(prompt, 12) == text
            assert mlx_lm.generate(lab.model, lab.tokenizer, prompt, max_tokens=12) == text


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batch_generate(family: str) -> None:
    """Rows of different lengths, padded as mlx-lm pads, some finished before others."""
    path = stock.folder(family)
    prompts = [tiny.prompt(n, seed=n) for n in (40, 7, 23)]
    options: dict[str, Any] = {
        "max_tokens": [9, 4, 12], "return_token_ids": True, "return_logprobs": True,
        "prefill_step_size": 16, "completion_batch_size": 2,
    }  # fmt: skip
    theirs = mlx_lm.batch_generate(*stock.stock(path), prompts, **options)
    for capacity in partial(family):
        with moelab.load(path, capacity) as lab:
            tally = stock.Tally(lab)
            ours = mlx_lm.batch_generate(lab.model, lab.tokenizer, prompts, **options)
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == theirs.logprobs
            assert 9 in map(len, ours.token_ids) or 12 in map(len, ours.token_ids)
            assert tally.sweeps and tally.evictions


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_interleaved_generators(family: str) -> None:
    """Two generations take turns over one bank: neither disturbs the other."""
    path = stock.folder(family)
    prompts = [tiny.prompt(30, seed=1), tiny.prompt(19, seed=2)]
    model, tokenizer = stock.stock(path)
    with moelab.load(path, partial(family)[0]) as lab:
        tally = stock.Tally(lab)
        running = [lab.stream(p, 10) for p in prompts]
        got = list(zip(*running, strict=True))
        assert tally.evictions
    for prompt, responses in zip(prompts, zip(*got, strict=True), strict=True):
        assert stock.same_steps(stock.steps(responses), stock.stock_steps(path, prompt, 10))
        want = mlx_lm.generate(model, tokenizer, prompt, max_tokens=10)
        assert "".join(r.text for r in responses) == want


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_thirty_lazy_outputs(family: str) -> None:
    """Outputs held unevaluated while their experts leave are right all the same."""
    path = stock.folder(family)
    model, _ = stock.stock(path)
    inputs = [mx.array([tiny.prompt(1 + i % 4, seed=i)]) for i in range(30)]
    with moelab.load(path, partial(family)[0]) as lab:
        tally = stock.Tally(lab)
        held = [lab.model(tokens) for tokens in inputs]
        assert tally.evictions > 30
        mx.eval(held)
    wrong = [i for i, (y, x) in enumerate(zip(held, inputs, strict=True))
             if not stock.equal(y, model(x))]  # fmt: skip
    assert not wrong


def test_lazy_outputs_of_a_switch() -> None:
    """The same of a switch by itself, where nothing evaluates on the way."""
    path = stock.folder("qwen2_moe")
    model, _ = stock.stock(path)
    x = mx.random.normal((30, 1, 64), key=mx.random.key(0))
    with moelab.load(path, 2) as lab:
        site = lab.sites[0]
        switch = site.parent[site.key]
        ids = [mx.array([[i % 16, (i + 5) % 16]], mx.uint32) for i in range(30)]
        held = [switch(x[i], ids[i]) for i in range(30)]
        theirs = [model.layers[0].mlp.switch_mlp(x[i], ids[i]) for i in range(30)]
        mx.eval(held, theirs)
        assert all(stock.equal(a, b) for a, b in zip(held, theirs, strict=True))


def test_quantised_cache() -> None:
    path = stock.folder("qwen3_moe")
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32}
    prompt = tiny.prompt(40)
    theirs = stock.stock_steps(path, prompt, 12, quantized_kv_start=0, **options)
    with moelab.load(path, 4) as lab:
        ours = stock.steps(lab.stream(prompt, 12, **options))
    assert stock.same_steps(ours, theirs)
    assert not stock.same_steps(theirs, stock.stock_steps(path, prompt, 12)), "8 bits did nothing"


@pytest.mark.parametrize("capacity", [6, 16, 32, 64])
def test_lab_model(capacity: int, lab_path: Path) -> None:
    prompt = tiny.prompt(90, seed=capacity, vocab=4000)
    with moelab.load("lab", capacity) as lab:
        tally = stock.Tally(lab)
        ours = stock.steps(lab.stream(prompt, 8, temperature=0.0, prefill_step_size=64))
        theirs = stock.stock_steps(lab_path, prompt, 8, prefill_step_size=64)
        assert stock.same_steps(ours, theirs)
        assert capacity == 64 or (tally.sweeps and tally.evictions)


def test_lab_model_with_a_quantised_cache(lab_path: Path) -> None:
    prompt = tiny.prompt(40, vocab=4000)
    with moelab.load("lab", 16) as lab:
        ours = stock.steps(lab.stream(prompt, 8, temperature=0.0, kv_bits=8))
    theirs = stock.stock_steps(lab_path, prompt, 8, kv_bits=8, quantized_kv_start=0)
    assert stock.same_steps(ours, theirs)


# The comparison itself must be able to fail: a bank that holds a wrong expert is found out.


def differs(path: Path, lab: Lab) -> bool:
    tokens = mx.array([tiny.prompt(LONG)])
    return not stock.equal(lab.model(tokens), stock.stock(path)[0](tokens))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_wrong_expert_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert of one layer is read from its neighbour's place, at each end of the model."""
    path = stock.folder(family)
    for number in (0, -1):
        with moelab.load(path, partial(family)[-1]) as lab:
            assert not differs(path, lab)
            lab.reset()
            instead = {}
            for tensor in lab.attachment.bank.layers[number].loader._tensors:
                instead[tensor.place(3)[1]] = tensor.place(4)[1]
            read = os.preadv
            used = []

            def wrong(fd: int, buffers: Any, offset: int, *flags: int) -> int:
                used.append(instead.get(offset))  # noqa: B023
                return read(fd, buffers, instead.get(offset, offset), *flags)  # noqa: B023

            monkeypatch.setattr(os, "preadv", wrong)
            assert differs(path, lab)
            assert set(used) > set(instead.values())
            monkeypatch.undo()
            lab.reset()
            assert not differs(path, lab)


def test_a_wrong_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's slot number points to where another expert sits."""
    path = stock.folder("olmoe")
    arrived = Residency.arrived

    def wrong(self: Residency, load: Any) -> None:
        arrived(self, load)
        if load.expert == 5 and load.slot > 0:
            self.slot_of[5] = 0

    with moelab.load(path, 8) as lab:
        monkeypatch.setattr(Residency, "arrived", wrong)
        assert differs(path, lab)
