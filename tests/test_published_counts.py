"""Our figures beside those of the page on published counts, and the exact maths of chance."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pandas as pd
import pytest

import moelab
from moelab import metrics
from moelab.errors import StudyError

SHARED = Path(moelab.__file__).parents[2] / "shared" / "data"

FIGURES = [
    ("c4", 0, 0.324, 0.137, 0.990),
    ("c4", 7, 0.402, 0.212, 0.982),
    ("c4", 15, 0.512, 0.288, 0.968),
    ("github", 7, 1.349, 0.584, 0.851),
    ("arxiv", 7, 1.277, 0.552, 0.866),
]
"""OLMoE: domain, layer, CV, Gini coefficient, normalised entropy."""

COVERED = [
    ("c4", "c4", 0.422),
    ("c4", "github", 0.031),
    ("github", "github", 0.662),
    ("github", "arxiv", 0.573),
]
"""OLMoE, layer 15: the 16 most used experts of the first domain, choices of the second."""

CHANCE = [(8, 2, 0.4643), (64, 8, 0.6791), (128, 8, 0.4123), (256, 8, 0.2271), (512, 10, 0.1805)]
"""Experts, top-k, chance that two tokens share one."""


@pytest.mark.parametrize(("domain", "layer", "cv", "gini", "entropy"), FIGURES)
def test_balance(domain: str, layer: int, cv: float, gini: float, entropy: float) -> None:
    found = metrics.balance(metrics.published("olmoe")).set_index(["domain", "layer"])
    row = found.loc[(domain, layer)]
    assert [round(row[name], 3) for name in ("cv", "gini", "entropy")] == [cv, gini, entropy]


@pytest.mark.parametrize(("train", "test", "covered"), COVERED)
def test_pins(train: str, test: str, covered: float) -> None:
    found = metrics.pin_coverage(metrics.published("olmoe"), top=16)
    row = found.set_index(["train", "test", "layer"]).loc[(train, test, 15)]
    assert (round(row["covered"], 3), row["chance"]) == (covered, 0.25)


def test_pins_between_domains() -> None:
    """Between C4 and the others pins are worse than random ones: .03 to .18 against .25."""
    found = metrics.pin_coverage(metrics.published("olmoe"), top=16)
    found = found[(found["layer"] == 15) & (found["train"] != found["test"])]
    with_c4 = found[(found["train"] == "c4") | (found["test"] == "c4")]
    assert round(with_c4["covered"].min(), 2) == 0.03
    assert round(with_c4["covered"].max(), 2) == 0.18
    assert (found.drop(with_c4.index)["covered"] > 0.5).all()


def test_an_expert_of_nearly_all_tokens() -> None:
    counts = metrics.published("olmoe")
    first = counts.query("domain == 'arxiv' and layer == 0 and expert == 0").iloc[0]
    assert round(first["count"] / first["tokens"], 4) == 0.9766


@pytest.mark.parametrize(("name", "experts", "top_k"), [("olmoe", 64, 8), ("mixtral", 8, 2)])
def test_published_frames(name: str, experts: int, top_k: int) -> None:
    counts = metrics.published(name)
    assert list(counts.columns) == ["domain", "layer", "expert", "count", "tokens"]
    assert set(counts["domain"]) == {"arxiv", "github", "c4"}
    for _, layer in counts.groupby(["domain", "layer"]):
        assert sorted(layer["expert"]) == list(range(experts))
        assert layer["count"].sum() == top_k * layer["tokens"].iloc[0]
    found = metrics.balance(counts)
    assert (found["cv"] > 10 * found["cv_chance"]).all()


@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_shipped_copy_is_the_source(name: str) -> None:
    source = SHARED / f"{name}_expert_counts.csv"
    if not source.is_file():
        pytest.skip("shared reference data are not here")
    theirs = pd.read_csv(source)
    pd.testing.assert_frame_equal(metrics.published(name)[list(theirs.columns)], theirs)
    # A plain frame of counts: exactly the columns that are asked for.
    found = metrics.balance(theirs)
    assert list(found.columns) == ["domain", "layer", "cv", "gini", "entropy"]
    assert len(found) == 9


def test_an_unknown_model() -> None:
    with pytest.raises(StudyError, match=r"olmoe, mixtral; not of 'gpt'"):
        metrics.published("gpt")


@pytest.mark.parametrize(("experts", "top_k", "chance"), CHANCE)
def test_chance_of_sharing(experts: int, top_k: int, chance: float) -> None:
    found = metrics.chance_table().set_index(["experts", "top_k"]).loc[(experts, top_k)]
    assert round(found["any_shared"], 4) == chance
    assert found["overlap"] == top_k / experts
    assert found["same_first"] == 1 / experts
    # One token after another finds none of the first one's experts.
    none = math.prod((experts - top_k - i) / (experts - i) for i in range(top_k))
    assert found["any_shared"] == pytest.approx(1 - none)


def test_chance_of_other_routers() -> None:
    found = metrics.chance_table([(10, 3)]).iloc[0]
    rng = random.Random(0)
    draws = [({*rng.sample(range(10), 3)}, {*rng.sample(range(10), 3)}) for _ in range(20_000)]
    assert found["any_shared"] == pytest.approx(
        sum(bool(a & b) for a, b in draws) / 20_000, abs=0.015
    )
    assert found["together"] == pytest.approx(
        sum(1 in a for a, _ in draws if 0 in a) / sum(0 in a for a, _ in draws), abs=0.02
    )
    sets = [set().union(*(rng.sample(range(10), 3) for _ in range(16))) for _ in range(2_000)]
    assert found["distinct_16"] == pytest.approx(sum(map(len, sets)) / 2_000, abs=0.02)
    assert metrics.chance_table([(4, 4)])["any_shared"].iloc[0] == 1
    with pytest.raises(StudyError, match="cannot choose 9 of 8 experts"):
        metrics.chance_table([(8, 9)])
