"""Cliffs: what is claimed, what is not, and a small run of the validation."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.errors import SchemaError, StudyError
from moelab.quality.intervals import clustered
from moelab.study import shapes
from moelab.study.cliff import cliff
from moelab.study.verdict import judged
from tests import cliff_validation as validation

X = np.arange(8, 65, 8).astype(float)


def frame(truth: Any, noise: float = 0.02, documents: int = 18, x: Any = X) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    values = truth(np.asarray(x)) + noise * rng.normal(size=(documents, len(x)))
    return pd.DataFrame(
        {
            "capacity": np.tile(x, documents),
            "prompt": np.repeat([f"p{n}" for n in range(documents)], len(x)),
            "domain": np.repeat([f"d{n % 3}" for n in range(documents)], len(x)),
            "tokens": np.repeat(rng.integers(50, 200, documents), len(x)),
            "ln_ppl_ratio": values.ravel(),
        }
    )


def kink(x: Any) -> Any:
    return np.maximum(30 - x, 0) / 30


def step(x: Any) -> Any:
    return 0.5 * (x < 28)


@given(
    st.lists(st.integers(1, 100), min_size=6, max_size=12, unique=True),
    st.lists(st.floats(0, 3), min_size=8, max_size=8),
    st.floats(0.5, 60), st.floats(0.3, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_no_smooth_curve_has_a_positive_contrast(
    places: list[int], parts: list[float], tau: float, power: float
) -> None:
    """Written apart from the module: sums of curves that everybody calls smooth."""
    x = np.sort(np.array(places, dtype=float))
    t = (x - x[0]) / (x[-1] - x[0])
    b = x[-1]
    curves = [
        np.exp(-x / tau), x**-power, (1 - x / (b + 1)) ** 2, 1 - t, (1.3 - t) ** 3, 1 - t**2,
        np.maximum(0.6 - t, 0) ** 2, 1 / (1 + np.exp((t - 0.4) * 4.394 / 0.6)),
    ]  # fmt: skip
    curve = sum(part * (c - c[-1]) / (c[0] - c[-1]) for part, c in zip(parts, curves, strict=True))
    contrasts = shapes.design(x).contrasts @ (np.asarray(curve) + 0.7)
    # S-shaped falls have places on a grid: between them the mixture is near, not exact.
    assert (contrasts < 2e-3 * (1 + sum(parts))).all()
    exact = sum(
        part * (c - c[-1]) / (c[0] - c[-1]) for part, c in zip(parts, curves[:7], strict=False)
    )
    assert (shapes.design(x).contrasts @ np.asarray(exact) < 1e-8 * (1 + sum(parts))).all()


def test_a_ramp_is_told_by_its_own_contrast() -> None:
    plan = shapes.design(X)
    assert {ramp.kind for ramp in plan.ramps} == {"kink", "step", "ramp"}
    scores = plan.contrasts @ plan.shapes.T
    norms = np.linalg.norm(plan.contrasts, axis=1)
    assert norms == pytest.approx(np.ones(len(norms)))
    assert (scores.max(0) <= np.diag(scores) + 1e-9).all()
    assert (np.diag(scores) > 0.05).all()
    # A break beside an end is one point apart from a smooth curve.
    assert not any(r.kind == "step" and (r.low == 0 or r.high == 1) for r in plan.ramps)


@pytest.mark.parametrize(
    ("truth", "kind", "places"),
    [
        (kink, "kink", [30.0]),
        (step, "step", [28.0]),
        (lambda x: np.clip((44 - x) / 20, 0, 1), "ramp", [24.0, 44.0]),
        (lambda x: step(x) + np.exp(-x / 12), "step", [28.0]),
    ],
)
@pytest.mark.parametrize("rising", [False, True])
def test_cliffs_are_found(truth: Any, kind: str, places: list[float], rising: bool) -> None:
    data = frame(truth)
    if rising:
        data["ln_ppl_ratio"] = 1 - data["ln_ppl_ratio"]
    found = cliff(data)
    assert found.verdict == "cliff" and found.p < 0.01
    assert found.breaks == pytest.approx(places, abs=1.5 if kind != "ramp" else 4)
    # One study: the 90% interval may miss, and never by far.
    assert found.interval[0] - 1 <= places[-1] <= found.interval[1] + 1
    assert found.interval[1] - found.interval[0] < 12
    assert f"a {kind} is left" in found.why
    row = found.fits.set_index("model")
    assert list(row.index) == ["straight", "smooth", "kink", "step", "ramp"]
    assert row.loc[kind, "gain_unseen"] > 0 and row.loc[kind, "error"] < row.loc["smooth", "error"]
    mean = data.assign(y=data["ln_ppl_ratio"] * data["tokens"]).groupby("capacity")
    want = mean["y"].sum() / mean["tokens"].sum()
    each = clustered(data, "ln_ppl_ratio", "capacity", cluster="prompt", weights="tokens")
    assert found.curve["low"].to_numpy() == pytest.approx(each["low"].to_numpy())
    assert found.curve["mean"].to_numpy() == pytest.approx(want.to_numpy())
    assert np.abs(found.curve["broken"] - found.curve["mean"]).max() < 0.06


@pytest.mark.parametrize("truth", list(validation.SMOOTH.values()))
def test_smooth_curves_without_noise_are_no_cliffs(truth: Any) -> None:
    for x in (X, np.array([8, 10, 16, 20, 32, 64])):
        for noise in (0.0, 1e-4):
            found = cliff(frame(truth, noise, x=x))
            assert found.verdict == "no cliff", found.why
            assert found.breaks == [] and np.isnan(found.interval).all()


def test_a_cliff_without_noise() -> None:
    found = cliff(frame(kink, 0.0))
    assert found.verdict == "cliff" and found.breaks == pytest.approx([30], abs=0.3)


def test_straight_segments_alone_would_call_it_a_cliff() -> None:
    """What the verdict is for: two segments fit exp(−x/12) far better than a line."""
    found = cliff(frame(lambda x: np.exp(-x / 12)))
    rows = found.fits.set_index("model")
    assert rows.loc["smooth", "error"] < rows.loc["straight", "error"] / 20
    assert found.verdict == "no cliff"


def test_false_alarms_and_coverage() -> None:
    """A few of the simulations of results/cliff-validation.md."""
    alarms = validation.false_alarms(12, seed=5)
    assert alarms["simulations"].sum() == 228
    assert alarms["claimed"].sum() <= 8 and alarms["claimed"].max() <= 3, alarms
    real = validation.found(12, seed=6, kinds=("step", "kink"))
    easy = real.groupby("kind").head(2)
    assert (easy["power"] > 0.7).all(), easy
    share = real["covered"].sum() / real["claimed"].sum()
    assert share >= 0.8, real


def test_hasty_verdicts_are_the_same() -> None:
    rng = np.random.default_rng(3)
    for one in range(6):
        truth = validation.CLIFFS["kink"](X, 30.0) if one % 2 else np.exp(-X / 12)
        curve = validation.sweep(rng, X, truth, "even", 0.03)
        slow, quick = (judged(curve, 0.9, seed=one, hasty=h) for h in (False, True))
        assert (slow.verdict, slow.breaks, slow.p) == (quick.verdict, quick.breaks, quick.p)


def test_a_study_gives_the_same_twice() -> None:
    data = frame(step, 0.1)
    first, again = cliff(data), cliff(data.sample(frac=1, random_state=1))
    assert first.verdict == again.verdict and first.breaks == again.breaks
    assert first.verdict == "cliff" and first.interval == pytest.approx(cliff(data).interval)
    assert cliff(data, seed=1).breaks == first.breaks


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_capacities(count: int) -> None:
    data = frame(step, x=X[:count])
    found = cliff(data)
    assert found.verdict == "no cliff" and f"{count} distinct capacity" in found.why
    assert found.fits.empty and "no cliff" in repr(found)
    if count == 1:
        with pytest.raises(StudyError, match="one capacity only"):
            found.capacity_within(0.05)


def test_too_few_or_incomplete_documents() -> None:
    found = cliff(frame(step, documents=5))
    assert found.verdict == "no cliff" and "5 documents" in found.why
    data = frame(step, documents=8)
    assert "Each stratum has one" in cliff(data.assign(domain=data["prompt"])).why
    data = frame(step)
    part = cliff(data.iloc[1:])
    assert part.verdict == "cliff" and part.documents == 17 and "1 documents that lack" in part.why
    pd.testing.assert_frame_equal(part.curve, cliff(data[data["prompt"] != "p0"]).curve)
    lacking = data[(data["capacity"] != 8) | (data["prompt"] == "x")]
    odd = pd.concat([lacking, data[(data["capacity"] == 8)].assign(prompt="x", domain="x")])
    assert "0 documents with every" in cliff(odd).why


def test_seeds_are_averaged_and_curves_are_not() -> None:
    data = frame(step)
    twice = pd.concat([data.assign(seed=0), data.assign(seed=1)])
    pd.testing.assert_frame_equal(cliff(twice).curve, cliff(data).curve)
    two = pd.concat([data.assign(on_miss="drop"), data.assign(on_miss="load")])
    with pytest.raises(StudyError, match=r"several curves: 'on_miss' is drop, load"):
        cliff(two)
    # Capacity follows from bytes.
    assert cliff(data.assign(bytes=data["capacity"] * 1e6), x="bytes").breaks == pytest.approx(
        [28e6]
    )


def test_bad_input() -> None:
    data = frame(step)
    for column in ("capacity", "ln_ppl_ratio", "prompt"):
        with pytest.raises(SchemaError, match=f"no column '{column}'"):
            cliff(data.drop(columns=column))
    with pytest.raises(SchemaError, match="'capacity' must be numbers"):
        cliff(data.assign(capacity="all"))
    spoiled = data.copy()
    spoiled.loc[5, "ln_ppl_ratio"] = np.nan
    with pytest.raises(StudyError, match=r"'ln_ppl_ratio' has 1 NaN.*row 5"):
        cliff(spoiled)
    with pytest.raises(StudyError, match="level"):
        cliff(data, level=90)
    with pytest.raises(StudyError, match="no rows"):
        cliff(data.iloc[:0])


def test_capacity_within_reads_the_right_column() -> None:
    data = frame(lambda x: 0.3 * (1 - x / 64) ** 2, 0.002)
    want = cliff(data).capacity_within(0.05)
    assert want.capacity == 40 and want.points == 8, "0.3 · 0.375² is 0.042, and at 32 0.075"
    other = data.assign(ppl=10 * np.exp(data["ln_ppl_ratio"]), ppl_reference=10.0)
    for kept in (["ppl", "ppl_reference"], ["ppl", "ln_ppl_ratio"]):
        some = other[["capacity", "prompt", "domain", "tokens", *kept]]
        assert cliff(some, y="ppl").capacity_within(0.05).bound == pytest.approx(want.bound)
    # Without a reference, the largest capacity is it.
    alone = cliff(other[["capacity", "prompt", "ppl"]], y="ppl").capacity_within(0.05)
    assert alone.capacity == 40 and alone.frame["mean"].iloc[0] == pytest.approx(0, abs=1e-12)


def test_it_shows_itself() -> None:
    found = cliff(frame(step))
    assert "90% interval" in repr(found) and "left out" in found._repr_html_()
    ax = found.plot()
    assert "Cliff at 28" in ax.get_title(loc="left")
    flat = cliff(frame(lambda x: 0 * x)).plot()
    assert "No cliff" in flat.get_title(loc="left")
    cliff(frame(step, x=X[:3])).plot()
    plt.close("all")


def test_wilson() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20.
    assert validation.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert validation.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert np.isnan(validation.wilson(0, 0)).all()


def test_the_page_is_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["v", "--out", str(tmp_path), "--nulls", "1", "--cliffs", "1"]
    )  # fmt: skip
    validation.main()
    text = (tmp_path / "cliff-validation.md").read_text()
    assert "19" in text and "| flat | even | 1 |" in text
    numbers = pd.read_csv(tmp_path / "cliff-validation.csv")
    assert numbers["simulations"].sum() == len(numbers)
