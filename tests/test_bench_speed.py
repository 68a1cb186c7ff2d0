"""The benchmarks of prefill and swap, and the model that they use: arithmetic and structure."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import moelab
from moelab.bench import combinations as combinations_module
from moelab.bench import model as model_module
from moelab.bench.combinations import DEFAULT, Combination, combinations, load_combination
from moelab.bench.decode import bench_decode
from moelab.bench.model import Shape, bench_folder, make
from moelab.bench.prefill import ChunkLog, bench_prefill, first_token_seconds, watching
from moelab.bench.swap import bench_swap, capacities_for, growth
from moelab.checkpoint.headers import read_headers
from moelab.errors import MoelabError
from moelab.experts.residency import Load
from tests.support import stock, tiny

SMALL = Shape(
    layers=2, hidden=128, intermediate=64, experts=8, top_k=2, heads=2, kv_heads=1, head_dim=64
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "small"
    make(folder, SMALL, progress=False)
    return folder


# The bench model.


def test_the_bench_model_is_what_it_says() -> None:
    shape = Shape()
    assert (shape.hidden, shape.intermediate, shape.experts, shape.top_k) == (2048, 512, 128, 8)
    assert 0.9e9 < shape.nbytes < 1.1e9
    experts = [s for shard in shape.tensors() for n, s in shard.items() if "switch_mlp" in n]
    assert len(experts) == 3 * shape.layers and all(bits == 4 for _, bits in experts)


def test_a_made_model_runs_and_is_exact(small: Path) -> None:
    model, tokenizer = mlx_lm.load(str(small))[:2]
    spans = read_headers(small)
    norms = sum(span.nbytes for name, span in spans.items() if "norm" in name)
    assert sum(span.nbytes for span in spans.values()) == SMALL.nbytes + norms
    assert {span.dtype for span in spans.values()} == {"U32", "F32"}
    assert tokenizer.decode(tokenizer.encode("a router")).endswith("a router")
    tokens = mx.array([tokenizer.encode("the router sends each token to a few of the experts")])
    wanted = model(tokens)
    assert float(wanted.std()) > 0.1
    with moelab.load(small, 2) as lab:
        tally = stock.Tally(lab)
        assert stock.equal(lab.model(tokens), wanted)
        assert tally.sweeps


def test_weights_have_the_variance_they_should(small: Path) -> None:
    """Dequantised: mean 0, variance 1 over the width; embeddings 1, the router's 9 times."""
    weights = mx.load(str(small / "model-00002-of-00003.safetensors"))
    assert isinstance(weights, dict)
    for name, bits, scale in (
        ("self_attn.q_proj", 4, 1.0), ("mlp.gate", 8, 3.0), ("mlp.switch_mlp.down_proj", 4, 1.0),
    ):  # fmt: skip
        at = f"model.layers.0.{name}"
        w = mx.dequantize(
            weights[f"{at}.weight"], weights[f"{at}.scales"], weights[f"{at}.biases"], 64, bits
        )
        assert abs(float(w.mean())) < 0.05 * float(w.std())
        assert float(w.std()) * np.sqrt(w.shape[-1]) == pytest.approx(scale, rel=0.05)


