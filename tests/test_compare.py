"""`compare`: its figures against pandas, what is exactly zero, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_lm
import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.errors import MissActionError, ProfileError, SchemaError, StudyError
from moelab.quality.arms import agreement
from moelab.quality.compare import Comparison, check_tokenizers, compare, noise_floor
from moelab.quality.judge import Reference, judge, judged
from moelab.quality.summary import FIGURES, by_domain_and_all, check_tokens, summarise
from moelab.quality.window import Window
from tests.support import stock, tiny

TOKENS = tuple(tiny.prompt(22))
WINDOWS = [
    Window(f"d{n}", domain, TOKENS[n:] + TOKENS[:n], 10)
    for n, domain in enumerate(["prose", "prose", "math", "math"])
]
ZERO = [
    "kl_mean", "kl_mean_low", "kl_mean_high", "kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999",
    "kl_max", "ln_ppl_ratio", "ln_ppl_ratio_se", "ln_ppl_ratio_low", "ln_ppl_ratio_high", "dp_mean",
    "dp_rms", "entropy_shift", "entropy_shift_dz",
]  # fmt: skip
ONE = ["same_top1", "same_top1_low", "same_top1_high"]
QUIET: dict[str, Any] = {"prefix": 10, "progress": False}


def assert_zero(found: Comparison) -> None:
    # A domain with one document has no interval.
    assert (found.summary[ZERO].fillna(0) == 0).all(axis=None)
    assert (found.summary[ONE].fillna(1) == 1).all(axis=None)
    assert found.summary[["kl_mean", "ln_ppl_ratio", "same_top1"]].notna().all(axis=None)
    assert found.summary.iloc[-1].notna().all()
    assert found.summary["ppl"].equals(found.summary["ppl_reference"])


@pytest.fixture(scope="module")
def dropped() -> Comparison:
    with moelab.load(stock.folder("olmoe"), 4, on_miss="drop") as lab:
        return compare(lab, WINDOWS, arms=True, **QUIET)


def test_rows_and_columns(dropped: Comparison) -> None:
    assert list(dropped.summary.columns) == ["domain", *FIGURES]
    assert dropped.summary["domain"].tolist() == ["prose", "math", "all"]
    assert dropped.summary["tokens"].tolist() == [22, 22, 44]
    assert dropped.summary["documents"].tolist() == [2, 2, 4]
    assert len(dropped.tokens) == 44
    assert dropped.arms is not None and len(dropped.arms) == 3 * 44


def test_the_tokens_are_the_judged_ones(dropped: Comparison) -> None:
    frames: list[pd.DataFrame] = []
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        # In another order, and with nothing kept between them.
        for window in WINDOWS[::-1]:
            frames.insert(0, judge(lab, window, Reference(lab, window), "drop"))
    pd.testing.assert_frame_equal(dropped.tokens, pd.concat(frames, ignore_index=True))


def test_figures_are_pandas(dropped: Comparison) -> None:
    for row in dropped.summary.itertuples():
        rows = dropped.tokens
        rows = rows if row.domain == "all" else rows[rows["domain"] == row.domain]
        kl = rows["kl"]
        assert row.kl_mean == pytest.approx(kl.mean())
        for name, q in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("p999", 99.9)):
            assert getattr(row, f"kl_{name}") == pytest.approx(np.percentile(kl, q))
        assert row.kl_max == kl.max()
        nll, full = -rows["logprob"].mean(), -rows["logprob_reference"].mean()
        assert row.ppl == pytest.approx(np.exp(nll))
        assert row.ppl_reference == pytest.approx(np.exp(full))
        assert row.ln_ppl_ratio == pytest.approx(np.log(row.ppl / row.ppl_reference))
        assert row.same_top1 == rows["same_top1"].sum() / len(rows)
        change = np.exp(rows["logprob"]) - np.exp(rows["logprob_reference"])
        assert row.dp_mean == pytest.approx(change.mean())
        assert row.dp_rms == pytest.approx(np.sqrt(np.square(change).mean()))
        shift = rows["entropy"] - rows["entropy_reference"]
        assert row.entropy_shift == pytest.approx(shift.mean())
        assert row.entropy_shift_dz == pytest.approx(shift.mean() / shift.std())
        # Two documents of equal length: the standard error is that of their two means.
        if row.domain != "all":
            gap = (rows["logprob_reference"] - rows["logprob"]).groupby(rows["document"]).mean()
            assert row.ln_ppl_ratio_se == pytest.approx(gap.std() / np.sqrt(2))
        assert row.ln_ppl_ratio_low < row.ln_ppl_ratio < row.ln_ppl_ratio_high
        assert 0 <= row.kl_mean_low < row.kl_mean < row.kl_mean_high


def test_errors_are_paired_and_clustered() -> None:
    """An error over tokens, or one over unpaired runs, would be far from this one."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(24):
        hard, hurt = random.normal(3, 1), random.exponential(0.2)
        for position in range(30):
            full = -abs(random.normal(hard, 0.5))
            rows.append((f"d{number}", "abc"[number % 3], position, full, full - hurt))
    frame = pd.DataFrame(
        rows, columns=["document", "domain", "position", "logprob_reference", "logprob"]
    )
    frame = frame.assign(phase="decode", token_id=1, kl=0.1, same_top1=True, entropy=1.0)
    frame["entropy_reference"] = 1.0
    row = by_domain_and_all(frame).iloc[-1]
    gap = frame["logprob_reference"] - frame["logprob"]
    naive = gap.std() / np.sqrt(len(gap))
    unpaired = np.hypot(
        *[
            frame[n].groupby(frame["document"]).mean().std()
            for n in ("logprob", "logprob_reference")
        ]
    ) / np.sqrt(24)
    assert 3 * naive < row["ln_ppl_ratio_se"] < unpaired / 3


