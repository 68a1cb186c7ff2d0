"""Whole models of fewer bytes, against checkpoints in which the same was done on disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pandas as pd
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.errors import CapacityError, MoelabError, StudyError
from moelab.experts.attach import arrays_in
from moelab.quality.window import windows_of
from moelab.study.bytes import at_equal_bytes
from moelab.study.comparators import comparators, kept_experts
from moelab.study.rows import COLUMNS
from moelab.study.sweep import sweep
from moelab.study.whole import fewer_bits, pruned
from tests.support import stock, tiny
from tests.support.lowbit import requantised

FAMILIES = ["qwen2_moe", "qwen3_next", "mixtral", "gpt_oss", "deepseek_v3"]
OVERRIDES: dict[str, dict[str, Any]] = {"deepseek_v3": {"n_group": 1, "topk_group": 1}}
IDS = tiny.prompt(14)
TEXTS = [
    {"text": "The bank holds some experts, and others are on disk, where they wait.", "id": "a"},
    {"text": "A router chooses a few of many for every token that it is given to read.", "id": "b"},
]


@pytest.fixture(autouse=True)
def _kept_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    yield


def folder(family: str, root: Path) -> Path:
    if family not in OVERRIDES:
        return stock.folder(family)
    return tiny.build(root / family, family, overrides=OVERRIDES[family])


def left(path: Path, experts: int, count: int, layers: Sequence[int]) -> dict[int, list[int]]:
    """Other experts in every layer."""
    rng = np.random.default_rng(len(path.name))
    return {n: sorted(rng.choice(experts, count, replace=False).tolist()) for n in layers}


def cut_on_disk(source: Path, target: Path, kept: Mapping[int, Sequence[int]], count: int) -> Path:
    """Writes a checkpoint that never had the other experts, for stock mlx-lm to load."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if name in config:
            config[name] = count
    (target / "config.json").write_text(json.dumps(config))
    routed = re.compile(r"layers\.(\d+)\.\w+\.(?:switch_mlp\.|experts\.|gate\.(?!.*proj)|router\.)")
    for file in tiny.shard_files(target):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        for name, array in arrays.items():
            found = routed.search(name)
            if found:
                arrays[name] = array[mx.array(list(kept[int(found[1])]))]
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    return target


def run(model: Any, ids: Sequence[int] = IDS) -> list[mx.array]:
    """Logits of a chunk and of the tokens after it, one at a time."""
    cache = make_prompt_cache(model)
    out = [model(mx.array([list(ids[:9])]), cache=cache)]
    mx.eval(out)
    for token in ids[9:]:
        out.append(model(mx.array([[token]]), cache=cache))
        mx.eval(out[-1])
    return out


def same(a: Sequence[mx.array], b: Sequence[mx.array]) -> bool:
    return len(a) == len(b) and all(stock.equal(x, y) for x, y in zip(a, b, strict=True))


# -- experts removed ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_is_the_checkpoint_without_those_experts(family: str, tmp_path: Path) -> None:
    path = folder(family, tmp_path)
    experts, top_k = tiny.experts(family)
    count = max(top_k + 1, experts - 3)
    kept = left(path, experts, count, tiny.moe_layers(family))
    model, _ = mlx_lm.load(str(cut_on_disk(path, tmp_path / "cut", kept, count)))[:2]
    want = run(model)
    for capacity in (top_k, experts):  # read from disk, and taken from memory
        with moelab.load(path, capacity) as lab:
            before = run(lab.model)
            with pruned(lab, kept) as whole:
                assert same(run(lab.model), want)
            assert not same(before, want)
            assert same(run(lab.model), before), "the lab is not as it was"
        weights = [a.nbytes for _, a in mlx_flat(model)]
        assert whole.expert_bytes + whole.trunk_bytes == sum(weights)
        assert set(whole.experts) == {count}


def mlx_flat(model: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_the_shipped_model_without_half_of_its_experts(lab_path: Path, tmp_path: Path) -> None:
    kept = left(lab_path, 64, 32, range(8))
    model, _ = mlx_lm.load(str(cut_on_disk(lab_path, tmp_path / "cut", kept, 32)))[:2]
    want = run(model)
    with moelab.load("lab", 8) as lab, pruned(lab, kept):
        assert same(run(lab.model), want)


def test_all_experts_left_is_the_full_model() -> None:
    with moelab.load(stock.folder("qwen2_moe"), 4) as lab:
        full = run(lab.model)
        with pruned(lab, {site.layer: range(site.experts) for site in lab.sites}):
            assert same(run(lab.model), full)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2_moe", lambda k: {}, "nothing of layer 0"),
        ("qwen2_moe", lambda k: {**k, 1: [0]}, "Layer 1 keeps 1 experts, and a token chooses"),
        ("qwen2_moe", lambda k: {**k, 1: [0, 0, 0, 0, 0]}, "Layer 1 keeps 1 experts"),
        ("qwen2_moe", lambda k: {**k, 0: [0, 1, 2, 3, 99]}, "kept names 0 to 99"),
        ("deepseek_v3", lambda k: k, "chooses experts by groups"),
    ],
)
def test_what_cannot_be_pruned(family: str, change: Any, message: str) -> None:
    with moelab.load(stock.folder(family), 0.5) as lab:
        before = run(lab.model)
        kept = {site.layer: list(range(site.experts - 1)) for site in lab.sites}
        with pytest.raises(StudyError, match=message), pruned(lab, change(kept)):
            pass
        assert same(run(lab.model), before)


