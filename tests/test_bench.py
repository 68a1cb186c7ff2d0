"""The benchmark measures what it says: its arithmetic, its control and its limit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from moelab.bench import load as load_module
from moelab.bench.decode import ReadBack, bench_decode
from moelab.bench.rounds import ratio, run_rounds
from moelab.families import find_switches

from .support import tiny


def test_ratio_of_a_constant_factor_is_exact() -> None:
    reference = np.array([1.0, 2.0, 3.0, 5.0])
    found = ratio(reference, 2 * reference)
    assert (found.median, found.low, found.high) == (0.5, 0.5, 0.5)


def test_ratio_is_paired_by_round() -> None:
    """A machine that slows down for everybody within a round changes nothing."""
    drift = np.array([1.0, 4.0, 0.5, 2.0, 1.5])
    found = ratio(drift * 3.0, drift * 4.0)
    assert found.median == pytest.approx(0.75)
    assert found.high - found.low < 1e-9


def test_ratio_interval_covers_a_noisy_truth() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        measured = np.exp(random.normal(0, 0.1, 15))
        found = ratio(np.ones(15), measured)
        covered += found.low <= 1.0 <= found.high
    assert covered >= 50


def test_every_contestant_runs_once_a_round_in_changing_order() -> None:
    calls: list[tuple[str, int]] = []

    def contestant(name: str):  # type: ignore[no-untyped-def]
        def run(number: int) -> float:
            calls.append((name, number))
            return float(number + 1)

        return run

    names = ["a", "b", "c"]
    seconds = run_rounds({n: contestant(n) for n in names}, 6, warmup=1, seed=3, progress=False)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 7
    assert all(sorted(name for name, _ in one) == names for one in rounds)
    assert len({tuple(name for name, _ in one) for one in rounds}) > 1
    for name in names:
        np.testing.assert_array_equal(seconds[name], np.arange(1, 7))


def test_the_limit_model_computes_what_stock_computes(tmp_path: Path) -> None:
    path = tiny.build(tmp_path / "m", "qwen3_next")
    stock = mlx_lm.load(str(path))[0]
    reading = mlx_lm.load(str(path))[0]
    for site in find_switches(reading, "test"):
        site.parent[site.key] = ReadBack(site.switch)
    tokens = mx.array([tiny.prompt(20)])
    assert mx.array_equal(stock(tokens), reading(tokens))


def test_bench_decode_measures_all_and_saves(tmp_path: Path) -> None:
    result = bench_decode("lab", rounds=2, tokens=3, shares=(1.0, 0.25), progress=False)
    full, quarter = result.capacities
    assert (full.capacity, quarter.capacity) == (64, 16)
    assert full.loads_per_token == 0
    assert full.hit_rate == 1
    assert quarter.loads_per_token > 0
    assert quarter.bytes_per_token == pytest.approx(quarter.loads_per_token * 30720)
    assert set(result.seconds) >= {"stock", "stock again", "ids read back", "25.0% bare read"}
    assert all(len(times) == 2 and min(times) > 0 for n, times in result.seconds.items()
               if not n.startswith("100.0% bare"))  # fmt: skip
    result.save(tmp_path)
    saved = json.loads((tmp_path / "bench-decode.json").read_text())
    assert saved["capacities"][1]["capacity"] == 16
    page = (tmp_path / "bench-decode.md").read_text()
    assert "16 (25.0%)" in page
    assert "second copy of stock" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench-decode.json", "bench-decode.md"]


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose pack file is made beside it."""
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tiny.build(tmp_path / "m", "qwen3_next", shards=2)


def joined(ranges: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in as few ranges as possible."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def test_bench_load_reads_the_same_bytes(
    loading: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader and the bare read fetch the same ranges, in every state and from each file."""
    read = os.preadv
    ranges: dict[tuple[str, int], set[tuple[int, int]]] = {}
    now: list[str] = []

    def noted(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        at = offset
        for buffer in buffers:
            size = memoryview(buffer).nbytes
            if now:
                ranges.setdefault((now[-1], os.fstat(fd).st_ino), set()).add((at, at + size))
            at += size
        return read(fd, buffers, offset, *flags)

    def one_by_one(contestants: Any, rounds: int, **_: Any) -> dict[str, np.ndarray]:
        seconds = {name: np.zeros(rounds) for name in contestants}
        for name, run in contestants.items():
            for number in range(rounds):
                now.append(name)
                seconds[name][number] = run(number)
        now.clear()
        return seconds

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr(load_module, "run_rounds", one_by_one)
    result = load_module.bench_load(loading, rounds=2, threads=(1, 2), progress=False)
    assert result.experts == 16 and result.ranges == {"checkpoint": 9, "pack file": 1}
    names = {name for name, _ in ranges}
    assert len(names) == 2 * 2 * 2 * 2
    for name in names:
        if name.endswith(", raw"):
            own = name.removesuffix(", raw")
            mine = {inode: joined(r) for (n, inode), r in ranges.items() if n == own}
            bare = {inode: joined(r) for (n, inode), r in ranges.items() if n == name}
            assert mine == bare
            nbytes = sum(end - begin for found in mine.values() for begin, end in found)
            assert 16 * result.expert_bytes <= nbytes <= 32 * result.expert_bytes


def test_bench_load_sums_up_and_saves(loading: Path, tmp_path: Path) -> None:
    result = load_module.bench_load(loading, rounds=3, threads=(1, 2), progress=False)
    assert [(r.source, r.cache, r.threads) for r in result.rows] == [
        (source, cache, n)
        for source in ("checkpoint", "pack file") for cache in ("cold", "warm") for n in (1, 2)
    ]  # fmt: skip
    nbytes = result.experts * result.expert_bytes
    row = result.rows[-1]
    own = np.array(result.seconds["pack file, warm, 2"])
    raw = {n: np.array(result.seconds[f"pack file, warm, {n}, raw"]) for n in (1, 2)}
    assert row.gb_per_second == pytest.approx(nbytes / np.median(own) / 1e9)
    assert row.of_raw.median == pytest.approx(np.median(raw[2] / own))
    best = min(raw.values(), key=np.median)
    assert row.of_best_raw.median == pytest.approx(np.median(best / own))
    result.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "bench-load.json").read_text())
    assert saved["rows"][-1]["threads"] == 2 and len(saved["seconds"]) == 16
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "bench-load.json", "bench-load.md",
    ]  # fmt: skip


def test_bench_load_says_when_nothing_could_be_made_cold(
    loading: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share, says in ((None, "cannot be known here"), (0.7, "up to 70% of the bytes stayed")):
        monkeypatch.setattr(load_module, "cached_share", lambda _, share=share: share)
        page = load_module.bench_load(loading, rounds=1, threads=(1,), progress=False).page()
        assert says in page and "| pack file | warm | 1 |" in page
        assert "| cold |" not in page