@pytest.mark.parametrize("family", ["olmoe", "qwen3_next", "deepseek_v3"])
def test_the_model_against_itself_is_zero(family: str) -> None:
    with moelab.load(stock.folder(family), 6) as lab:
        found = compare(lab, WINDOWS[:3], arms=True, **QUIET)
        assert_zero(found)
        assert found.arms is not None and (found.arms["kl"] == 0).all()
        assert found.shares["mean"].isna().all(), "no damage has no shares"
        assert found.routing_agreement is not None
        assert (found.routing_agreement[["agreement", "low", "high"]] == 1).all(axis=None)
        assert_zero(compare(lab, WINDOWS[:2], mode="chunk", chunk=5, **QUIET))
        # Nothing of a lossy run is left when all that is needed is there.
        lab.resize(1.0)
        assert_zero(compare(lab, WINDOWS[:2], on_miss="drop", **QUIET))


def test_the_noise_floor() -> None:
    with moelab.load(stock.folder("olmoe"), 4, on_miss="drop", swap_budget=2) as lab:
        own, budget = lab.capacities, object()
        lab.budget = budget  # type: ignore[assignment]
        for capacity in (None, 12):
            found = noise_floor(lab, WINDOWS, capacity=capacity, **QUIET)
            assert_zero(found)
            assert found.settings["reference_capacity"] == 4
            assert found.settings["capacity"] == (capacity or found.settings["capacity"]) != 4
            assert (lab.capacities, lab.on_miss, lab.swap_budget) == (own, "drop", 2)
            assert lab.budget is budget
        with pytest.raises(StudyError, match="has 4 experts a layer already"):
            noise_floor(lab, WINDOWS, capacity=4, **QUIET)
        assert lab.capacities == own


def test_references_of_other_kinds() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 4, on_miss="drop") as lab, moelab.load(path, 9, on_miss="drop") as full:
        itself = compare(lab, WINDOWS[:2], **QUIET)
        for reference in (full, stock.stock(path)):
            found = compare(lab, WINDOWS[:2], reference, **QUIET)
            pd.testing.assert_frame_equal(found.tokens, itself.tokens)
            assert_zero(compare(lab, WINDOWS[:2], reference, on_miss="load", **QUIET))
        assert found.routing_agreement is None, "stock mlx-lm is not recorded"
        assert full.on_miss == "drop"
        assert "reference_fingerprint" in compare(lab, WINDOWS[:2], full, **QUIET).settings