def test_a_router_that_is_not_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the rows of the router were left, ids of removed experts would be asked for."""
    from moelab.study import whole

    with moelab.load(stock.folder("qwen2_moe"), 4) as lab:
        before = run(lab.model)
        monkeypatch.setattr(whole._Rows, "put", lambda self, array: None)
        kept = {site.layer: range(6) for site in lab.sites}
        with pytest.raises(StudyError, match="is known"), pruned(lab, kept):
            pass
        monkeypatch.undo()
        assert same(run(lab.model), before)


# -- fewer bits ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "capacity"), [("qwen3_next", 4), ("gpt_oss", 1.0)])
def test_fewer_bits_are_the_checkpoints_weights_requantised(
    family: str, capacity: int | float
) -> None:
    path = stock.folder(family)
    model, _ = mlx_lm.load(str(path))[:2]
    for block in model.modules():
        for key, child in list(block.items()):
            if type(child).__name__ == "SwitchGLU":
                block[key] = requantised(child, 2)
    want = run(model)
    with moelab.load(path, capacity) as lab:
        before = run(lab.model)
        with fewer_bits(lab, 2) as whole:
            got = run(lab.model)
            switches = [site.parent[site.key] for site in lab.sites]
            assert whole.expert_bytes == sum(a.nbytes for s in switches for a in arrays_in(s))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-4)
        assert same(run(lab.model), before)
        assert max(float(mx.abs(a - b).max()) for a, b in zip(got, before, strict=True)) > 0.01
        assert whole.kind == "whole_2bit" and whole.trunk_bytes == lab.memory().trunk
        with pytest.raises(StudyError, match="bits must be one of 2, 3"), fewer_bits(lab, 7):
            pass


# -- the lab afterwards ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bits", "pruned"])
def test_a_lossy_lab_is_as_it_was_after_an_interrupt(kind: str) -> None:
    with moelab.load(stock.folder("qwen3_next"), 4, on_miss="substitute", swap_budget=1) as lab:
        lab.reset()
        before = run(lab.model)
        gates = [dict(site.parent.gate.items()) for site in lab.sites]
        kept = {site.layer: range(8) for site in lab.sites}
        opened = fewer_bits(lab, 3) if kind == "bits" else pruned(lab, kept)
        with pytest.raises(KeyboardInterrupt), opened:
            assert lab.on_miss == "load"
            run(lab.model)
            raise KeyboardInterrupt
        assert (lab.on_miss, lab.swap_budget) == ("substitute", 1)
        assert same(run(lab.model), before)
        for site, gate in zip(lab.sites, gates, strict=True):
            assert all(site.parent.gate[key] is value for key, value in gate.items())
            assert site.parent.num_experts == site.experts
        with lab.record(), pytest.raises(MoelabError, match="being recorded"), pruned(lab, kept):
            pass


# -- rows ------------------------------------------------------------------------------------


def test_rows_stand_beside_a_sweeps() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 4) as lab:
        profile = moelab.profile(lab, TEXTS, tokens=16, progress=False)
        experts = lab.sites[0].experts
        frame = comparators(
            lab, TEXTS, bits=(2, 8), capacity=[6, experts], profile=profile, prefix=8, tokens=5,
            progress=False,
        )  # fmt: skip
        swept = sweep(
            lab, [4, 8], on_miss=["load", "drop"], prompts=TEXTS, prefix=8, tokens=5,
            progress=False,
        ).frame  # fmt: skip
        low = [windowed(lab, 2, exact) for exact in (True, False)]
        own = comparators(
            lab, TEXTS, bits=2, prefix=8, tokens=5, exact_prefix=False, progress=False
        )
    assert list(frame.columns) == list(COLUMNS) == list(swept.columns)
    assert (frame.dtypes == swept.dtypes).all()
    by = frame.groupby(["on_miss", "capacity"], sort=False)
    assert list(by.groups) == [("whole_2bit", experts), ("whole_8bit", experts),
                               ("pruned", 6), ("pruned", experts)]  # fmt: skip
    # Nothing removed is the full model, bit for bit; more bits than the checkpoint's cost little.
    assert (by.get_group(("pruned", experts))["kl_max"] == 0).all()
    assert by.get_group(("whole_8bit", experts))["kl_max"].max() < 1e-3
    assert by.get_group(("pruned", 6))["kl_mean"].min() > 0
    assert by.get_group(("whole_2bit", experts))["kl_mean"].tolist() == pytest.approx(
        low[0], abs=1e-9
    )
    assert own["on_miss"].tolist() == ["whole_2bit(own prefix)"] * 2
    assert own["kl_mean"].tolist() == pytest.approx(low[1], abs=1e-9)
    assert low[0] != low[1] and own["point"][0] not in set(frame["point"])
    # The same words for the same bytes, and the same reference.
    exact = swept[(swept["on_miss"] == "load") & (swept["capacity"] == 8)].set_index("prompt")
    six = by.get_group(("pruned", 6)).set_index("prompt")
    everything = by.get_group(("pruned", experts)).set_index("prompt")
    slot = int(exact["bytes_slots"].iloc[0]) // 8
    assert (six["bytes_slots"] == 6 * slot).all()
    assert (everything["bytes_trunk"] == exact["bytes_trunk"]).all()
    assert (six["bytes_trunk"] < exact["bytes_trunk"]).all()
    pd.testing.assert_series_equal(six["nll_reference"], exact["nll_reference"])
    assert six["window"].tolist() == exact["window"].tolist()
    assert (six["hits"] == six["routed"]).all()
    assert six["routed"].tolist() == exact["routed"].tolist()
    both = at_equal_bytes(pd.concat([swept, frame], ignore_index=True))
    assert {"pruned", "whole_2bit", "drop", "load"} <= set(both["on_miss"])


def test_quantised_caches_are_counted_as_they_are(lab_path: Path) -> None:
    with moelab.load(lab_path, 1.0) as lab:
        frames = [
            comparators(
                lab, TEXTS[:1], bits=8, prefix=8, tokens=3, kv_bits=bits, progress=False
            ).iloc[0]
            for bits in (None, 8)
        ]
    plain, few = frames
    assert np.isnan(plain["kv_bits"]) and few["kv_bits"] == 8
    assert few["bytes_cache"] < plain["bytes_cache"] and few["kl_mean"] > 0
    assert few["bytes"] - few["bytes_cache"] == plain["bytes"] - plain["bytes_cache"]


def windowed(lab: Any, bits: int, exact_prefix: bool) -> list[float]:
    """KL of whole models by hand: plain numpy from two runs' logits."""
    found = []
    for window in windows_of(lab.tokenizer, TEXTS, prefix=8, tokens=5):
        lab.on_miss = "load"
        chunk = mx.array([list(window.tokens[:8])])
        full, few = make_prompt_cache(lab.model), make_prompt_cache(lab.model)
        mx.eval(lab.model(chunk, cache=full))
        if exact_prefix:
            mx.eval(lab.model(chunk, cache=few))
        p = [np.array(lab.model(mx.array([[t]]), cache=full)[0, -1]) for t in window.fed]
        with fewer_bits(lab, bits):
            if not exact_prefix:
                mx.eval(lab.model(chunk, cache=few))
            q = [np.array(lab.model(mx.array([[t]]), cache=few)[0, -1]) for t in window.fed]
        found.append(float(np.mean([kl(a, b) for a, b in zip(p, q, strict=True)])))
    return found


