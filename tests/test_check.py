"""`moelab check`: it says exact where that is so, it can fail, and its report is whole."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import moelab.check.run
import moelab.check.speed
from moelab.check import CheckReport, check
from moelab.check.exact import Difference, check_exactness, compare, given, lengths
from moelab.check.model import open_model
from moelab.check.pagecache import Piece, cached_share, drop
from moelab.errors import CapacityError, CheckpointError, MoelabError
from moelab.experts.capacity import Memory
from moelab.experts.loader import ExpertLoader
from moelab.experts.residency import Load
from moelab.experts.switch import PartialSwitch
from tests.support import tiny

TITLES = (
    "**Verdict:",
    "## 1. Does the bank compute what the model computes?",
    "## 2. How much does stock differ from itself?",
    "## 3. How fast do experts come from disk?",
    "## 4. Does it take the memory that was asked for?",
    "## 5. How fast is it?",
    "## 6. The machine and the model",
    "## How to send this back",
    "## Layer by layer",
)


def quick(path: Path, **options: Any) -> CheckReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moelab.check.speed, "ROUNDS", 2)
        return check(path, **{"tokens": 8, "progress": False, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("check") / "qwen3_next", "qwen3_next")


@pytest.fixture(scope="module")
def report(folder: Path) -> CheckReport:
    return quick(folder)


@pytest.fixture
def wrong_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bank reads expert 4 where it should read expert 3."""
    read: Callable[[ExpertLoader, Load], float] = ExpertLoader.read_one

    def misread(self: ExpertLoader, load: Load) -> float:
        return read(self, load._replace(expert=4) if load.expert == 3 else load)

    monkeypatch.setattr(ExpertLoader, "read_one", misread)