def test_routing_agreement(dropped: Comparison) -> None:
    parts = []
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        for window in WINDOWS:
            reference = Reference(lab, window, record=True)
            _, routing = judged(lab, window, reference, "drop", record=True)
            assert reference.routing is not None and routing is not None
            parts.append(agreement(reference.routing, routing))
    want = pd.concat(parts).groupby("layer")["agreement"].mean()
    found = dropped.routing_agreement
    assert found is not None
    np.testing.assert_allclose(found.set_index("layer")["agreement"], want)
    experts, top_k = tiny.experts("olmoe")
    assert (found["chance"] == top_k / experts).all()
    assert (found["tokens"] == 44).all() and (found["documents"] == 4).all()


def test_by_position_and_by(dropped: Comparison) -> None:
    found = dropped.by_position(5)
    assert found["after"].tolist() == [0, 5, 10] and found["tokens"].tolist() == [20, 20, 4]
    first = dropped.tokens[dropped.tokens["position"] < 16]
    assert found["kl_mean"][0] == pytest.approx(first["kl"].mean())
    assert dropped.by("phase")["kl_mean"][0] == dropped.summary["kl_mean"].iloc[-1]
    assert dropped.by("domain", "document")["tokens"].tolist() == [11] * 4
    with pytest.raises(StudyError, match="bucket is a number of tokens"):
        dropped.by_position(0)
    with pytest.raises(SchemaError, match="no column 'colour'"):
        dropped.by("colour")


def test_settings_and_repr(dropped: Comparison) -> None:
    said = dropped.settings
    assert json.loads(json.dumps(said)) == said
    assert said["prefix"] == 10 and said["chunk"] is None and said["mode"] == "token"
    assert said["on_miss"] == "drop" and said["capacity"] == 4 and said["swap_budget"] is None
    assert said["initial_bank"]["0"] == [0, 1, 2, 3] or set(said["initial_bank"]["0"]) == {
        0,
        1,
        2,
        3,
    }
    assert {"fingerprint", "pins", "policy", "versions", "kv_bits", "judged"} <= set(said)
    text = repr(dropped)
    for part in (
        "4 of 16 experts", "drop, at most 2 (top-k)", "44 tokens of 4 documents in 2 domains",
        "prefix of 10 that ran exactly", "damage by re-routing", "95%: ",
    ):  # fmt: skip
        assert part in text
    assert "<table>" in dropped._repr_html_() and "inherited" in dropped._repr_html_()


def test_one_document_has_no_interval() -> None:
    with moelab.load(stock.folder("olmoe"), 4, on_miss="drop") as lab:
        found = compare(lab, WINDOWS[:1], mode="chunk", **QUIET)
    row = found.summary.iloc[0]
    assert len(found.summary) == 2 and np.isnan(row["kl_mean_low"]) and row["kl_mean"] > 0
    assert "no interval: one document a domain" in repr(found)
    assert "in chunks of 16" in repr(found) and set(found.tokens["phase"]) == {"chunk"}


def test_the_lab_model_on_its_own_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelab.quality.compare.EACH", 1)
    found = compare("lab", prefix=8, tokens=2, capacity=24, on_miss="drop", progress=False)
    assert found.summary["domain"].tolist() == [*moelab.labmodel.DOMAINS, "all"]
    assert found.summary["documents"].tolist() == [1] * 6 + [6]
    assert found.settings["texts"] == "moelab's test texts"
    assert found.settings["capacity"] == 24
    assert found.summary["kl_mean"].iloc[-1] > 0


def test_texts_of_one_kind_have_one_row() -> None:
    with moelab.load(stock.folder("olmoe"), 4, on_miss="drop") as lab:
        text = lab.tokenizer.decode(list(TOKENS))
        length = len(lab.tokenizer.encode(text))
        found = compare(lab, [text, text], prefix=5, tokens=None, progress=False)
        assert found.summary["domain"].tolist() == ["all"]
        assert found.tokens["document"].unique().tolist() == ["text 0", "text 1"]
        assert found.settings["judged"] == [length - 6] * 2
        assert found.summary["kl_mean_low"][0] == found.summary["kl_mean_high"][0], "the same twice"


