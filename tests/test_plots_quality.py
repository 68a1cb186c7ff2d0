"""Charts of quality show the frame's own numbers, zeros and the noise floor included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moelab import plots
from moelab.errors import SchemaError, StudyError

from .support import plot_frames

mpl.use("agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    return plot_frames.sweep(documents=2, capacities=(16, 32, 48))


def curve(ax: Any, label: str) -> tuple[np.ndarray, np.ndarray]:
    line = next(line for line in ax.get_lines() if str(line.get_label()) == label)
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def over_tokens(rows: pd.DataFrame, column: str) -> float:
    """The mean over tokens, in plain arithmetic."""
    total = sum(v * n for v, n in zip(rows[column], rows["tokens"], strict=True))
    return float(total / sum(rows["tokens"]))


def test_a_point_is_the_mean_over_tokens_at_its_bytes(sweep: pd.DataFrame) -> None:
    x, y = curve(plots.frontier(sweep), "drop")
    drops = sweep[sweep["on_miss"] == "drop"]
    for nbytes, kl in zip(x, y, strict=True):
        here = drops[np.isclose(drops["bytes"] / 1e6, nbytes)]
        assert len(here) == 12
        assert kl == pytest.approx(over_tokens(here, "kl_mean"))
    assert list(x) == sorted(x)


def test_ratio_and_perplexity_are_exponentials_of_means(sweep: pd.DataFrame) -> None:
    at = sweep[(sweep["on_miss"] == "drop") & (sweep["capacity"] == 32)]
    for metric, column in (("ln_ppl_ratio", "ln_ppl_ratio"), ("ppl", "nll")):
        x, y = curve(plots.capacity(sweep, metric), "drop")
        assert y[list(x).index(32)] == pytest.approx(np.exp(over_tokens(at, column)))


def test_zero_stands_at_a_floor_that_is_labelled_zero(sweep: pd.DataFrame) -> None:
    ax = plots.capacity(sweep)
    _, exact = curve(ax, "load (exact)")
    floor = float(exact[0])
    assert len(set(exact)) == 1
    positive = sweep.loc[sweep["kl_mean"] > 0, "kl_mean"]
    assert floor < positive.min() * 100, "near the data"
    _, other = curve(ax, "low_bit")
    assert floor < other.min(), "and below all that is not zero"
    ax.figure.canvas.draw()
    texts = {t: label.get_text() for t, label in zip(ax.get_yticks(), ax.get_yticklabels(),
                                                     strict=True)}  # fmt: skip
    assert [text for at, text in texts.items() if np.isclose(at, floor)] == ["0"]


def test_charts_of_tokens_have_a_noise_floor_or_say_that_there_is_none() -> None:
    tokens, arms = plot_frames.judged(), plot_frames.arms()
    for draw, frame in ((plots.kl_by_position, tokens), (plots.kl_quantiles, tokens),
                        (plots.arms, arms)):  # fmt: skip
        assert "noise floor: not measured" in legend(draw(frame))
        for value, told in ((0.0, "exact runs are equal"), (1e-4, "10⁻⁴")):
            assert any(told in text for text in legend(draw(frame, noise_floor=value)))


@pytest.mark.parametrize("metric", ["kl_mean", "same_top1", "ln_ppl_ratio", "ppl", "nll"])
def test_every_metric_has_the_noise_floor(sweep: pd.DataFrame, metric: str) -> None:
    ax = plots.frontier(sweep, metric)
    lines = [line for line in ax.get_lines() if line.get_gid() == "noise"]
    at = np.unique(np.asarray(lines[0].get_ydata(), float))
    _, exact = curve(ax, "load (exact)")
    if metric in ("ppl", "nll"):
        assert exact.min() <= at[0] <= exact.max()
    else:
        assert at == pytest.approx(exact[0])
    without = plots.frontier(sweep[sweep["on_miss"] != "load"], metric)
    assert "noise floor: not measured" in legend(without)


def test_a_given_noise_floor_is_drawn_at_its_value(sweep: pd.DataFrame) -> None:
    ax = plots.frontier(sweep, noise_floor=2e-5)
    line = next(line for line in ax.get_lines() if line.get_gid() == "noise")
    assert np.asarray(line.get_ydata())[0] == 2e-5
    assert any("2×10⁻⁵" in text for text in legend(ax))


def test_noise_of_exact_runs_is_the_worst_of_them(sweep: pd.DataFrame) -> None:
    noisy = sweep.copy()
    noisy.loc[(noisy["on_miss"] == "load") & (noisy["capacity"] == 32), "kl_mean"] = 3e-6
    line = next(li for li in plots.frontier(noisy).get_lines() if li.get_gid() == "noise")
    assert np.asarray(line.get_ydata())[0] == pytest.approx(3e-6)


def test_comparators_are_curves_of_their_own(sweep: pd.DataFrame) -> None:
    assert {"whole_2bit", "pruned", "load (exact)"} < set(legend(plots.frontier(sweep)))


def test_settings_that_vary_are_curves_of_their_own(sweep: pd.DataFrame) -> None:
    drops = sweep[sweep["on_miss"] == "drop"]
    both = pd.concat([sweep, drops.assign(policy="lfru", kl_mean=drops["kl_mean"] / 2)])
    ax = plots.frontier(both)
    assert {"drop, lru", "drop, lfru", "low_bit"} < set(legend(ax))
    np.testing.assert_allclose(curve(ax, "drop, lfru")[1] * 2, curve(ax, "drop, lru")[1])


def test_an_exact_run_with_a_quantised_cache_is_no_noise_floor(sweep: pd.DataFrame) -> None:
    exact = sweep[sweep["on_miss"] == "load"]
    both = pd.concat([sweep, exact.assign(kv_bits=8, kl_mean=0.02, bytes=exact["bytes"] - 9)])
    ax = plots.frontier(both)
    assert {"load, KV full (exact)", "load, KV 8 bits"} < set(legend(ax))
    assert any("none" in text for text in legend(ax) if "noise" in text)
    assert curve(ax, "load, KV 8 bits")[1] == pytest.approx(0.02)


def test_caches_of_unlike_sizes_are_one_point(sweep: pd.DataFrame) -> None:
    varied = sweep.assign(bytes=sweep["bytes"] + np.arange(len(sweep)) % 7)
    assert len(curve(plots.frontier(varied), "drop")[0]) == 3


def test_splits_are_not_mixed(sweep: pd.DataFrame) -> None:
    mixed = sweep.assign(split=np.where(np.arange(len(sweep)) % 2, "test", "selection"))
    with pytest.raises(StudyError, match="splits"):
        plots.frontier(mixed)


def test_figures_that_cannot_be_pooled_are_refused(sweep: pd.DataFrame) -> None:
    with pytest.raises(StudyError, match="kl_p99"):
        plots.frontier(sweep, "kl_p99")


def test_capacities_within_tolerances_are_written() -> None:
    frame = plot_frames.tolerances()
    ax = plots.capacity_within(frame, experts=64)
    cells = {tuple(np.round(t.get_position())): t.get_text() for t in ax.texts}
    actions = list(dict.fromkeys(frame["on_miss"]))
    assert cells[0, actions.index("low_bit")] == "32  (50%)"
    assert cells[0, actions.index("drop")] == "none found"
    assert len(cells) == len(frame)
    with pytest.raises(StudyError, match="several rows"):
        plots.capacity_within(pd.concat([frame, frame]))


def test_kl_by_position_averages_the_tokens_of_a_stretch() -> None:
    frame = plot_frames.judged(("drop",))
    x, y = curve(plots.kl_by_position(frame, bins=4), "all tokens")
    behind = frame["position"] - 64
    expected = [frame.loc[(behind > a) & (behind <= a + 24), "kl"].mean() for a in range(0, 96, 24)]
    np.testing.assert_allclose(y, expected)
    np.testing.assert_allclose(x, [12.5, 36.5, 60.5, 84.5])


def test_quantiles_of_kl_are_numpys() -> None:
    frame = plot_frames.judged()
    ax = plots.kl_quantiles(frame, by="on_miss")
    kl = frame.loc[frame["on_miss"] == "drop", "kl"]
    marks = [
        li for li in ax.get_lines() if li.get_marker() == "D" and len(np.asarray(li.get_xdata()))
    ]
    x, y = (np.asarray(v, float) for v in marks[0].get_data())
    np.testing.assert_allclose(y, np.quantile(kl, 1 - 1 / x))
    assert len(x) == 5
    assert any(f"max {kl.max():.2g}" in text for text in legend(ax))


def test_few_tokens_do_not_claim_a_far_tail() -> None:
    few = plot_frames.judged(("drop",)).iloc[:50]
    ax = plots.kl_quantiles(few)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["50%", "90%", "95%"]
    marks = next(li for li in ax.get_lines() if li.get_linestyle() == "None")
    np.testing.assert_allclose(np.asarray(marks.get_xdata()), [2, 10, 20])


def test_arms_are_means_by_domain_and_for_all() -> None:
    frame = plot_frames.arms()
    ax = plots.arms(frame)
    x, y = curve(ax, "with the full model's routing")
    imposed = frame[frame["arm"] == "imposed"]
    expected = [*imposed.groupby("domain", sort=False)["kl"].mean(), imposed["kl"].mean()]
    np.testing.assert_allclose(x, expected)
    assert list(np.round(y)) == list(range(7))
    assert [t.get_text() for t in ax.get_yticklabels()][-1] == "all"


def test_means_by_arm_are_drawn_as_they_are() -> None:
    rows = [("drop", "constrained", 0.3), ("drop", "own", 0.1), ("low_bit", "constrained", 0.02)]
    frame = pd.DataFrame(rows, columns=["action", "arm", "mean"])
    frame = frame.assign(low=frame["mean"] * 0.9, high=frame["mean"] * 1.2)
    ax = plots.arms(frame)
    assert list(curve(ax, "constrained, as it runs")[0]) == [0.3, 0.02]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["drop", "low_bit"]
    with pytest.raises(StudyError, match="several rows"):
        plots.arms(pd.concat([frame, frame]))


def test_shares_by_action_are_of_one_domain() -> None:
    every = plot_frames.shares()
    one = every[every["domain"] == "all"]
    both = pd.concat([one.assign(action="drop"), one.assign(action="low_bit")])
    labels = plots.damage_shares(both).get_yticklabels()
    assert [t.get_text() for t in labels] == ["drop", "low_bit"]
    with pytest.raises(StudyError, match="several rows"):
        plots.damage_shares(pd.concat([every.assign(action="drop"), every.assign(action="x")]))


def test_a_cliff_has_its_break_and_its_verdict() -> None:
    found = plot_frames.cliff()
    ax = plots.cliff(found, title="drop", noise_floor=0.0, note="lab")
    assert any("exact runs are equal" in text for text in legend(ax))
    assert ax.get_title(loc="left") == "drop: cliff at 30 (27 to 33)"
    np.testing.assert_allclose(curve(ax, "mean of 24 documents")[1], found.curve["mean"])
    np.testing.assert_allclose(curve(ax, "best smooth curve")[1], found.curve["smooth"])
    assert set(curve(ax, "break at 30")[0]) == {30}
    assert any("90% interval" in text for text in legend(ax))
    ax = plots.cliff(plot_frames.cliff(broken=False))
    assert ax.get_title(loc="left") == "No cliff"
    assert not any("break at" in text or "interval" in text for text in legend(ax))


def test_a_cliff_without_fits_is_a_curve() -> None:
    found = plot_frames.cliff(broken=False)
    found.curve[["smooth", "broken"]] = np.nan
    assert legend(plots.cliff(found)) == ["mean of 24 documents", "noise floor: not measured"]
    found.curve = found.curve.iloc[:0]
    with pytest.raises(SchemaError, match="no rows"):
        plots.cliff(found)


def test_shares_of_no_damage_are_left_out() -> None:
    frame = plot_frames.shares()
    x, _ = curve(plots.damage_shares(frame), "through other routing")
    np.testing.assert_allclose(x, frame.loc[frame["share"] == "rerouting", "mean"].dropna())
    with pytest.raises(StudyError, match="nothing was damaged"):
        plots.damage_shares(frame.iloc[:1])


def test_a_band_is_that_of_documents_and_not_of_tokens() -> None:
    # Every document constant: its tokens say nothing more than one of them.
    frame = pd.DataFrame(
        {
            "document": np.repeat([f"d{i}" for i in range(8)], 50), "domain": "prose",
            "position": np.tile(np.arange(50), 8), "kl": np.repeat(np.arange(1.0, 9.0), 50),
        }
    )  # fmt: skip
    ax = plots.kl_by_position(frame, bins=1)
    band = np.asarray(ax.collections[0].get_paths()[0].vertices)[:, 1]
    values = np.arange(1.0, 9.0)
    spread = 2.3646 * values.std(ddof=1) / np.sqrt(8)  # t of 7 degrees of freedom
    assert band.max() == pytest.approx(values.mean() + spread, rel=1e-3)


def test_a_band_is_within_domains(sweep: pd.DataFrame) -> None:
    # Domains differ, documents of one do not: other documents would give the same.
    level = sweep["domain"].map({name: i + 1.0 for i, name in enumerate(plot_frames.DOMAINS)})
    frame = sweep[sweep["on_miss"] == "drop"].assign(kl_mean=level, tokens=30)
    ax = plots.frontier(frame)
    band = np.asarray(ax.collections[0].get_paths()[0].vertices)[:, 1]
    np.testing.assert_allclose(band, 3.5)


def test_a_column_that_was_edited_is_named(sweep: pd.DataFrame) -> None:
    with pytest.raises(SchemaError, match="'kl_mean'"):
        plots.frontier(sweep.drop(columns="kl_mean"))
    with pytest.raises(SchemaError, match=r"'kl_mean'.*NaN"):
        plots.frontier(sweep.assign(kl_mean=np.nan))
    with pytest.raises(SchemaError, match=r"'bytes'.*numbers"):
        plots.frontier(sweep.assign(bytes="1 GB"))
    with pytest.raises(SchemaError, match="'capacity'"):
        plots.capacity(sweep.drop(columns="capacity"))
