"""The arms: the full model's routing imposed, and its past, against references made otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from scipy import special

import moelab
from moelab.errors import SchemaError, StudyError
from moelab.quality import arms as arming
from moelab.quality.arms import agreement, choices, run_arms, shares
from moelab.quality.imposed import find_point
from moelab.quality.judge import Reference, judged
from moelab.quality.window import Window
from tests.support import stock, tiny

TOKENS = tuple(tiny.prompt(24))
WINDOW = Window("a text", "prose", TOKENS, 12)
FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_next"]
"""A gate in the block; a router with groups; sliding windows; recurrent states."""


def by_arm(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.pivot(index="position", columns="arm", values="kl")


def kl(full: np.ndarray, lossy: np.ndarray) -> np.ndarray:
    p, q = (special.log_softmax(x.astype(np.float64), axis=-1) for x in (full, lossy))
    return np.asarray(special.rel_entr(np.exp(p), np.exp(q)).sum(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_arms(family: str) -> None:
    """What holds in every family: no damage without misses, and where the arms must agree."""
    with moelab.load(stock.folder(family), 6) as lab:
        for chunk in (None, 4):
            reference = Reference(lab, WINDOW, record=True, arms=True, chunk=chunk)
            assert (run_arms(lab, WINDOW, reference, "load")["kl"] == 0).all()
        reference = Reference(lab, WINDOW, record=True, arms=True)
        assert reference.routing is not None
        order = ["token", "layer", "expert"]
        full = choices(reference.routing).sort_values(order).reset_index(drop=True)
        for action in ("drop", "substitute"):
            frame = run_arms(lab, WINDOW, reference, action)
            damage = by_arm(frame)
            assert (damage.iloc[0] > 0).all()
            # Its past is undamaged in either, so the first token is the same, bit for bit.
            assert damage["own"].iloc[0] == damage["constrained"].iloc[0]
            assert not damage["own"].equals(damage["constrained"])
            assert not damage["imposed"].equals(damage["constrained"])
            _, imposed = judged(lab, WINDOW, reference, action, arm="imposed", record=True)
            _, plain = judged(lab, WINDOW, reference, action, record=True)
            assert imposed is not None and plain is not None
            pd.testing.assert_frame_equal(
                full, choices(imposed).sort_values(order).reset_index(drop=True)
            )
            assert not full.equals(choices(plain).sort_values(order).reset_index(drop=True))
            # The first MoE layer's router has seen nothing that was damaged at the first token.
            assert set(agreement(reference.routing, plain).iloc[:1]["agreement"]) == {1.0}
        lab.resize(1.0)
        frame = run_arms(lab, WINDOW, Reference(lab, WINDOW, record=True, arms=True), "drop")
        assert (frame["kl"] == 0).all(), "with every expert resident nothing is missed"


def test_columns() -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        reference = Reference(lab, WINDOW, record=True, arms=True)
        frame = run_arms(lab, WINDOW, reference, "drop")
        constrained, _ = judged(lab, WINDOW, reference, "drop")
        given = run_arms(lab, WINDOW, reference, "drop", constrained=constrained)
    pd.testing.assert_frame_equal(frame, given)
    assert list(frame.columns) == list(arming.COLUMNS)
    assert frame.groupby("arm", sort=False).size().to_dict() == {
        "constrained": 11, "imposed": 11, "own": 11
    }  # fmt: skip
    assert frame["position"].dtype == np.int32


def test_with_one_layer_there_is_nothing_to_split(tmp_path: Path) -> None:
    """A single layer's router and cache see only embeddings: all arms are the same run."""
    path = tiny.build(tmp_path / "one", "olmoe", overrides={"num_hidden_layers": 1})
    with moelab.load(path, 4) as lab:
        reference = Reference(lab, WINDOW, record=True, arms=True)
        damage = by_arm(run_arms(lab, WINDOW, reference, "drop"))
    assert (damage["constrained"] > 0).all()
    assert damage["imposed"].equals(damage["constrained"])
    assert damage["own"].equals(damage["constrained"])


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_own_is_a_token_alone(family: str) -> None:
    """Without swaps the bank never changes: each token is run by itself after an exact past."""
    window = Window("d", "x", TOKENS[:18], 12)
    with moelab.load(stock.folder(family), 6) as lab:
        want = []
        for at in range(12, 17):
            rows = []
            for action in ("load", "drop"):
                lab.set_on_miss("load")
                cache = make_prompt_cache(lab.model)
                mx.eval(lab.model(mx.array([TOKENS[:12]]), cache=cache))
                for token in TOKENS[12:at]:
                    mx.eval(lab.model(mx.array([[token]]), cache=cache))
                lab.set_on_miss(action, swap_budget=0)
                rows.append(np.array(lab.model(mx.array([[TOKENS[at]]]), cache=cache)[0]))
            want.append(kl(*rows)[0])
        lab.set_on_miss("load", swap_budget=None)
        reference = Reference(lab, window, record=True, arms=True)
        own, _ = judged(lab, window, reference, "drop", swap_budget=0, arm="own")
    np.testing.assert_allclose(own["kl"], want, rtol=1e-9)