def test_what_is_refused() -> None:
    with moelab.load(stock.folder("olmoe"), 4, on_miss="drop") as lab:
        refused: list[tuple[dict[str, Any], str]] = [
            ({"mode": "fast"}, "mode is 'token'"),
            ({"chunk": 4}, "chunk=4 is for mode='chunk'"),
            ({"mode": "chunk", "chunk": 0}, "chunk is how many tokens"),
            ({"level": 95}, "level is a share"),
            ({"reference": "lab"}, "reference is a Lab"),
            ({"reference": lab, "arms": True, "kv_bits": 8}, "Arms impose|kv_bits adds"),
            ({"kv_bits": 8, "arms": True}, "kv_bits adds another"),
            ({"prefix": 9}, r"prefixes of \[10\] tokens, and prefix is 9"),
        ]
        for options, message in refused:
            with pytest.raises(StudyError, match=message):
                compare(lab, WINDOWS, **{**QUIET, **options})
        with pytest.raises(StudyError, match="There is no text"):
            compare(lab, [], **QUIET)
        with pytest.raises(StudyError, match=r"1 of 2 texts are too short .*'text 1' \(1\)"):
            compare(lab, ["9 " * 40, "9"], prefix=10, tokens=2, progress=False)
        with pytest.raises(StudyError, match="prefix is a number of tokens"):
            compare(lab, prefix="x", progress=False)  # type: ignore[arg-type]
        with pytest.raises(MissActionError):
            compare(lab, WINDOWS, on_miss="forget", **QUIET)
        with pytest.raises(MissActionError, match="swap_budget"):
            compare(lab, WINDOWS, swap_budget=-1, **QUIET)
        with pytest.raises(ProfileError, match="capacity cannot be set"):
            compare(lab, WINDOWS, capacity=4, **QUIET)
        assert lab.on_miss == "drop" and not lab.sessions


def test_other_tokenizers() -> None:
    with moelab.load(stock.folder("olmoe"), 4, on_miss="drop") as lab:
        model, tokenizer = mlx_lm.load(str(stock.folder("gpt_oss")))[:2]
        check_tokenizers(lab, SimpleNamespace(tokenizer=tokenizer), WINDOWS)  # type: ignore[arg-type]
        own = tokenizer.get_vocab()
        other = {**own, "new": max(own.values()) + 1}
        pair = model, SimpleNamespace(get_vocab=lambda: other)
        with pytest.raises(StudyError, match=r"different tokenizers .* 'new' is None in one"):
            compare(lab, WINDOWS, pair, **QUIET)
        with pytest.raises(StudyError, match="different tokenizers"):
            compare(lab, WINDOWS, moelab.load("lab", 8), **QUIET)


# -- frames by hand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("kl", np.nan, "'kl' is nan at position"),
        ("kl", -0.5, "'kl' has -0.5"),
        ("logprob", np.inf, "'logprob' is inf"),
        ("logprob_reference", 0.5, "'logprob_reference' has 0.5"),
        ("entropy", "high", "'entropy' is"),
        ("same_top1", 1.0, "'same_top1' is float64"),
    ],
)
def test_columns_that_were_edited(
    dropped: Comparison, column: str, value: Any, message: str
) -> None:
    frame = dropped.tokens.copy()
    if isinstance(value, str) or column == "same_top1":
        frame[column] = value
    else:
        frame.loc[5, column] = value
    with pytest.raises(SchemaError, match=message):
        summarise(frame)


def test_columns_that_are_missing(dropped: Comparison) -> None:
    with pytest.raises(SchemaError, match="no column 'kl'"):
        check_tokens(dropped.tokens.drop(columns="kl"))
    with pytest.raises(StudyError, match="no rows"):
        summarise(dropped.tokens.iloc[:0])


def test_wrong_slot_is_a_baseline_that_warns_nobody_twice(tmp_path: Path) -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        found = compare(lab, WINDOWS, on_miss="wrong_slot", **QUIET)
        assert found.settings["on_miss"] == "wrong_slot" and lab.on_miss == "load"
