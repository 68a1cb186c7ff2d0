"""Router-only discovery: loads nothing, leaves no trace, and predicts better than chance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest

import moelab
from moelab import labmodel
from moelab.discovery import _Probe, _Probes
from moelab.errors import ClosedError, ProfileError
from moelab.experts.profile import Profile
from tests.support import stock, tiny

TEXTS = [
    {"text": "the router sends each token to a few of the experts", "domain": "router"},
    {"text": "an expert that is not in memory is read from its shard", "domain": "router"},
    {"text": "0123456789 + 9876543210 = 11111111100", "domain": "sums"},
]


class Loads:
    """Watches a bank."""

    def __init__(self) -> None:
        self.seen = 0

    def loaded(self, layer: int, loads: Any, seconds: Any) -> None:
        self.seen += len(loads)


def discovered(lab: Any, tokens: int = 9) -> Profile:
    return moelab.discover(lab, TEXTS, tokens=tokens, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_loads_nothing_and_leaves_no_trace(
    family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stock.folder(family, dtype=dtype)
    experts, top_k = tiny.experts(family)
    prompt = tiny.prompt(12)
    expected = stock.stock_steps(path, prompt, 4)
    with moelab.load(path, experts // 2) as lab:
        lab.generate(prompt, 2, template=False)
        before = [(s.path, s.parent[s.key]) for s in lab.sites]
        names = [name for name, _ in lab.model.named_modules()]
        residents = [dict(layer.residency.slot_of) for layer in lab.attachment.bank.layers]
        watcher = Loads()
        lab.attachment.bank.watchers.append(watcher)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *_: pytest.fail("read from a shard"))
            active = mx.get_active_memory()
            found = discovered(lab)
            mx.clear_cache()
            grown = mx.get_active_memory() - active
        assert watcher.seen == 0
        # Nor did MLX read the stock switches' lazy tensors by itself.
        smallest = min(a.nbytes for s in lab.sites for _, _, a in s.tensors() if a.nbytes > 4096)
        assert grown < smallest
        assert residents == [dict(x.residency.slot_of) for x in lab.attachment.bank.layers]
        assert all(site.parent[site.key] is switch
                   for site, (_, switch) in zip(lab.sites, before, strict=True))  # fmt: skip
        assert names == [name for name, _ in lab.model.named_modules()]
        assert stock.same_steps(stock.steps(lab.stream(prompt, 4, template=False, temperature=0)),
                                expected)  # fmt: skip
        assert found.predicted and found.fingerprint == lab.fingerprint
        assert found.provenance["made_by"] == "moelab.discover"
        for use in found.uses:
            for layer in found.layers:
                assert use.counts[layer].sum() == use.tokens * top_k
                assert (use.mass[layer][use.counts[layer] > 0] > 0).all()


def test_lazy_experts_are_not_read() -> None:
    """By the process's own count of bytes, where the system keeps one."""
    with moelab.load(stock.folder("qwen2_moe"), 4) as lab, _Probes(lab) as probes:
        probes.run(tiny.prompt(9))  # what is imported or opened once
        process = psutil.Process()
        counts = hasattr(process, "io_counters")  # not on a Mac
        before = process.io_counters().read_chars if counts else 0
        probes.run(tiny.prompt(9, seed=1))
        if counts:
            expert = lab.attachment.bank.layers[0].loader.expert_disk_bytes
            assert process.io_counters().read_chars - before < expert


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_first_moe_layer_is_exact(family: str) -> None:
    """Nothing routed comes before it."""
    with moelab.load(stock.folder(family), tiny.experts(family)[1]) as lab:
        predicted = discovered(lab).usage
        real = moelab.profile(lab, TEXTS, tokens=9, progress=False).usage
    first = tiny.moe_layers(family)[0]
    assert predicted[predicted["layer"] == first].equals(real[real["layer"] == first])
    assert not predicted.equals(real), "the others lack what the experts add"


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_capacity_makes_no_difference(family: str) -> None:
    found = []
    for capacity in tiny.capacities(family):
        with moelab.load(stock.folder(family), capacity) as lab:
            found.append(discovered(lab).usage)
    assert all(found[0].equals(other) for other in found[1:])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_answer_has_the_switch_s_shape_and_type(family: str, dtype: str) -> None:
    path = stock.folder(family, dtype=dtype)
    with moelab.load(path, 0.5) as lab:
        for site in lab.sites[:1]:
            x = mx.ones((1, 3, 64), getattr(mx, dtype))
            ids = mx.zeros((1, 3, site.top_k), mx.uint32)
            probe = _Probe(site.layer, site.parent[site.key], [])
            zeros, real = probe(x, ids), site.parent[site.key](x, ids)
            assert (zeros.shape, zeros.dtype) == (real.shape, real.dtype)
            assert not mx.any(mx.array(zeros)).item()


def test_an_interrupt_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder("qwen3_moe")
    prompt = tiny.prompt(8)
    with moelab.load(path, 4) as lab:
        before = [site.parent[site.key] for site in lab.sites]
        own, calls = _Probe.__call__, [0]

        def interrupted(self: Any, *args: Any) -> mx.array:
            calls[0] += 1
            if calls[0] == 4:
                raise KeyboardInterrupt
            return own(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(_Probe, "__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                discovered(lab)
        assert calls[0] == 4
        assert all(s.parent[s.key] is b for s, b in zip(lab.sites, before, strict=True))
        assert stock.same_steps(
            stock.steps(lab.stream(prompt, 3, template=False, temperature=0)),
            stock.stock_steps(path, prompt, 3),
        )


def test_refused() -> None:
    lab = moelab.load(stock.folder("olmoe"), 4)
    with lab.record() as rec, pytest.raises(ProfileError, match="being recorded"):
        discovered(lab)
    assert rec.tokens.empty
    with pytest.raises(ProfileError, match="No text has 500 tokens"):
        discovered(lab, 500)
    lab.close()
    with pytest.raises(ClosedError):
        discovered(lab)


def recall(real: Profile, other: Profile, layer: int, capacity: int) -> float:
    """Share of the slots really routed that go to the other's top C experts."""
    counts = real.counts(layer)
    assert counts is not None
    return float(counts[other.order(layer)[:capacity]].sum() / counts.sum())


def test_it_predicts_real_use_of_held_out_texts() -> None:
    """On the shipped model; `profiles/README.md` has the figures for all test texts."""
    texts = [
        {"text": text["text"][:450], "domain": domain}
        for domain in labmodel.DOMAINS
        for text in labmodel.texts(domain, "test")[:1]
    ]
    known = moelab.read_profile(Path(__file__).parent.parent / "profiles" / "lab.json")
    capacity = 16
    with moelab.load("lab", 0.5) as lab:
        predicted = moelab.discover(lab, texts, progress=False)
        real = moelab.profile(lab, texts, progress=False)
    shares = {
        name: [recall(real, profile, layer, capacity) for layer in real.layers]
        for name, profile in {"predicted": predicted, "known": known, "oracle": real}.items()
    }
    uniform = capacity / 64
    first = shares["predicted"][0], shares["oracle"][0]
    assert first[0] == first[1], "layer 0 is exact"
    assert all(a <= b for a, b in zip(shares["predicted"], shares["oracle"], strict=True))
    assert min(shares["predicted"]) > uniform, shares
    mean = {name: float(np.mean(values)) for name, values in shares.items()}
    # Of what could be gained over chance, most is.
    assert mean["predicted"] - uniform > 0.5 * (mean["oracle"] - uniform), mean