def test_imposed_is_the_full_models_gates() -> None:
    """Gates that answer what stock mlx-lm's gates answered give the imposed run."""
    path = stock.folder("olmoe")
    model, _ = stock.stock(path)
    answers: list[list[mx.array]] = [[] for _ in model.layers]

    class Noting(nn.Module):
        def __init__(self, gate: nn.Module, kept: list[mx.array]) -> None:
            super().__init__()
            object.__setattr__(self, "parts", (gate, kept))

        def __call__(self, x: mx.array) -> mx.array:
            gate, kept = self.__dict__["parts"]
            kept.append(gate(x))
            return kept[-1]

    class Answering(nn.Module):
        def __init__(self, kept: list[mx.array]) -> None:
            super().__init__()
            object.__setattr__(self, "kept", iter(kept))

        def __call__(self, x: mx.array) -> mx.array:
            return next(self.__dict__["kept"])

    def run(on: Any, cache: Any) -> np.ndarray:
        rows = []
        for token in TOKENS[12:-1]:
            rows.append(on(mx.array([[token]]), cache=cache)[0, -1])
            mx.eval(rows[-1])
        return np.array(mx.stack(rows))

    cache = make_prompt_cache(model)
    model(mx.array([TOKENS[:12]]), cache=cache)
    gates = [layer.mlp.gate for layer in model.layers]
    for layer, gate, kept in zip(model.layers, gates, answers, strict=True):
        layer.mlp.gate = Noting(gate, kept)
    full = run(model, cache)
    for layer, gate in zip(model.layers, gates, strict=True):
        layer.mlp.gate = gate

    with moelab.load(path, 4) as lab:
        reference = Reference(lab, WINDOW, record=True, arms=True)
        imposed, _ = judged(lab, WINDOW, reference, "drop", arm="imposed")
        cache = make_prompt_cache(lab.model)
        mx.eval(lab.model(mx.array([TOKENS[:12]]), cache=cache))
        lab.set_on_miss("drop")
        for layer, kept in zip(lab.model.layers, answers, strict=True):
            layer.mlp.gate = Answering(kept)
        lossy = run(lab.model, cache)
    np.testing.assert_allclose(imposed["kl"], kl(full, lossy), rtol=1e-9)
    assert imposed["kl"].min() > 0


def test_the_model_is_left_as_it_was() -> None:
    with moelab.load(stock.folder("deepseek_v3"), 4, on_miss="drop") as lab:
        before = [type(module) for _, module in lab.model.named_modules()]
        run_arms(lab, WINDOW, Reference(lab, WINDOW, record=True, arms=True), "substitute")
        assert [type(module) for _, module in lab.model.named_modules()] == before


