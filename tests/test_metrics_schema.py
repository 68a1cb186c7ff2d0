"""Frames that were edited by hand, and arguments that do not fit: errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moelab import metrics
from moelab.errors import MoelabError, SchemaError, StudyError
from tests.support import traces

FRAME = traces.random_trace(3, domains=2)

METRICS: list[Callable[..., pd.DataFrame]] = [
    metrics.counts, metrics.repeats, metrics.coactivation, metrics.domain_specialisation,
    metrics.token_shares, metrics.working_set, metrics.segment_f1, metrics.segment_hits,
    metrics.universal_experts, metrics.missed_mass, metrics.vocabulary_specialisation,
    metrics.domain_information, metrics.summary,
    lambda frame: metrics.regime_ratio(frame, 4),
    lambda frame: metrics.saturation(frame, FRAME),
    lambda frame: metrics.saturation(FRAME, frame),
]  # fmt: skip

NEEDED = ("run", "sequence", "step", "position", "phase", "layer", "expert")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", NEEDED)
def test_a_column_that_is_not_there(metric: Callable[..., Any], name: str) -> None:
    with pytest.raises(SchemaError, match=f"has no column '{name}'"):
        metric(FRAME.drop(columns=name))


@pytest.mark.parametrize("metric", METRICS)
def test_columns_that_hold_something_else(metric: Callable[..., Any]) -> None:
    words = FRAME.assign(expert=FRAME["expert"].astype(str))
    with pytest.raises(SchemaError, match=r"'expert' .* must hold integers"):
        metric(words)
    with pytest.raises(SchemaError, match=r"'layer' .* must hold integers, it is float64"):
        metric(FRAME.assign(layer=FRAME["layer"].astype("float64")))
    negative = FRAME.copy()
    negative.loc[7, "expert"] = -1
    with pytest.raises(SchemaError, match=r"'expert' .* is -1 in row 7; ids begin with 0"):
        metric(negative)
    unnamed = FRAME.copy()
    unnamed.loc[4, "phase"] = None
    with pytest.raises(SchemaError, match=r"'phase' .* no name in row 4"):
        metric(unnamed)


def test_columns_that_only_some_need() -> None:
    with pytest.raises(SchemaError, match="'token_id'"):
        metrics.token_shares(FRAME.drop(columns="token_id"))
    with pytest.raises(SchemaError, match="'weight'"):
        metrics.missed_mass(FRAME.drop(columns="weight"))
    with pytest.raises(SchemaError, match=r"'hit' .* must be bool, it is int"):
        metrics.missed_mass(FRAME.assign(hit=FRAME["hit"].astype(int)))
    unknown = FRAME.copy()
    unknown.loc[9, "weight"] = np.nan
    with pytest.raises(SchemaError, match=r"'weight' .* is not known in row 9"):
        metrics.missed_mass(unknown)
    assert "missed" not in metrics.summary(unknown), "the others do not need it"
    endless = FRAME.copy()
    endless.loc[9, "weight"] = np.inf
    with pytest.raises(SchemaError, match=r"'weight' .* is inf in row 9"):
        metrics.missed_mass(endless)
    with pytest.raises(SchemaError, match=r"'domain' .* must hold names, got 1"):
        metrics.repeats(FRAME.assign(domain=1))


def test_what_no_router_does() -> None:
    twice = FRAME.copy()
    cell = ["layer", "run", "sequence", "step", "position"]
    second = twice[twice["rank"] == 1].index[0]
    own = (twice[cell] == twice.loc[second, cell]).all(axis=1)
    twice.loc[own, "expert"] = 2
    with pytest.raises(SchemaError, match=r"'expert' .* the same expert twice"):
        metrics.domain_specialisation(twice.assign(step=0).drop_duplicates([*cell, "rank"]))
    with pytest.raises(SchemaError, match=r"'rank' .*same rank twice.*labelled"):
        metrics.repeats(pd.concat([FRAME, FRAME]))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(StudyError, match=r"no phase 'decoding' .* it has prefill, decode"):
        metrics.repeats(FRAME, phase="decoding")
    with pytest.raises(StudyError, match="no phase 'padding'"):
        metrics.repeats(FRAME, phase="padding")
    with pytest.raises(StudyError, match="no phase 'verify'"):
        metrics.regime_ratio(FRAME, 4, phase="verify")
    with pytest.raises(StudyError, match=r"Layer 0 has 3 experts, and the frame has expert 5"):
        metrics.repeats(FRAME, experts=3)
    with pytest.raises(StudyError, match=r"experts= says nothing of layers \[3\]"):
        metrics.repeats(FRAME, experts={0: 6})
    with pytest.raises(StudyError, match="experts= is a number from 1 on"):
        metrics.repeats(FRAME, experts=0)
    with pytest.raises(StudyError, match="must be a recording or its routing frame, got list"):
        metrics.repeats([1, 2])
    for n in ((), (0,), (2.5,), (True,)):
        with pytest.raises(StudyError, match="lengths in tokens"):
            metrics.working_set(FRAME, n)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match=r"from 1 on; got 0\.5"):
        metrics.segment_hits(FRAME, 4, 0.5)
    for theta in (0, 1.5, True):
        with pytest.raises(StudyError, match="theta= is a share"):
            metrics.universal_experts(FRAME, theta)
    with pytest.raises(StudyError, match="least= must be an int from 1 on"):
        metrics.token_shares(FRAME, least=0)
    with pytest.raises(StudyError, match="permutations= must be"):
        metrics.domain_information(FRAME, permutations=0)
    with pytest.raises(StudyError, match="occurs 10000 times; the most frequent one does"):
        metrics.vocabulary_specialisation(FRAME, least=10_000)
    with pytest.raises(StudyError, match="says no capacity, so capacity= must"):
        metrics.regime_ratio(FRAME)
    with pytest.raises(StudyError, match=r"capacity= says nothing of layers \[3\]"):
        metrics.regime_ratio(FRAME, {0: 4})
    with pytest.raises(StudyError, match="capacity= of layer 0 must be between 1 and 6"):
        metrics.missed_mass(FRAME, capacity=7)


def test_domains_that_cannot_be_compared() -> None:
    with pytest.raises(StudyError, match=r"has only 'all'.*labelled"):
        metrics.domain_information(FRAME.drop(columns="domain"))
    few = FRAME[FRAME["run"] < 2]
    with pytest.raises(StudyError, match="at least two documents a domain"):
        metrics.domain_information(few)


def test_recordings_that_cannot_be_put_together() -> None:
    with pytest.raises(StudyError, match="There is no recording"):
        metrics.labelled({})
    with pytest.raises(StudyError, match="domains= must say"):
        metrics.labelled(FRAME)
    with pytest.raises(StudyError, match=r"domains= says nothing of runs \[1, 2\]"):
        metrics.labelled(FRAME, {0: "x"})
    with pytest.raises(StudyError, match="are for one recording"):
        metrics.labelled({"x": FRAME}, {0: "x"})
    with pytest.raises(StudyError, match=r"The recording of 'x' must be"):
        metrics.labelled({"x": 3})
    with pytest.raises(SchemaError, match="'token_id' and another has"):
        metrics.labelled({"x": FRAME, "y": FRAME.drop(columns="token_id")})
    one = FRAME.copy()
    one.attrs = {"experts": {0: 6, 3: 6}}
    two = one.copy()
    two.attrs = {"experts": {0: 8, 3: 6}}
    with pytest.raises(StudyError, match="6 experts in one recording and 8 in that of 'y'"):
        metrics.labelled({"x": one, "y": two})
    assert metrics.labelled({"x": one}).attrs == {"experts": {0: 6, 3: 6}}


def test_routings_of_other_tokens() -> None:
    other = FRAME.copy()
    other["token_id"] += 1
    with pytest.raises(StudyError, match=r"'token_id': at run .* different tokens"):
        metrics.saturation(FRAME, other)
    with pytest.raises(StudyError, match="no token in common"):
        metrics.saturation(FRAME, FRAME.assign(run=FRAME["run"] + 100))


COUNTS = pd.DataFrame(
    {"domain": "x", "layer": [0, 0, 0, 1, 1], "expert": [0, 1, 3, 0, 2], "count": [4, 2, 1, 3, 5]}
)


def test_counts_edited_by_hand() -> None:
    for made in (metrics.balance, metrics.pin_coverage):
        for name in ("domain", "layer", "expert", "count"):
            with pytest.raises(SchemaError, match=f"counts frame has no column '{name}'"):
                made(COUNTS.drop(columns=name))
        with pytest.raises(SchemaError, match=r"'count' .* is -2\.0; counts begin at 0"):
            made(COUNTS.assign(count=[4, -2, 1, 3, 5]))
        with pytest.raises(SchemaError, match=r"'count' .* is not known in row 2"):
            made(COUNTS.assign(count=[4, 2, np.nan, 3, 5]))
        with pytest.raises(SchemaError, match=r"'count' .* must hold numbers"):
            made(COUNTS.assign(count=list("abcde")))
        with pytest.raises(SchemaError, match=r"'count' .* is 0 throughout in domain x, layer 1"):
            made(COUNTS.assign(count=[4, 2, 1, 0, 0]))
        with pytest.raises(SchemaError, match=r"expert 3 is there twice .* layer 0\. .*phase"):
            made(COUNTS.assign(expert=[0, 3, 3, 0, 2]))
        with pytest.raises(SchemaError, match=r"'tokens' .* must be one number above 0"):
            made(COUNTS.assign(tokens=[3, 4, 3, 3, 3]))
        with pytest.raises(StudyError, match="Layer 0 has 3 experts, and the frame has expert 3"):
            made(COUNTS, experts=3)
        with pytest.raises(StudyError, match="counts must be a frame"):
            made([1])
    for top in (0, 5, 2.0, True):
        with pytest.raises(StudyError, match="top= must be between 1 and 4"):
            metrics.pin_coverage(COUNTS, top)  # type: ignore[arg-type]
    assert issubclass(SchemaError, StudyError) and issubclass(StudyError, MoelabError)


def test_experts_that_were_never_chosen() -> None:
    """Those that are not in the frame count with 0: as the highest id or the caller says."""
    found = metrics.balance(COUNTS).set_index("layer")
    np_cv = np.std([3, 0, 5, 0]) / 2
    assert found.loc[1, "cv"] == pytest.approx(np_cv)
    wider = metrics.balance(COUNTS, experts=8).set_index("layer")
    assert wider.loc[1, "cv"] == pytest.approx(np.std([3, 0, 5, 0, 0, 0, 0, 0]))
    by_layer = metrics.balance(COUNTS, experts={0: 4, 1: 3}).set_index("layer")
    assert by_layer.loc[1, "gini"] == pytest.approx((-2 * 0 + 0 * 3 + 2 * 5) / (3 * 8))
    with pytest.raises(StudyError, match=r"experts= says nothing of layers \[1\]"):
        metrics.balance(COUNTS, experts={0: 4})
    alone = pd.DataFrame({"domain": ["x"], "layer": [0], "expert": [0], "count": [3]})
    row = metrics.balance(alone).iloc[0]
    assert (row["cv"], row["gini"], row["entropy"]) == (0, 0, 1)
    one_of_four = metrics.balance(alone, experts=4).iloc[0]
    assert (one_of_four["gini"], one_of_four["entropy"]) == (0.75, 0)


def test_pins_of_equally_used_experts() -> None:
    counts = pd.DataFrame(
        {
            "domain": ["x"] * 3 + ["y"] * 3, "layer": 0, "expert": [0, 1, 2] * 2,
            "count": [5, 5, 5, 1, 2, 7],
        }
    )  # fmt: skip
    found = metrics.pin_coverage(counts, top=1).set_index(["train", "test"])["covered"]
    assert found.to_dict() == {
        ("x", "x"): 1 / 3, ("x", "y"): 0.1, ("y", "x"): 1 / 3, ("y", "y"): 0.7,
    }  # fmt: skip
    phases = counts.assign(phase=["prefill"] * 3 + ["decode"] * 3)
    assert len(metrics.pin_coverage(phases, top=1)) == 2, "no pair across phases"


class Made:
    """What looks like a recording."""

    def __init__(self, frame: pd.DataFrame, **run: Any) -> None:
        self.routing = frame
        self.run = run


def test_what_a_recording_says() -> None:
    """Experts and capacity come from its manifest, unless the caller says otherwise."""
    made = Made(FRAME, layers=[0, 3], experts=[8, 6], capacity=[4, 5])
    chance = metrics.repeats(made).groupby("layer")["same_first_chance"].first()
    assert chance.to_dict() == {0: 1 / 8, 3: 1 / 6}
    assert set(metrics.repeats(made, experts=10)["same_first_chance"]) == {0.1}
    assert metrics.counts(made).groupby("layer")["expert"].max().to_dict() == {0: 7, 3: 5}
    told = metrics.labelled({"x": made})
    assert set(metrics.repeats(told)["same_first_chance"]) == {1 / 8, 1 / 6}
    ratio = metrics.regime_ratio(made).groupby("layer")["capacity"].unique().map(list)
    assert ratio.to_dict() == {0: [4], 3: [5]}
    mass = metrics.missed_mass(made).groupby("layer")["chance"].first()
    assert mass.to_dict() == {0: 0.5, 3: pytest.approx(1 / 6)}
    same = Made(FRAME, layers=[0, 3], experts=[8, 6], capacity=4)
    assert set(metrics.regime_ratio(same)["capacity"]) == {4}

    class Texts:
        recording = made
        routing = told

    assert set(metrics.missed_mass(Texts())["chance"]) == {0.5, 1 - 5 / 6}