def test_made_again_it_is_the_same(small: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", SMALL, progress=False)
    for file in sorted(small.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_it_is_made_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    calls: list[Shape] = []

    def small_one(folder: Path, shape: Shape, **options: Any) -> None:
        calls.append(shape)
        make(folder, SMALL, **options)

    monkeypatch.setattr(model_module, "make", small_one)
    folder = bench_folder("bench", progress=False)
    assert folder.parent == tmp_path / "cache"
    assert bench_folder("bench", progress=False) == folder
    assert calls == [Shape()]
    assert bench_folder(tmp_path / "cache" / folder.name) == folder
    assert bench_folder("lab").name == "checkpoint"


@pytest.mark.parametrize("place", ["save_safetensors", "copyfile", "rename"])
def test_whole_or_absent(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = {"save_safetensors": mx, "copyfile": shutil, "rename": Path}[place]
    monkeypatch.setattr(owner, place, full)
    with pytest.raises(MoelabError, match="MOELAB_CACHE"):
        make(tmp_path / "m", SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "m", SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_space_is_said_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1_000_000))
    with pytest.raises(MoelabError, match=r"1\.00 MB are free"):
        make(tmp_path / "m", SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_who_is_second_takes_what_is_there(tmp_path: Path) -> None:
    make(tmp_path / "m", SMALL, progress=False)
    before = (tmp_path / "m" / "config.json").stat().st_mtime_ns
    make(tmp_path / "m", SMALL, progress=False)
    assert (tmp_path / "m" / "config.json").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# Prefill.


def test_bench_prefill_counts_and_saves(small: Path, tmp_path: Path) -> None:
    result = bench_prefill(
        small, rounds=2, lengths=(5, 40), shares=(0.5, 0.25), chunk=16, progress=False
    )
    assert [(r.tokens, r.capacity) for r in result.rows] == [(5, 4), (5, 2), (40, 4), (40, 2)]
    span = sum(s.nbytes for n, s in read_headers(small).items() if "switch_mlp" in n)
    for row in result.rows:
        assert row.most_reads == 1
        assert row.loads > 0 and row.bytes_read == pytest.approx(row.loads * span / 16)
        assert row.limit.low >= 1 and row.seconds > 0 and row.stock_seconds > 0
    # Three chunks of 16, the last token and the next: each expert at most once in each.
    assert all(r.loads <= 8 * 2 * 5 for r in result.rows)
    assert result.rows[3].loads > result.rows[2].loads
    result.save(tmp_path)
    page = (tmp_path / "bench-prefill.md").read_text()
    assert "| 40 tokens | 2 (25.0%)" in page and "most reads a chunk" in page
    saved = json.loads((tmp_path / "bench-prefill.json").read_text())
    assert saved["rows"][0]["tokens"] == 5
    assert set(saved["seconds"]) >= {"5 tokens, stock", "40 tokens, 25.0% bare read"}


def test_a_second_read_in_a_chunk_is_seen(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count can fail: a bank that reads every expert of a chunk twice."""
    with moelab.load(small, 2) as lab:
        for layer in lab.attachment.bank.layers:
            once = layer.load

            def twice(loads: Sequence[Load], once: Any = once) -> None:
                once(loads)
                once(loads)

            monkeypatch.setattr(layer, "load", twice)
        log = ChunkLog()
        with watching(lab, log):
            first_token_seconds(lab.model, tiny.prompt(30), 2048, log)
        assert log.most_reads == 2
        assert log not in lab.attachment.bank.watchers


def test_a_read_in_each_chunk_is_none_too_many() -> None:
    log = ChunkLog()
    for _ in range(3):
        log.loaded(0, [Load(4, 0, None), Load(5, 1, None)], [0.0, 0.0])
        log.loaded(1, [Load(4, 0, None)], [0.0])
        log.progress(1, 3)
    assert log.most_reads == 1
    log.loaded(0, [Load(4, 0, None)], [0.0])
    log.loaded(0, [Load(4, 1, None)], [0.0])
    assert log.most_reads == 2


# Swap.


def test_growth_of_a_line_is_exact() -> None:
    capacities = [8, 16, 32, 64]
    cost = np.array([[100 + 0.5 * c for c in capacities]] * 5) * np.arange(1, 6)[:, None]
    found = growth(capacities, cost)
    assert found.growth.median == pytest.approx(0.5 * 56 / 104)
    assert found.growth.high - found.growth.low < 1e-9, "paired: a slower round changes nothing"
    assert found.slope.median == pytest.approx(1.5)
    assert found.verdict == "grows with C"
    assert found.microseconds == pytest.approx([3 * (100 + 0.5 * c) for c in capacities])


def test_verdicts_of_growth() -> None:
    random = np.random.default_rng(0)
    capacities = [8, 16, 32, 64]
    flat = 100 * (1 + 0.01 * random.standard_normal((15, 4)))
    assert growth(capacities, flat).verdict == "flat"
    copied = np.array([10.0 * c for c in capacities]) * (1 + 0.01 * random.standard_normal((15, 4)))
    found = growth(capacities, copied)
    assert found.verdict == "grows with C"
    assert found.growth.median == pytest.approx(7, rel=0.1)
    assert growth(capacities, copied[:, ::-1]).verdict == "does not grow"
    noisy = np.array([[100 + s * c for c in capacities] for s in np.linspace(-1, 1, 15)])
    assert growth(capacities, noisy).verdict == "not certain"


def test_which_capacities() -> None:
    assert capacities_for(8, 128) == [8, 16, 32, 64, 127]
    assert capacities_for(2, 8) == [2, 4, 7]
    assert capacities_for(2, 3) == [2]
    assert capacities_for(6, 64) == [6, 12, 24, 48, 63]


def test_bench_swap_measures_and_saves(small: Path, tmp_path: Path) -> None:
    result = bench_swap(small, rounds=3, fills=4, progress=False)
    assert result.capacities == [2, 4, 7]
    span = sum(s.nbytes for n, s in read_headers(small).items() if "switch_mlp" in n)
    assert result.expert_bytes == span / 16
    assert all(t > 0 for t in result.fill.microseconds)
    assert all(
        use > fill
        for fill, use in zip(result.fill.microseconds, result.use.microseconds, strict=True)
    )
    result.save(tmp_path)
    assert "| 7 of 8 |" in (tmp_path / "bench-swap.md").read_text()
    assert json.loads((tmp_path / "bench-swap.json").read_text())["capacities"] == [2, 4, 7]


# Decode, by policy and miss action.


def test_which_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combinations_module, "_known_policies", lambda: ["lru", "lfu"])
    monkeypatch.setattr(combinations_module, "_known_actions", lambda: ["load", "drop"])
    assert combinations("lru", "load") == [DEFAULT]
    assert combinations("sieve, lru,sieve", ["drop"]) == [("sieve", "drop"), ("lru", "drop")]
    assert combinations("all", "all") == [
        ("lru", "load"), ("lru", "drop"), ("lfu", "load"), ("lfu", "drop"),
    ]  # fmt: skip


def test_decode_of_several_combinations(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row a combination, the labs of one at a time, and all experts only by default."""
    asked: list[tuple[float, Combination]] = []
    together: list[int] = []
    alive: list[Any] = []

    def loaded(folder: Path, share: float, combination: Combination) -> Any:
        asked.append((share, combination))
        alive[:] = [lab for lab in alive if not lab._closed]
        lab = load_combination(folder, share, DEFAULT)
        alive.append(lab)
        together.append(len(alive))
        return lab

    monkeypatch.setattr("moelab.bench.decode.load_combination", loaded)
    result = bench_decode(
        small, rounds=2, tokens=2, shares=(1.0, 0.25), policies="lru,lfu", on_miss="load,drop",
        progress=False,
    )  # fmt: skip
    rows = [(c.policy, c.on_miss, c.share) for c in result.capacities]
    assert rows == [
        ("lru", "load", 1.0), ("lru", "load", 0.25), ("lru", "drop", 0.25),
        ("lfu", "load", 0.25), ("lfu", "drop", 0.25),
    ]  # fmt: skip
    assert max(together) == 4, "a lab and its recorded twin, for each share"
    assert [c.recording is None for c in result.capacities] == [False, False, True, True, True]
    assert [c.hit_rate is None for c in result.capacities] == [False, False, True, False, True]
    assert {"lru, load: stock", "lfu, drop: 25.0%"} <= set(result.seconds)
    result.save(tmp_path)
    page = (tmp_path / "bench-decode.md").read_text()
    assert "| lfu | drop | 2 (25.0%) |" in page and "lossy" in page
    assert len(json.loads((tmp_path / "bench-decode.json").read_text())["capacities"]) == 5