@pytest.fixture
def other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Banks round otherwise where there are many tokens, as on a GPU."""
    call = PartialSwitch.__call__

    def rounded(self: PartialSwitch, x: mx.array, indices: mx.array) -> Any:
        y = call(self, x, indices)
        return y if indices.size == indices.shape[-1] else y * (1 + 2.0**-22)

    monkeypatch.setattr(PartialSwitch, "__call__", rounded)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_exact(family: str, tmp_path: Path) -> None:
    quant = None if family in ("olmoe", "gpt_oss") else tiny.QUANT
    layout: tiny.Layout = "per_expert" if family in ("mixtral", "olmoe") else "stacked"
    path = tiny.build(tmp_path / family, family, quant=quant, layout=layout, shards=2)
    report = quick(path)
    assert report.verdict == "exact"
    assert report.as_promised is True
    layers = {c.layer for c in report.exactness.checks}
    assert layers == set(tiny.moe_layers(family))
    for layer in layers:
        some = [c for c in report.exactness.checks if c.layer == layer]
        assert all(c.evictions for c in some if c.kind == "decode")
        assert any(c.swept for c in some)
    assert report.speed is not None
    assert report.speed.same_bits is True
    assert report.speed.same_tokens is True
    assert report.memory is not None
    assert report.memory.kept


def test_a_wrong_expert_is_found(folder: Path, wrong_expert: None) -> None:
    report = quick(folder)
    assert report.verdict == "NOT exact"
    assert report.as_promised is False
    longest = max(c.tokens for c in report.exactness.checks)
    whole = [c for c in report.exactness.checks if c.tokens == longest]
    assert not any(report.exactness.close(c) for c in whole)
    assert report.speed is not None
    assert report.speed.same_bits is False
    page = report.page()
    assert "**Verdict: NOT exact.**" in page
    assert "wrong results" in page


@pytest.mark.filterwarnings("ignore:The weights of layers")
def test_other_rounding_in_prefill_is_close(folder: Path, other_kernel: None) -> None:
    report = quick(folder)
    assert report.verdict == "exact in decode and close in prefill"
    assert report.as_promised is False  # on a CPU
    assert "Not as promised: on a CPU" in report.page()
    machine = dataclasses.replace(report.machine, backend="Metal")
    on_metal = dataclasses.replace(report, machine=machine)
    assert on_metal.as_promised is True
    assert "As promised for a GPU" in on_metal.page()


def test_whole_model_that_differs_is_not_exact(report: CheckReport) -> None:
    assert report.speed is not None
    speed = dataclasses.replace(report.speed, same_bits=False)
    changed = dataclasses.replace(report, speed=speed)
    assert changed.verdict == "NOT exact"
    assert "the whole model does not" in changed.page()


def test_nothing_compared_is_not_called_exact(report: CheckReport) -> None:
    exactness = dataclasses.replace(report.exactness, checks=[])
    changed = dataclasses.replace(report, exactness=exactness)
    assert changed.verdict == "not checked"
    assert changed.as_promised is None
    assert "says nothing about exactness" in changed.page()


def test_longest_inputs_use_every_expert(folder: Path) -> None:
    for layer in open_model(folder).layers:
        *_, shorter, longest = lengths(layer)
        for tokens in (shorter, longest):
            _, ids = given(layer, tokens, 0)
            assert set(ids.ravel().tolist()) == set(range(layer.experts))
            assert all(len(set(row)) == layer.site.top_k for row in ids[0].tolist())


def test_compare_tells_bits_from_values() -> None:
    a = mx.array([1.0, -2.0])
    assert compare([a], [a + 0]) == Difference(True, 0.0, 0.0)
    assert compare([mx.array([0.0])], [mx.array([-0.0])]) == Difference(False, 0.0, 0.0)
    assert compare([a], [mx.array([1.5, -2.0])]) == Difference(False, 0.5, 0.25)
    nan = mx.array([1.0, float("nan")])
    assert compare([nan], [nan]).equal
    assert compare([a, nan], [a, a]) == Difference(False, None, None)


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
def test_one_layer_is_in_memory_at_a_time(layout: tiny.Layout, tmp_path: Path) -> None:
    model = open_model(tiny.build(tmp_path / "model", "qwen3_next", quant=None, layout=layout))
    layer_bytes = max(layer.experts * layer.expert_bytes for layer in model.layers)
    mx.clear_cache()
    before = mx.get_active_memory()
    left: list[int] = []
    check_exactness(
        model, [None] * len(model.layers), lambda: left.append(mx.get_active_memory() - before)
    )
    assert len(left) == len(model.layers)
    assert max(left) < layer_bytes / 2


def test_json_comes_back_whole(report: CheckReport) -> None:
    text = report.to_json()
    assert CheckReport.from_json(text) == report
    assert json.loads(text)["verdict"] == report.verdict
    assert json.loads(text)["format"] == 1
    for broken in ("", "[]", "{}", text.replace('"format": 1', '"format": 2')):
        with pytest.raises(MoelabError):
            CheckReport.from_json(broken)


def test_report_names_no_place_and_no_host(report: CheckReport, folder: Path) -> None:
    for text in (report.to_json(), report.page()):
        for name in (str(folder.parent), str(Path.home()) + "/", socket.gethostname()):
            assert name not in text
    assert report.model.name == "qwen3_next"


def test_page_has_every_part(report: CheckReport) -> None:
    page = report.page()
    places = [page.index(title) for title in TITLES]
    assert places == sorted(places)
    assert "check.json" in page
    assert report._repr_markdown_() == page
    assert "None" not in page
    assert "nan" not in page


def test_page_says_that_the_machine_was_busy(report: CheckReport) -> None:
    for busy, said in ((0.0, False), (0.9, True)):
        machine = dataclasses.replace(report.machine, busy=busy)
        page = dataclasses.replace(report, machine=machine).page()
        assert ("Other programs used 90%" in page) is said


def test_save_is_whole_or_not_at_all(
    report: CheckReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = report.save(tmp_path / "a" / "b")
    assert sorted(p.name for p in saved.iterdir()) == ["check.json", "check.md"]
    assert (saved / "check.md").read_text(encoding="utf-8") == report.page()
    (tmp_path / "file").touch()
    with pytest.raises(MoelabError, match="cannot be written"):
        report.save(tmp_path / "file")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MoelabError, match="no space left"):
        report.save(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_interrupted_check_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moelab.check.speed, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_that_cannot_be_run_is_compared_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moelab.experts.capacity.available_memory", lambda: Memory(1000, "next to nothing")
    )
    report = quick(folder)
    assert report.verdict == "exact"
    assert report.speed is None
    assert report.memory is None
    assert "Not run: There is too little memory" in report.page()
    assert CheckReport.from_json(report.to_json()) == report


def test_stock_is_not_run_where_it_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moelab.check.speed, "available_memory", lambda: Memory(1000, "a little"))
    report = quick(folder, capacity=8)
    assert report.speed is not None
    assert report.speed.stock is None
    assert set(report.speed.capacity) == {8}
    page = report.page()
    assert "Stock mlx-lm was not run" in page
    assert "a little" in page
    assert "÷" not in page
    assert CheckReport.from_json(report.to_json()) == report


def test_unknown_page_cache_is_said_to_be_unknown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bandwidth", "speed"):
        monkeypatch.setattr(f"moelab.check.{module}.cached_share", lambda _: None)
    report = quick(folder)
    assert {rate.state for rate in report.bandwidth.rates} == {"unknown"}
    assert report.bandwidth.miss_cold_ms is None
    page = report.page()
    assert "could not be found out" in page
    assert "is not known" in page
    assert "cold 0" not in page


def test_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1_000_000)
    pieces = [Piece(path, 10, 5000), Piece(path, 500_000, 400_000)]
    path.read_bytes()
    assert cached_share(pieces) in (None, 1.0)
    drop(pieces)  # whether that works depends on the file system
    assert (share := cached_share(pieces)) is None or 0 <= share <= 1
    assert cached_share([Piece(tmp_path / "none", 0, 1)]) is None


@pytest.mark.parametrize("kind", ["missing_shard", "truncated_shard", "offsets_beyond"])
def test_damaged_model(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        quick(tiny.broken(tmp_path / "model", kind), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        quick(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="dense"):
        quick(tiny.build(tmp_path / "dense", "dense"))
    with pytest.raises(CapacityError):
        quick(folder, capacity=1)
    with pytest.raises(ValueError, match="at least 2"):
        quick(folder, tokens=1)
