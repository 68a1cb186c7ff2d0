"""Router-only discovery: loads nothing, leaves no trace, and predicts better than chance."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import psutil
import pytest

import moelab
from moelab.discovery import _Probe, _Probes
from moelab.errors import ClosedError, ProfileError
from moelab.experts.profile import Profile
from moelab.routing import session
from tests.support import stock, tiny
from tests.support.prediction import SHIPPED, held_out, recalls

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


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = moelab.load(stock.folder("olmoe"), 4)
    with lab.record() as rec, pytest.raises(ProfileError, match="being recorded"):
        discovered(lab)
    assert rec.tokens.empty
    with pytest.raises(ProfileError, match="No text has 500 tokens"):
        discovered(lab, 500)
    with monkeypatch.context() as patch:
        own = session.manifest
        patch.setattr(session, "manifest", lambda *a, **k: {**own(*a, **k), "on_miss": "reroute"})
        with pytest.raises(ProfileError, match="on_miss='reroute'"):
            discovered(lab)
        with pytest.raises(ProfileError, match="no profile of the model"):
            moelab.profile(lab, TEXTS, tokens=9, progress=False)
    lab.close()
    with pytest.raises(ClosedError):
        discovered(lab)


def test_it_predicts_real_use_of_held_out_texts() -> None:
    """On the shipped model; `profiles/README.md` has figures for more texts."""
    texts = [{**text, "text": text["text"][:450]} for text in held_out(1)]
    with moelab.load("lab", 0.5) as lab:
        table = recalls(lab, texts, (8, 16, 32), moelab.read_profile(SHIPPED))
    first = table.xs(0, level="layer")
    assert (first["discover"] == first["oracle"]).all(), "layer 0 is exact"
    assert (table["discover"] <= table["oracle"]).all()
    assert (table["discover"] > table["chance"]).all()
    mean = table.groupby("C").mean()
    # Of what could be gained over chance, a text's own router-only pass gains most, and more than
    # a profile of other texts does.
    gained = (mean["discover"] - mean["chance"]) / (mean["oracle"] - mean["chance"])
    assert (gained > 0.6).all(), mean
    assert (mean["discover"] > mean["known"]).all(), mean