def test_routing_that_was_not_imposed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        reference = Reference(lab, WINDOW, arms=True)
        with pytest.raises(StudyError, match="record=True, arms=True"):
            run_arms(lab, WINDOW, reference, "drop")
        reference = Reference(lab, WINDOW, record=True, arms=True)
        monkeypatch.setattr(
            "moelab.quality.imposed._impose", lambda *_: lambda call, *args: call(*args)
        )
        with pytest.raises(StudyError, match="could not be imposed on olmoe"):
            run_arms(lab, WINDOW, reference, "drop")


def test_gates_that_are_not_called_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        beside = nn.Linear(4, 4)
        monkeypatch.setattr("moelab.quality.imposed.find_point", lambda *_: (beside, False))
        with pytest.raises(StudyError, match=r"layers \[0, 1\] are not called"):
            Reference(lab, WINDOW, arms=True)
        assert type(beside) is nn.Linear


def test_blocks_without_a_gate_are_refused() -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        site = lab.sites[0]
        gate = site.parent.pop("gate")
        try:
            with pytest.raises(StudyError, match="no gate beneath"):
                find_point(lab.model, site)
            site.parent["scorer"] = gate
            assert find_point(lab.model, site) == (gate, False)
        finally:
            site.parent.pop("scorer", None)
            site.parent["gate"] = gate


# -- figures -------------------------------------------------------------------------------


def damage_frame(seed: int, documents: int = 6) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rows = []
    for number in range(documents):
        for arm in ("constrained", "imposed", "own"):
            for position in range(3 + number):
                domain = "ab"[number % 2]
                rows.append((f"d{number}", domain, position, arm, random.exponential()))
    return pd.DataFrame(rows, columns=["document", "domain", "position", "arm", "kl"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_shares_are_ratios_of_sums(seed: int) -> None:
    frame = damage_frame(seed)
    found = shares(frame).set_index(["domain", "share"])
    assert list(dict.fromkeys(found.index.get_level_values(0))) == ["a", "b", "all"]
    for domain in ("a", "b", "all"):
        here = frame if domain == "all" else frame[frame["domain"] == domain]
        sums = here.groupby("arm")["kl"].sum()
        for share, arm in (("rerouting", "imposed"), ("inherited", "own")):
            row = found.loc[domain, share]
            assert row["mean"] == pytest.approx(1 - sums[arm] / sums["constrained"])
            assert row["low"] < row["mean"] < row["high"]
            assert row["documents"] == here["document"].nunique()


def test_shares_cover() -> None:
    """The interval of a share of which every document has its own holds the truth."""
    inside = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        rows = []
        for number in range(16):
            whole, part = random.exponential(), random.beta(4, 6)
            rows += [(f"d{number}", "a", "constrained", whole)]
            rows += [(f"d{number}", "a", arm, whole * (1 - part)) for arm in ("imposed", "own")]
        frame = pd.DataFrame(rows, columns=["document", "domain", "arm", "kl"])
        row = shares(frame, level=0.9).iloc[0]
        inside += row["low"] <= 0.4 <= row["high"]
    assert 46 <= inside <= 60


def test_shares_of_no_damage() -> None:
    frame = damage_frame(0).assign(kl=0.0)
    assert shares(frame)["mean"].isna().all()
    with pytest.raises(SchemaError, match="no column 'arm'"):
        shares(frame.drop(columns="arm"))


def test_agreement_is_brute_force() -> None:
    with moelab.load(stock.folder("qwen3_next"), 6) as lab:
        reference = Reference(lab, WINDOW, record=True)
        _, routing = judged(lab, WINDOW, reference, "drop", record=True)
    assert reference.routing is not None and routing is not None
    found = agreement(reference.routing, routing)
    layers = sorted(reference.routing["layer"].unique())
    assert len(found) == WINDOW.judged * len(layers)
    for row in found.itertuples():
        sets = []
        for frame in (reference.routing, routing):
            position = sorted(frame["position"].unique())[row.token]
            here = frame[(frame["position"] == position) & (frame["layer"] == row.layer)]
            sets.append(set(here["expert"]))
        assert row.agreement == len(sets[0] & sets[1]) / len(sets[0])
        assert row.top_k == len(sets[0])
    assert 0.1 < found["agreement"].mean() < 1
