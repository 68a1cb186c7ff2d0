"""Charts show the numbers of the frame they were given, and nothing else."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from moelab import plots
from moelab.routing.loop import PHASES

mpl.use("agg")

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 40


@pytest.fixture(scope="module")
def routing() -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = [
        (token, layer, rank, expert, bool(random.random() < 0.6))
        for token in range(TOKENS)
        for layer in range(LAYERS)
        for rank, expert in enumerate(random.permutation(EXPERTS)[:TOP_K])
    ]
    frame = pd.DataFrame(rows, columns=["position", "layer", "rank", "expert", "hit"])
    phase = np.where(frame["position"] < 10, "prefill", "decode")
    frame["phase"] = pd.Categorical(phase, categories=list(PHASES))
    return frame


@pytest.fixture(scope="module")
def tokens(routing: pd.DataFrame) -> pd.DataFrame:
    grouped = routing.groupby("position")
    frame = pd.DataFrame({"hits": grouped["hit"].sum(), "routed": grouped.size()})
    frame["misses"] = frame["routed"] - frame["hits"]
    frame["phase"] = grouped["phase"].first()
    return frame.reset_index()


def test_expert_map_shows_multiples_of_uniform_use(routing: pd.DataFrame) -> None:
    ax = plots.expert_map(routing, experts=EXPERTS)
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.shape == (LAYERS, EXPERTS)
    counted = np.zeros((LAYERS, EXPERTS))
    for layer, expert in zip(routing["layer"], routing["expert"], strict=True):
        counted[layer, expert] += 1
    np.testing.assert_allclose(drawn, counted / (TOKENS * TOP_K) * EXPERTS)


def test_expert_map_has_a_column_for_experts_that_were_never_chosen(routing: pd.DataFrame) -> None:
    ax = plots.expert_map(routing, experts=EXPERTS + 4)
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.shape == (LAYERS, EXPERTS + 4)
    assert (drawn[:, EXPERTS:] == 0).all()


def test_hit_rate_by_layer_shows_each_phase(routing: pd.DataFrame) -> None:
    ax = plots.hit_rate_by_layer(routing, uniform=0.5)
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    for phase in ("prefill", "decode"):
        chosen = routing[routing["phase"] == phase]
        expected = chosen.groupby("layer")["hit"].mean().to_numpy()
        np.testing.assert_allclose(np.asarray(lines[phase].get_ydata()), expected)


def test_hit_rate_over_time_shows_every_token_once(tokens: pd.DataFrame) -> None:
    ax = plots.hit_rate_over_time(tokens, window=4)
    points = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    points = points[np.argsort(points[:, 0])]
    assert len(points) == TOKENS
    np.testing.assert_allclose(points[:, 1], tokens["hits"] / tokens["routed"])


def test_the_running_mean_does_not_cross_from_prompt_to_answer(tokens: pd.DataFrame) -> None:
    frame = tokens.assign(hits=np.where(tokens["phase"] == "prefill", 0, tokens["routed"]))
    frame["misses"] = frame["routed"] - frame["hits"]
    means = [np.asarray(line.get_ydata()) for line in plots.hit_rate_over_time(frame).get_lines()]
    assert [set(mean) for mean in means] == [{0.0}, {1.0}]


def test_domain_experts_draws_each_domain_with_every_expert_once(routing: pd.DataFrame) -> None:
    first, second = routing[routing["position"] < 20], routing[routing["position"] >= 20]
    ax = plots.domain_experts({"a": first, "b": second}, 1, experts=EXPERTS)
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.shape == (2, EXPERTS)
    for row, frame in zip(drawn, (first, second), strict=True):
        chosen = frame.loc[frame["layer"] == 1, "expert"]
        counts = np.bincount(chosen, minlength=EXPERTS) / len(chosen)
        np.testing.assert_allclose(np.sort(row), np.sort(counts * EXPERTS))


def test_charts_draw_on_the_axes_they_are_given(
    routing: pd.DataFrame, tokens: pd.DataFrame
) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3)
    assert plots.expert_map(routing, ax=axes[0]) is axes[0]
    assert plots.hit_rate_by_layer(routing, ax=axes[1]) is axes[1]
    assert plots.hit_rate_over_time(tokens, ax=axes[2]) is axes[2]
    plt.close(figure)


def test_style_is_left_as_it_was_found(routing: pd.DataFrame) -> None:
    before = dict(mpl.rcParams)
    plots.expert_map(routing)
    assert dict(mpl.rcParams) == before