def kl(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    p, q = np.exp(a - a.max()), np.exp(b - b.max())
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def test_blocks_of_prompts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from moelab.study import comparators as module

    with moelab.load(stock.folder("olmoe"), 4) as lab:
        asked: dict[str, Any] = {"bits": (2, 3), "prefix": 8, "tokens": 3, "progress": False}
        once = comparators(lab, TEXTS, **asked)
        monkeypatch.setattr(module, "blocks", lambda windows: [(w,) for w in windows])
        pd.testing.assert_frame_equal(comparators(lab, TEXTS, **asked), once)
    assert once["prompt"].tolist() == ["a", "b"] * 2


@pytest.mark.parametrize("worth", ["counts", "mass"])
def test_the_most_used_stay(worth: Any) -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        profile = moelab.profile(lab, TEXTS, tokens=16, progress=False)
        slots = {site.layer: 5 for site in lab.sites}
        kept = kept_experts(profile, slots, worth)
    usage = profile.usage.groupby(["layer", "expert"])["count" if worth == "counts" else "mass"]
    for layer, group in usage.sum().groupby("layer"):
        values = group.to_numpy()
        assert kept[layer] == sorted(kept[layer]) and len(set(kept[layer])) == 5
        others = np.delete(values, kept[layer])
        assert values[kept[layer]].min() >= others.max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": ()}, StudyError, "nothing to compare with"),
        ({"bits": (2, 2)}, StudyError, "bits has a value twice"),
        ({"bits": 7}, StudyError, "bits must be one of"),
        ({"capacity": [1]}, CapacityError, "top"),
        ({"capacity": [8], "worth": "luck"}, StudyError, "worth must be"),
        ({"prompts": []}, StudyError, "no text"),
        ({"prefix": 500}, StudyError, "too short"),
        ({"split": "train"}, StudyError, "split must be one of"),
        ({"kv_bits": 3}, StudyError, "kv_bits"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"prompts": TEXTS, "prefix": 8, "tokens": 4, "bits": 2, **options}
    with moelab.load(stock.folder("olmoe"), 4) as lab, pytest.raises(error, match=message):
        comparators(lab, given.pop("prompts"), progress=False, **given)
