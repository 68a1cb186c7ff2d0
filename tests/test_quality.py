"""Forced texts, clustered means, and the charts of what a miss costs."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab import plots
from moelab.errors import MoelabError
from moelab.quality.clustered import clustered_mean
from moelab.quality.forced import ForcedText
from tests.support import stock, tiny

TOKENS = tiny.prompt(30)


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "deepseek_v3"])
def test_exact_scores_are_stocks(family: str) -> None:
    path = stock.folder(family)
    model, _ = stock.stock(path)
    cache = make_prompt_cache(model)
    model(mx.array([TOKENS[:12]]), cache=cache)
    want = []
    for given, wanted in pairwise(TOKENS[12:]):
        logits = np.array(model(mx.array([[given]]), cache=cache)[0, -1].astype(mx.float32))
        logits = logits.astype(np.float64)
        want.append(logits[wanted] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    with moelab.load(path, 6) as lab:
        text = ForcedText(lab, TOKENS, prefix=12)
        frame = text.score()
        assert frame["position"].tolist() == list(range(13, 30))
        assert frame["token_id"].tolist() == TOKENS[13:]
        np.testing.assert_allclose(frame["logprob"], want, atol=1e-5)
        # Going on from the prefix leaves the prefix as it was, whatever ran in between.
        dropped = text.score("drop")["logprob"]
        assert not dropped.equals(frame["logprob"])
        assert text.score("drop")["logprob"].equals(dropped)
        assert text.score("drop", swap_budget=0)["logprob"].equals(dropped) is False
        lab.resize(9)
        assert text.score()["logprob"].equals(frame["logprob"])


def test_the_prefix_runs_exactly() -> None:
    """A lossy lab's first prediction after the prefix is the exact one's."""
    path = stock.folder("olmoe")
    with moelab.load(path, 4, on_miss="drop") as lab:
        text = ForcedText(lab, TOKENS, prefix=20)
        first = text.score("drop").iloc[0]["logprob"]
        exact = text.score("load").iloc[0]["logprob"]
    assert first != exact, "the first token scored has gone through the action"


def test_texts_that_are_too_short() -> None:
    with moelab.load(stock.folder("olmoe"), 4) as lab:
        for tokens, prefix in ((TOKENS[:5], 4), (TOKENS, 0), ([], 1)):
            with pytest.raises(MoelabError, match="at least two more"):
                ForcedText(lab, tokens, prefix=prefix)


def frame(documents: int, tokens: int, seed: int = 0, within: float = 0.1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = []
    for number in range(documents):
        level = rng.normal()
        parts.append(
            pd.DataFrame(
                {
                    "document": str(number),
                    "domain": "ab"[number % 2],
                    "group": "g",
                    "cost": level + within * rng.normal(size=tokens + number % 3),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def test_clustered_mean() -> None:
    data = frame(20, 50)
    row = clustered_mean(data, "cost", ["group"]).iloc[0]
    assert row["mean"] == pytest.approx(data["cost"].mean())
    assert (row["tokens"], row["documents"]) == (len(data), 20)
    # Documents differ by about 1, so the interval is about ±1.96/√20 and not ±1.96/√1000.
    assert 0.5 < (row["high"] - row["low"]) / (2 * 1.96 / np.sqrt(20)) < 1.5


def test_clustered_mean_covers() -> None:
    """The truth, 0, lies in most intervals of simulated documents."""
    inside = 0
    for seed in range(200):
        row = clustered_mean(frame(16, 5, seed), "cost", ["group"]).iloc[0]
        inside += row["low"] <= 0 <= row["high"]
    assert 0.85 <= inside / 200 <= 0.99


def test_clustered_mean_says_what_it_cannot() -> None:
    data = frame(2, 10)
    row = clustered_mean(data, "cost", ["group"]).iloc[0]
    assert np.isnan(row["low"]) and np.isnan(row["high"])
    data.loc[3, "cost"] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        clustered_mean(data, "cost", ["group"])


def summary() -> pd.DataFrame:
    rows = [
        (action, capacity, mean, mean - 0.005, mean + 0.005)
        for action, slope in (("low_bit", 0.001), ("drop", 0.02), ("wrong_slot", 0.1))
        for capacity in (48, 32)
        for mean in [slope * (64 - capacity) / 8]
    ]
    return pd.DataFrame(rows, columns=["action", "capacity", "mean", "low", "high"])


def test_charts() -> None:
    ax = plots.cost_by_capacity(summary(), experts=64)
    assert ax.get_yscale() == "log" and ax.xaxis_inverted()
    lines = {line.get_label(): line for line in ax.get_lines()}
    drop = lines["drop"]
    np.testing.assert_allclose(np.sort(drop.get_ydata()), np.exp([0.04, 0.08]))
    ax = plots.safe_capacities(summary())
    colours = {patch.get_facecolor() for patch in ax.patches}
    assert len(ax.patches) == 6 and len(colours) == 4
    shown = {text.get_text() for text in ax.texts}
    assert "×1.08" in shown and "×1.00" in shown
    plt.close("all")
