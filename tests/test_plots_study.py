"""Charts of the study: curves, pins, prices, policies, forecasts; and what holds for all charts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moelab import plots
from moelab.errors import SchemaError, StudyError
from moelab.plots import style
from moelab.plots.scales import short_number

from .support import plot_frames as frames

mpl.use("agg")

CHARTS: dict[str, tuple[Callable[..., Any], Callable[[], pd.DataFrame], dict[str, Any]]] = {
    "frontier": (plots.frontier, frames.sweep, {}),
    "capacity": (plots.capacity, frames.sweep, {"metric": "same_top1"}),
    "capacity_within": (plots.capacity_within, frames.tolerances, {}),
    "kl_by_position": (plots.kl_by_position, frames.judged, {"by": "on_miss"}),
    "kl_quantiles": (plots.kl_quantiles, frames.judged, {"by": "on_miss"}),
    "arms": (plots.arms, frames.arms, {}),
    "damage_shares": (plots.damage_shares, frames.shares, {}),
    "agreement": (plots.agreement, frames.agreement, {}),
    "balance": (plots.balance, frames.balances, {}),
    "miss_ratio": (plots.miss_ratio, frames.curves, {}),
    "pin_transfer": (plots.pin_transfer, frames.pin_transfer, {}),
    "price_by_weight": (plots.price_by_weight, frames.prices, {}),
    "policies": (plots.policies, frames.policies, {}),
    "forecast": (plots.forecast, frames.forecasts, {}),
    "working_set": (plots.working_set, frames.working_sets, {}),
}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def curve(ax: Any, label: str) -> tuple[np.ndarray, np.ndarray]:
    line = next(line for line in ax.get_lines() if str(line.get_label()) == label)
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def notes(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_gid() == "note"]


# -- what holds for all ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_draws_where_it_is_told_and_says_what_it_is_told(name: str) -> None:
    draw, make, options = CHARTS[name]
    before = dict(mpl.rcParams)
    _, ax = plt.subplots(layout="constrained")
    assert draw(make(), ax=ax, note="seen once", **options) is ax
    assert notes(ax) == ["seen once"]
    assert ax.get_xlabel()
    assert ax.get_title(loc="left") or ax.get_title()
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", CHARTS)
def test_a_legend_lies_beside_the_chart(name: str) -> None:
    draw, make, options = CHARTS[name]
    ax = draw(make(), **options)
    ax.figure.canvas.draw()
    if ax.get_legend() is None:
        return
    inside = ax.get_window_extent()
    assert not ax.get_legend().get_window_extent().overlaps(inside)


@pytest.mark.parametrize("name", CHARTS)
def test_nothing_is_drawn_of_an_empty_frame(name: str) -> None:
    draw, make, options = CHARTS[name]
    with pytest.raises(SchemaError, match="no rows"):
        draw(make().iloc[:0], **options)
    with pytest.raises(SchemaError, match="column"):
        draw(pd.DataFrame({"x": [1]}), **options)
    with pytest.raises(SchemaError, match="DataFrame"):
        draw([1, 2], **options)


def test_charts_of_the_lab_model_say_that_it_is_tiny() -> None:
    frame = frames.forecasts()
    assert notes(plots.forecast(frame)) == []
    frame.attrs["model"] = "lab"
    assert notes(plots.forecast(frame)) == [style.LAB_NOTE]
    assert "do not" in style.LAB_NOTE
    assert notes(plots.forecast(frame, note="")) == []
    frame.attrs["model"] = "another"
    assert notes(plots.forecast(frame)) == []
    assert notes(plots.forecast(frame, note="lab")) == [style.LAB_NOTE]


def test_a_note_lies_under_the_axis_label() -> None:
    ax = plots.forecast(frames.forecasts(), note="lab")
    ax.figure.canvas.draw()
    text = next(text for text in ax.texts if text.get_gid() == "note")
    assert text.get_window_extent().y1 <= ax.xaxis.label.get_window_extent().y0


def test_known_series_are_told_apart_without_colour() -> None:
    for known in (style.ACTION_STYLES, style.POLICY_STYLES):
        marks = [(str(look.line), look.marker) for look in known.values()]
        assert len(set(marks)) == len(marks)


def test_unknown_series_get_looks_of_their_own() -> None:
    found = style.looks(["drop", "a", "b", "c"], style.ACTION_STYLES)
    assert found["drop"] == style.ACTION_STYLES["drop"]
    assert len({look.colour for look in found.values()}) == 4
    assert len({look.marker for name, look in found.items() if name != "drop"}) == 3


# -- one by one ------------------------------------------------------------------------------


def test_curves_are_those_of_the_layer_asked_for() -> None:
    frame = frames.curves()
    for layer, row in (("all", -1), (-1, -1), (2, 2)):
        x, y = curve(plots.miss_ratio(frame, layer=layer), "lru")
        of = frame[(frame["layer"] == row) & (frame["policy"] == "lru")]
        np.testing.assert_allclose(y, of["miss_ratio"])
        np.testing.assert_allclose(x, of["capacity"])
    x, y = curve(plots.miss_ratio(frame), "uniform routing")
    assert list(x) == [0, frames.EXPERTS]
    assert list(y) == [1, 0]
    assert len(curve(plots.miss_ratio(frame), "MIN, may refuse to admit (bound)")[0])


def test_curves_of_a_layer_that_is_not_there_or_twice() -> None:
    frame = frames.curves()
    with pytest.raises(StudyError, match="no layer 9"):
        plots.miss_ratio(frame, layer=9)
    with pytest.raises(StudyError, match="several rows"):
        plots.miss_ratio(pd.concat([frame, frame]))


def test_pins_show_hit_points_with_their_signs() -> None:
    frame = frames.pin_transfer()
    ax = plots.pin_transfer(frame)
    drawn = np.asarray(ax.images[0].get_array())
    expected = frame.pivot(index="train", columns="test", values="gain")
    np.testing.assert_allclose(drawn, 100 * expected.loc[list(frames.DOMAINS), frames.DOMAINS])
    low, high = ax.images[0].get_clim()
    assert low == -high, "nought is the middle of the scale"
    texts = {t.get_position(): t.get_text() for t in ax.texts if t.get_gid() is None}
    for (x, y), text in texts.items():
        gain = drawn[int(y), int(x)]
        row = frame.iloc[int(y) * 6 + int(x)]
        assert text.startswith("(") == (row["low"] <= 0 <= row["high"])
        if abs(gain) >= 0.05:
            assert ("+" if gain > 0 else "−") in text
    with pytest.raises(StudyError, match="several rows"):
        plots.pin_transfer(pd.concat([frame, frame]))


def test_pins_say_how_many_at_which_capacity() -> None:
    frame = frames.pin_transfer().assign(top=8, capacity=24)
    assert "8 pins a layer gain at capacity 24" in plots.pin_transfer(frame).get_title(loc="left")
    mixed = frame.assign(capacity=np.arange(len(frame)))
    assert "capacity" not in plots.pin_transfer(mixed).get_title(loc="left")


def test_prices_are_points_and_medians_of_groups() -> None:
    frame = frames.prices(count=200)
    frame.loc[0, "weight"] = np.nan
    ax = plots.price_by_weight(frame, lambda w: 0.3 * w, bins=5)
    drops = frame[(frame["action"] == "drop") & frame["weight"].notna()]
    points = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 0], drops["weight"])
    floor = points[:, 1].min()
    np.testing.assert_allclose(points[:, 1], drops["price"].clip(lower=floor))
    assert (drops["price"] == 0).any()
    assert floor > 0
    x, y = curve(ax, "drop: medians of 5 groups")
    ordered = drops.sort_values("weight", kind="stable")
    parts = np.array_split(ordered[["weight", "price"]].to_numpy(), 5)
    np.testing.assert_allclose(x, [np.median(p[:, 0]) for p in parts])
    np.testing.assert_allclose(y, [np.median(np.clip(p[:, 1], floor, None)) for p in parts])

    class Model:
        action = "drop"

        def predict(self, rows: pd.DataFrame) -> np.ndarray:
            assert set(rows["action"]) == {"drop"}
            return np.log(0.2 * rows["weight"].to_numpy())

    x, y = curve(plots.price_by_weight(frame, Model(), bins=5), "the fit's")
    np.testing.assert_allclose(x, [np.median(p[:, 0]) for p in parts])
    np.testing.assert_allclose(y, [0.2 * np.median(p[:, 0]) for p in parts])
    with pytest.raises(StudyError, match="weight above 0"):
        plots.price_by_weight(frame.assign(weight=np.nan))


def test_policies_are_dots_and_the_best_are_filled() -> None:
    frame = frames.policies()
    ax = plots.policies(frame)
    dots = [li for li in ax.get_lines() if li.get_marker() not in ("None", "", None)]
    dots = [li for li in dots if len(np.asarray(li.get_xdata())) == 1]
    shown = sorted(float(np.asarray(li.get_xdata())[0]) for li in dots)
    real = frame[~frame["policy"].isin(["min", "min_forced"])]
    np.testing.assert_allclose(shown, sorted(real["miss_ratio"]))
    filled = sum(li.get_markerfacecolor() != "white" for li in dots)
    assert filled == real["best"].sum()
    with pytest.raises(StudyError, match="bounds only"):
        plots.policies(frame[frame["policy"] == "min"])


def test_a_forecast_states_its_median_error() -> None:
    frame = pd.DataFrame({"predicted": [1.1, 2.0, 6.0], "measured": [1.0, 2.0, 4.0]})
    ax = plots.forecast(frame, unit="tokens/s")
    assert "median error 10%" in ax.get_title(loc="left")
    x, y = curve(ax, "runs")
    assert list(x) == [1, 2, 4]
    assert list(y) == [1.1, 2, 6]
    with pytest.raises(StudyError, match="above 0"):
        plots.forecast(frame.assign(measured=0.0))


def test_working_sets_by_domain_or_layer() -> None:
    frame = frames.working_sets()
    x, y = curve(plots.working_set(frame, experts=64), "prose")
    np.testing.assert_allclose(y, frame.loc[frame["domain"] == "prose", "distinct"])
    assert list(x) == [1, 2, 4, 8, 16, 32, 64, 128]
    one = frame[frame["domain"] == "prose"]
    both = pd.concat([one.assign(layer=0), one.assign(layer=1, distinct=3.0)])
    assert list(curve(plots.working_set(both), "layer 1")[1]) == [3.0] * 8
    phases = np.where(np.arange(len(frame)) % 2, "decode", "prefill")
    with pytest.raises(StudyError, match="phases"):
        plots.working_set(frame.assign(phase=phases))


def test_numbers_are_written_as_by_hand() -> None:
    known = {0.0: "0", 0.02: "0.02", 3.0: "3", 1000.0: "1,000", 1e-5: "10⁻⁵", 2e-4: "2×10⁻⁴",
             1e6: "10⁶"}  # fmt: skip
    assert {value: short_number(value) for value in known} == known


@pytest.mark.parametrize("metric", ["cv", "gini", "entropy"])
def test_balance_is_drawn_with_its_chance(metric: str) -> None:
    frame = frames.balances()
    ax = plots.balance(frame, metric)
    np.testing.assert_allclose(curve(ax, "math")[1], frame.loc[frame["domain"] == "math", metric])
    assert curve(ax, "chance")[1] == pytest.approx(frame[f"{metric}_chance"].iloc[0])


def test_agreement_and_its_chance() -> None:
    frame = frames.agreement()
    ax = plots.agreement(frame)
    np.testing.assert_allclose(np.asarray(ax.get_lines()[0].get_ydata()), frame["agreement"])
    assert curve(ax, "chance")[1] == pytest.approx(6 / 64)
    metrics = plots.agreement(frame.drop(columns="agreement"))
    np.testing.assert_allclose(np.asarray(metrics.get_lines()[0].get_ydata()), frame["overlap"])
    both = pd.concat([frame.assign(action="drop"), frame.assign(action="low_bit", agreement=0.9)])
    assert curve(plots.agreement(both), "low_bit")[1] == pytest.approx(0.9)
    labels = [li.get_label() for li in plots.agreement(frame, "same_first").get_lines()]
    assert "chance" not in labels, "it is chance of the overlap"
    assert not plots.agreement(frame, "same_first").collections, "nor are the intervals its own"
    with pytest.raises(StudyError, match="overlap"):
        plots.agreement(frame, "rank")


def test_layers_that_stand_twice_are_refused() -> None:
    frame = frames.agreement()
    with pytest.raises(StudyError, match="several rows"):
        plots.agreement(pd.concat([frame, frame]))


# -- tokens ----------------------------------------------------------------------------------


def test_coloured_text_draws_every_letter_once() -> None:
    texts = ["<b>", " $x$", "⏎\n", "word" * 30, ""]
    ax = plots.coloured_text(texts, [0.0, 1.0, np.nan, 0.5, 0.2], label="share", width=40)
    drawn = [t.get_text() for t in ax.texts]
    assert "".join(drawn) == "".join(texts).replace("\n", "")
    places = [tuple(np.round(t.get_position(), 2)) for t in ax.texts]
    assert len(set(places)) == len(places)
    assert all(x < 40 for x, _ in places)
    with pytest.raises(StudyError, match="texts"):
        plots.coloured_text(["a"], [1.0, 2.0], label="share")


def test_experts_of_a_token_have_their_ids_and_misses() -> None:
    slots = pd.DataFrame(
        {
            "layer": [0, 0, 3, 3], "rank": [0, 1, 0, 1], "expert": [7, 9, 1, 2],
            "weight": [0.7, 0.3, 0.6, 0.4], "hit": [True, False, False, True],
        }
    )  # fmt: skip
    ax = plots.token_experts(slots)
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), [[0.7, 0.3], [0.6, 0.4]])
    assert [t.get_text() for t in ax.texts] == ["7", "9 ✗", "1 ✗", "2"]
    with pytest.raises(StudyError, match="several tokens"):
        plots.token_experts(pd.concat([slots, slots]))
