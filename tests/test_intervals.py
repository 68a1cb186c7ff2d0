"""Intervals over documents: against brute force, and by simulated coverage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moelab.errors import SchemaError, StudyError
from moelab.quality.clusters import Clusters
from moelab.quality.intervals import clustered, draws, paired, simultaneous
from moelab.quality.resampling import resampled
from moelab.quality.spread import freedom, influence, quantiles


def texts(seed: int = 0, documents: int = 9, groups: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for document in range(documents):
        level = rng.normal()
        for _ in range(int(rng.integers(3, 40))):
            for group in range(groups):
                rows.append((f"d{document}", "abc"[document % 3], group, level + rng.normal()))
    return pd.DataFrame(rows, columns=["document", "domain", "group", "cost"])


def jackknife(frame: pd.DataFrame) -> float:
    """Leaves out one document after the other, in plain Python; returns the standard error."""
    where = {d: g["domain"].iloc[0] for d, g in frame.groupby("document")}
    mean, variance = frame["cost"].mean(), 0.0
    for document, domain in where.items():
        n = sum(other == domain for other in where.values())
        total = count = 0.0
        for other, rows in frame.groupby("document"):
            if other == document:
                continue
            weight = n / (n - 1) if where[other] == domain and n > 1 else 1.0
            total += weight * rows["cost"].sum()
            count += weight * len(rows)
        variance += ((n - 1) / n if n > 1 else 1.0) * (total / count - mean) ** 2
    return float(np.sqrt(variance))


@given(st.integers(0, 10**6), st.integers(4, 12))
@settings(max_examples=15, deadline=None)
def test_the_standard_error_is_the_jackknifes(seed: int, documents: int) -> None:
    frame = texts(seed, documents)
    row = clustered(frame, "cost").iloc[0]
    assert row["mean"] == pytest.approx(frame["cost"].mean())
    assert row["se"] == pytest.approx(jackknife(frame), rel=1e-9)
    assert (row["tokens"], row["documents"]) == (len(frame), documents)


def test_documents_of_one_length_give_the_textbooks_interval() -> None:
    rng = np.random.default_rng(1)
    means = rng.normal(size=7)
    frame = pd.DataFrame({"document": np.repeat(np.arange(7), 5), "cost": np.repeat(means, 5)})
    row = clustered(frame, "cost", strata=None, level=0.9).iloc[0]
    assert row["se"] == pytest.approx(means.std(ddof=1) / np.sqrt(7))
    reach = stats.t.ppf(0.95, 6) * row["se"]
    # Bell and McCaffrey's degrees of freedom are n − 1 here.
    assert (row["low"], row["high"]) == pytest.approx((row["mean"] - reach, row["mean"] + reach))


def test_tokens_and_their_means_by_document_agree() -> None:
    frame = texts(3, groups=2)
    short = (
        frame.groupby(["group", "document", "domain"])["cost"].agg(["mean", "size"]).reset_index()
    )
    long = clustered(frame, "cost", ["group"])
    pd.testing.assert_frame_equal(long, clustered(short, "mean", "group", weights="size"))
    assert list(long) == ["group", "mean", "se", "low", "high", "tokens", "documents"]
    assert long["tokens"].dtype == np.int64
    cut = clustered(frame, "cost", "group", limits=(long["mean"].max(), 9.0))
    assert cut["low"].tolist() == [long["mean"].max()] * 2


def test_names_are_told_apart_by_stratum() -> None:
    """The first text of each domain may be called the same: they are different documents."""
    frame = texts(0, 6).assign(document=lambda f: f["document"].map(lambda d: int(d[1:]) // 3))
    assert clustered(frame, "cost")["documents"].item() == 6


def test_paired_is_the_mean_of_differences() -> None:
    frame = texts(5).assign(noise=lambda f: np.random.default_rng(0).normal(size=len(f)))
    a = frame.assign(setting="a", cost=lambda f: 5 * f["cost"] + f["noise"])
    b = frame.assign(setting="b", cost=lambda f: 5 * f["cost"])
    both = pd.concat([b, a, a.assign(setting="c", cost=0.0)])
    row = paired(both, "cost", "setting", ("a", "b"))
    pd.testing.assert_frame_equal(row, clustered(frame, "noise"))
    grouped = paired(both.assign(g="x"), "cost", "setting", ("b", "a"), by="g")
    assert grouped["mean"].item() == pytest.approx(-row["mean"].item())
    apart = clustered(both, "cost", "setting")
    assert row["se"].item() < 0.5 * apart["se"].iloc[0], "pairing must pay here"
    with pytest.raises(StudyError, match="not paired"):
        paired(pd.concat([b.iloc[1:], a]), "cost", "setting", ("a", "b"))
    with pytest.raises(StudyError, match="'z'; there are 'b', 'a'"):
        paired(pd.concat([b, a]), "cost", "setting", ("a", "z"))
    with pytest.raises(StudyError, match="has no row with setting = 'a'"):
        part = pd.concat([b.assign(g=1), a.assign(g=1), b.assign(g=2)])
        paired(part, "cost", "setting", ("a", "b"), by="g")


def study(
    rng: np.random.Generator, documents: int, strata: int, skew: str, lengths: str
) -> tuple[Clusters, float]:
    stratum = np.arange(documents) % strata
    spread = {"even": 0.0, "unequal": 1.0, "very": 2.0}[lengths]
    sizes = np.ceil(100 * np.exp(spread * rng.normal(size=documents)))
    means = {
        "normal": lambda: rng.normal(size=documents),
        "exponential": lambda: rng.exponential(size=documents) - 1,
        "lognormal": lambda: np.exp(rng.normal(size=documents)) - np.exp(0.5),
    }[skew]()
    truth = float((sizes * stratum / 2).sum() / sizes.sum())
    return Clusters(
        (sizes * (means + stratum / 2))[:, None], sizes[:, None], stratum.astype(np.int64), [()]
    ), truth


@pytest.mark.parametrize(("documents", "strata"), [(3, 1), (6, 3), (12, 6), (36, 6)])
@pytest.mark.parametrize(
    ("skew", "lengths", "least", "most"),
    [
        # Long documents count as the few that they are, at the price of some width.
        ("normal", "even", 0.86, 0.94), ("normal", "unequal", 0.86, 0.99),
        ("normal", "very", 0.86, 1.0), ("exponential", "unequal", 0.83, 0.98),
        # What skewness of this kind costs: with few documents the long tail has not been seen.
        ("lognormal", "even", 0.7, 0.94),
    ],
)  # fmt: skip
def test_coverage_of_90_percent(
    documents: int, strata: int, skew: str, lengths: str, least: float, most: float
) -> None:
    rng = np.random.default_rng(documents)
    inside, reach = [], []
    for _ in range(250):
        data, truth = study(rng, documents, strata, skew, lengths)
        se = float(np.sqrt((influence(data) ** 2).sum()))
        factor = float(quantiles(0.9, freedom(data))[0])
        inside.append(abs(float(data.means[0]) - truth) <= factor * se)
        values = data.sums / data.sizes
        reach.append(factor * se / np.ptp(values))
    assert least <= np.mean(inside) <= most
    # t with one degree of freedom is 6.3: no interval is wider than some times the data's range.
    assert max(reach) < 6.4


def test_simultaneous_bounds_hold_together() -> None:
    rng = np.random.default_rng(0)
    hits = {"together": 0, "apart": 0, "above": 0}
    for seed in range(200):
        values = rng.normal(size=(10, 8))
        frame = pd.DataFrame(
            {
                "document": np.repeat(np.arange(10), 8),
                "group": np.tile(np.arange(8), 10),
                "cost": values.ravel(),
            }
        )
        options: dict[str, Any] = {"strata": None, "level": 0.9}
        rows = simultaneous(frame, "cost", "group", resamples=1000, seed=seed, **options)
        hits["together"] += ((rows["low"] <= 0) & (rows["high"] >= 0)).all()
        rows = clustered(frame, "cost", "group", **options)
        hits["apart"] += ((rows["low"] <= 0) & (rows["high"] >= 0)).all()
        one = simultaneous(frame, "cost", "group", sides=1, resamples=1000, seed=seed, **options)
        hits["above"] += (one["high"] >= 0).all()
    assert hits["apart"] < 120, "pointwise intervals do not hold together"
    assert 0.85 <= hits["together"] / 200 <= 0.97
    assert 0.85 <= hits["above"] / 200 <= 0.97


def test_one_group_needs_no_more_than_its_own_t() -> None:
    frame = texts(2).assign(group=0)
    apart, together = clustered(frame, "cost"), simultaneous(frame, "cost", "group", seed=3)
    ratio = (together["high"] - together["mean"]) / (apart["high"] - apart["mean"])
    assert ratio.item() == pytest.approx(1, abs=0.06)
    # Groups that are copies of each other are one group.
    copies = pd.concat([frame.assign(group=n) for n in range(5)])
    many = simultaneous(copies, "cost", "group", seed=3)
    assert many["high"].to_numpy() == pytest.approx(together["high"].item())


def test_bootstrap_draws_have_the_right_spread() -> None:
    frame = texts(8, 30, groups=2)
    keys, means = draws(frame, "cost", "group", resamples=4000)
    rows = clustered(frame, "cost", "group")
    assert keys == [(0,), (1,)] and means.shape == (4000, 2)
    assert means.std(0) == pytest.approx(rows["se"].to_numpy(), rel=0.06)
    same = draws(frame.assign(cost=1.0), "cost", resamples=10)[1]
    assert same == pytest.approx(np.ones((10, 1)))
    for n in (2, 3, 9):
        w = resampled(np.zeros(n, np.int64), resamples=20000)
        assert w.sum(1) == pytest.approx(np.full(20000, n))
        assert w.var(0).mean() == pytest.approx(1, rel=0.05)  # of a sum of n means: n / n


def test_what_cannot_be_known_is_nan_or_wide() -> None:
    rows = clustered(texts(0, 3), "cost").iloc[0]
    assert np.isnan([rows["se"], rows["low"], rows["high"]]).all()
    # One document alone in its domain among others: wider than if it were of theirs.
    frame = texts(0, 7)  # a: 3, b: 2, c: 2
    alone = frame[frame["document"] != "d5"]
    assert alone.groupby("domain")["document"].nunique().min() == 1
    row = clustered(alone, "cost").iloc[0]
    assert row["se"] == pytest.approx(jackknife(alone))
    together = simultaneous(texts(0, 3, groups=2), "cost", "group")
    assert together["high"].isna().all()
    exact = simultaneous(texts(0, 9, groups=2).assign(cost=0.0), "cost", "group")
    assert (exact[["low", "mean", "high"]] == 0).all(axis=None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_input(bad: float) -> None:
    frame = texts()
    spoiled = frame.copy()
    spoiled.loc[7, "cost"] = bad
    with pytest.raises(StudyError, match=r"'cost' has 1 NaN or infinite.*row 7"):
        clustered(spoiled, "cost")
    for column in ("cost", "document", "domain"):
        with pytest.raises(SchemaError, match=f"no column '{column}'"):
            clustered(frame.drop(columns=column), "cost")
    with pytest.raises(SchemaError, match="'cost' must be numbers"):
        clustered(frame.assign(cost="x"), "cost")
    with pytest.raises(StudyError, match="no rows"):
        clustered(frame.iloc[:0], "cost")
    with pytest.raises(StudyError, match="level must be between"):
        clustered(frame, "cost", level=95)
    with pytest.raises(StudyError, match="above 0, got 0"):
        clustered(frame.assign(w=0), "cost", weights="w")
    with pytest.raises(StudyError, match="'domain' has rows without"):
        clustered(frame.assign(domain=None), "cost")
    with pytest.raises(StudyError, match="sides"):
        simultaneous(frame, "cost", "group", sides=3)
