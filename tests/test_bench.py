"""The benchmark measures what it says: its arithmetic, its control and its limit."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

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
