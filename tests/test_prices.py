"""Prices of forced misses, and what is said of them.

The reference runs mlx-lm's stock model with one block whose arithmetic is written out here, and
computes divergences in plain numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from scipy import stats

import moelab
from moelab.errors import MissActionError, SchemaError, StudyError
from moelab.experts.forced import Forcing
from moelab.experts.misses import Reroute
from moelab.quality.judge import run_prefix
from moelab.quality.window import windows_of
from moelab.study import regression
from moelab.study.price_model import FLOOR, fit_prices
from moelab.study.price_results import JOINT_COLUMNS, PRICE_COLUMNS, Prices
from moelab.study.price_sample import plan
from moelab.study.prices import _Runs, margins_of, price_misses
from moelab.study.regression import quantile_fit
from tests.support import rules, stock
from tests.test_misses import Full, folder

PREFIX, TOKENS = 6, 8
LINE = "The quick brown fox, number {}, jumps over a dog that is {} times as lazy as before."
TEXTS = [
    {"text": LINE.format(i, 7 * i), "domain": "ab"[i % 2], "id": f"text-{i}"} for i in range(4)
]
OPTIONS: dict[str, Any] = {
    "prefix": PREFIX,
    "tokens": TOKENS,
    "misses": 6,
    "positions": 2,
    "joint": 2,
}


@pytest.fixture(scope="module")
def path() -> Path:
    return folder("olmoe")


@pytest.fixture(scope="module")
def prices(path: Path) -> Prices:
    with moelab.load(path, 9) as lab:
        lab.on_miss = "drop"
        found = price_misses(lab, TEXTS, **OPTIONS)
        assert lab.on_miss == "drop"
    return found


# -- running -------------------------------------------------------------------------------


def dropped_block(block: Any, expert: int) -> Any:
    """The block of olmoe, whose weights are not renormalised, without one expert."""

    def call(self: Any, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        z = rules.logits_of(self.gate, np.array(flat).astype(np.float64))
        p = rules.softmax(z)
        ids = np.argsort(-p, axis=-1)[:, : self.top_k]
        weights = np.take_along_axis(p, ids, -1) * (ids != expert)
        y = np.array(self.switch_mlp(flat, mx.array(ids.astype(np.uint32))))
        total = (y * weights[..., None]).sum(-2).astype(np.float32)
        return mx.array(total).reshape(x.shape)

    return type(type(block).__name__, (type(block),), {"__call__": call})


def log_softmax(logits: mx.array) -> np.ndarray:
    z = np.array(logits.astype(mx.float32)).astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


def rest_of(model: Any, site: Any, tokens: list[int], at: int, expert: int | None) -> np.ndarray:
    """Log-probabilities from token `at` on, with one expert dropped at that token."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([tokens[:PREFIX]]), cache=cache))
    for token in tokens[PREFIX:at]:
        mx.eval(model(mx.array([[token]]), cache=cache))
    own = type(site.parent)
    if expert is not None:
        site.parent.__class__ = dropped_block(site.parent, expert)
    try:
        here = model(mx.array([[tokens[at]]]), cache=cache)[0]
        mx.eval(here)
    finally:
        site.parent.__class__ = own
    rest = tokens[at + 1 : -1]
    parts = [here, model(mx.array([rest]), cache=cache)[0]] if rest else [here]
    return np.concatenate([log_softmax(part) for part in parts])


def test_a_price_is_the_divergence_that_the_stock_model_shows(path: Path, prices: Prices) -> None:
    model, tokenizer = stock.stock(path)
    sites = Full(path).sites
    frame = prices.frame[prices.frame["action"] == "drop"]
    assert len(frame) == 6 * len(TEXTS)
    for row in frame.iloc[::5].itertuples():
        (text,) = (t["text"] for t in TEXTS if t["id"] == row.document)
        tokens = tokenizer.encode(text)[: PREFIX + TOKENS + 1]
        site = sites[row.layer]
        full = rest_of(model, site, tokens, row.position, None)
        lossy = rest_of(model, site, tokens, row.position, row.expert)
        kl = (np.exp(full) * (full - lossy)).sum(-1)
        assert len(kl) == row.remaining == PREFIX + TOKENS - row.position
        assert row.price == pytest.approx(kl.sum(), rel=2e-3, abs=1e-9)
        assert row.price_here == pytest.approx(kl[0], rel=2e-3, abs=1e-9)
        assert row.later_share == pytest.approx(1 - kl[0] / kl.sum(), abs=5e-3)
        assert row.price > 0


def test_the_frames_are_whole(path: Path, prices: Prices) -> None:
    frame, joint = prices.frame, prices.joint
    assert {name: str(frame[name].dtype) for name in frame} == dict(PRICE_COLUMNS)
    assert {name: str(joint[name].dtype) for name in joint} == dict(JOINT_COLUMNS)
    key = ["document", "position", "layer", "expert"]
    assert not frame.duplicated([*key, "action"]).any()
    # Every action has the same misses, whose description does not depend on it.
    per_action = [
        part.drop(columns=["action", "price", "price_here", "later_share"]).reset_index(drop=True)
        for _, part in frame.groupby("action", sort=False)
    ]
    assert len(per_action) == 3
    for other in per_action[1:]:
        pd.testing.assert_frame_equal(per_action[0], other)
    # By falling weight: rank 0 outweighs rank 1 of the same token and layer.
    with moelab.load(path, 1.0) as lab, lab.record() as rec:
        (window, *_) = windows_of(lab.tokenizer, TEXTS, prefix=PREFIX, tokens=TOKENS)
        lab.model(mx.array([list(window.tokens)]))
        mine = per_action[0][per_action[0]["document"] == window.document]
    recorded = rec.routing.set_index(["position", "layer", "rank"])
    for row in mine.itertuples():
        there = recorded.loc[(row.position, row.layer, row.rank)]
        assert there["expert"] == row.expert
        assert there["weight"] == pytest.approx(row.weight, rel=1e-4)


def test_sums_of_joint_misses(prices: Prices) -> None:
    alone = prices.frame.set_index(["document", "position", "action"])["price"]
    alone = alone.sort_index(kind="stable")
    key = ["document", "position", "action"]
    assert (prices.frame.groupby(key).size() > 2).any()
    for at, mine in prices.joint[prices.joint["kind"] != "neighbours"].groupby(key):
        there = alone.loc[at].to_numpy()
        pairs = range(0, len(there) - 1, 2) if len(there) > 2 else ()
        wanted = [("pair", 2, there[i : i + 2].sum()) for i in pairs]
        wanted += [("all", len(there), there.sum())]
        told = list(zip(mine["kind"], mine["misses"], mine["sum"], strict=True))
        assert [row[:2] for row in told] == [row[:2] for row in wanted]
        assert [row[2] for row in told] == pytest.approx([row[2] for row in wanted], rel=1e-12)
    neighbours = prices.joint[prices.joint["kind"] == "neighbours"]
    assert len(neighbours) == 2 * len(TEXTS) * 3 and (neighbours["joint"] > 0).all()


def test_capacity_and_sampling_change_no_price(path: Path, prices: Prices) -> None:
    with moelab.load(path, 1.0) as lab:
        again = price_misses(lab, TEXTS, **OPTIONS)
    pd.testing.assert_frame_equal(again.frame, prices.frame)
    pd.testing.assert_frame_equal(again.joint, prices.joint)


@pytest.mark.parametrize("action", ["drop", "substitute", "low_bit"])
def test_no_miss_costs_exactly_nothing(path: Path, action: str) -> None:
    with moelab.load(path, 9) as lab:
        runs = _Runs(lab, [action])
        (window, *_) = windows_of(lab.tokenizer, TEXTS, prefix=PREFIX, tokens=TOKENS)
        cache = run_prefix(lab.model, window)
        nothing: dict[int, dict[int, list[int]]] = {0: {site.layer: [] for site in lab.sites}}
        reference = runs._logits(window, 0, cache, {}, None)
        kl = runs._kl(window, 0, cache, reference, nothing, runs.forcings[action])
        assert len(kl) == TOKENS and not kl.any()


@pytest.mark.parametrize("variant", ["qwen3_next", "deepseek_v3", "gpt_oss"])
def test_margins(variant: str) -> None:
    with moelab.load(folder(variant), 1.0) as lab:
        forcing = Forcing(lab, Reroute(0.0))
        tokens = mx.array([[5, 9, 17, 33, 65]])
        full = Full(folder(variant))
        seen: dict[int, np.ndarray] = {}
        with forcing.missing({site.layer: [] for site in lab.sites}) as layers:
            for site in lab.sites:
                own = type(site.parent)

                def noting(
                    self: Any, x: mx.array, own: type = own, layer: int = site.layer
                ) -> mx.array:
                    seen[layer] = np.array(x)[0].astype(np.float64)
                    return own.__call__(self, x)

                site.parent.__class__ = type(own.__name__, (own,), {"__call__": noting})
            mx.eval(lab.model(tokens))
            for site in lab.sites:
                site.parent.__class__ = type(site.parent).__mro__[1]
        for site in lab.sites:
            block = full.sites[site.layer].parent
            if variant == "deepseek_v3":
                scores = rules.rule_of(variant, block, lab.config).scores(seen[site.layer])
                z = np.where(scores.allowed, scores.selection, -np.inf)
            else:
                gate = block.router if variant == "gpt_oss" else block.gate
                z = rules.logits_of(gate, seen[site.layer])
            top = -np.sort(-z, axis=-1)
            got = margins_of(*layers[site.layer].scores[0], site.top_k)
            np.testing.assert_allclose(
                got, top[:, site.top_k - 1] - top[:, site.top_k], rtol=1e-3, atol=2e-5
            )


@settings(max_examples=60, deadline=None)
@given(
    layout=st.dictionaries(st.integers(0, 40), st.integers(1, 8), min_size=1, max_size=6),
    judged=st.integers(1, 40),
    positions=st.integers(1, 6),
    misses=st.integers(1, 60),
    seed=st.integers(0, 999),
)
def test_plan(layout: dict[int, int], judged: int, positions: int, misses: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    if positions > max(1, judged // 2) or misses > positions * sum(layout.values()):
        with pytest.raises(StudyError):
            plan(layout, judged, positions, misses, random)
        return
    cells = plan(layout, judged, positions, misses, random)
    assert len(set(cells)) == len(cells) == misses
    assert all(0 <= at < max(1, judged // 2) and 0 <= r < layout[n] for at, n, r in cells)
    by_layer = {n: sum(cell[1] == n for cell in cells) for n in layout}
    if misses <= min(layout.values()) * positions * len(layout):
        assert max(by_layer.values()) - min(by_layer.values()) <= 1
    for layer, top_k in layout.items():
        by_rank = [sum(cell[1:] == (layer, rank) for cell in cells) for rank in range(top_k)]
        assert max(by_rank) - min(by_rank) <= 1


def test_bad_input(path: Path) -> None:
    with moelab.load(path, 1.0) as lab:
        for options, told in (
            ({"positions": 5}, "first half of 8"),
            ({"misses": 999}, "more than there are"),
            ({"misses": 0}, "int from 1 on"),
            ({"tokens": 500}, "too short"),
            ({"on_miss": "load"}, "exact"),
            ({"on_miss": ()}, "names no action"),
            ({"on_miss": ["drop", "drop"]}, "twice"),
            ({"joint": True}, "joint"),
        ):
            with pytest.raises(StudyError, match=told):
                price_misses(lab, TEXTS, **{**OPTIONS, **options})
        with pytest.raises(StudyError, match="no text"):
            price_misses(lab, [], **OPTIONS)
        with pytest.raises(MissActionError, match="must be one of"):
            price_misses(lab, TEXTS, on_miss="skip", **OPTIONS)
        assert lab.on_miss == "load"


# -- what is said of them ------------------------------------------------------------------


def made(
    seed: int = 0, documents: int = 30, each: int = 30, exponent: float = 1.7, noise: float = 0.6
) -> pd.DataFrame:
    """Prices that go with weight ** exponent · exp(2 · depth), and with a level of each text."""
    random = np.random.default_rng(seed)
    count = documents * each
    text = np.repeat(np.arange(documents), each)
    weight = random.uniform(0.02, 0.5, count)
    depth = random.integers(0, 8, count) / 8
    level = random.normal(0, 0.5, documents)[text]
    log = -3 + exponent * np.log(weight) + 2 * depth + level + random.normal(0, noise, count)
    return pd.DataFrame(
        {
            "document": [f"{seed}-{t}" for t in text],
            "domain": [("x", "y")[t % 2] for t in text],
            "position": 40, "remaining": random.integers(20, 40, count), "layer": 1, "expert": 3,
            "rank": random.integers(0, 6, count), "weight": weight,
            "margin": random.exponential(1, count), "depth": depth, "action": "drop",
            "price": np.exp(log), "price_here": np.exp(log) * 0.6, "later_share": 0.4,
        }
    )  # fmt: skip


def test_summary_and_additivity() -> None:
    frame = made(documents=6, each=4)
    frame.loc[0, ["price", "price_here", "later_share"]] = 0, 0, np.nan
    joint = pd.DataFrame(
        {
            "document": ["0-0", "0-1", "0-2", "0-3"], "domain": ["x", "y"] * 2, "position": 1,
            "action": "drop", "kind": "pair", "misses": 2, "joint": [1.0, 2, 3, 4],
            "sum": [2.0, 2, 4, 4],
        }
    )  # fmt: skip
    prices = Prices(frame, joint, {})
    row = prices.summary.iloc[0]
    assert row["mean"] == pytest.approx(frame["price"].mean())
    assert row["low"] < row["mean"] < row["high"] and row["zero"] == 1 / 24
    assert row["later_share"] == pytest.approx(0.4)
    assert list(prices.summary["domain"]) == ["all", "x", "y"]
    (added,) = prices.additivity.itertuples()
    assert added.ratio == pytest.approx(10 / 12) and added.sets == 4
    assert added.median_ratio == pytest.approx(0.875)
    assert "together 0.83 times the sum" in repr(prices)
    assert "<table>" in prices._repr_html_()


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_model_finds_what_made_the_prices(
    quantile: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "QUANTILE_DRAWS", 60)
    train, test = made(0), made(1)
    model = fit_prices(train, action="drop", test=test, quantile=quantile)
    assert model.added == ["ln weight", "depth"]
    assert model.exponent[1] < 1.7 < model.exponent[2]
    assert model.exponent[2] - model.exponent[1] < 0.5
    depth = model.coefficients.set_index("term").loc["depth"]
    assert depth["low"] < 2 < depth["high"]
    truth, predicted = np.log(test["price"]), model.predict(test)
    rho = stats.spearmanr(truth, predicted).statistic
    assert model.spearman[0] == pytest.approx(rho) and model.spearman[1] < rho < model.spearman[2]
    if quantile is None:
        r2 = (
            1
            - ((truth - predicted) ** 2).sum()
            / ((truth - np.log(train["price"]).mean()) ** 2).sum()
        )
        assert model.explained[0] == pytest.approx(r2)
        # The expected price is right on average, which exp of the expected logarithm is not.
        assert np.exp(predicted).mean() < 0.85 * test["price"].mean()
    assert model.explained[1] < model.explained[0] < model.explained[2]
    assert "'drop', ln weight, depth are shown" in model.statement
    assert "shown to add" in repr(model)


def test_expected_prices_are_right_on_average() -> None:
    train = made(3, documents=60, each=60, noise=0.8)
    model = fit_prices(train, action="drop", resamples=50)
    assert model.expected(train).mean() == pytest.approx(train["price"].mean(), rel=0.1)


def test_least_squares_and_folds_equal_their_definition() -> None:
    train = made(2, documents=5, each=20)
    model = fit_prices(train, action="drop", predictors=["ln weight"], resamples=50)
    x, y = np.log(train["weight"]), np.log(train["price"])
    slope, _ = np.polyfit(x, y, 1)
    assert model.exponent[0] == pytest.approx(slope) == pytest.approx(model.exponent_alone[0])
    # Five documents in at most ten folds: each is left out by itself.
    predicted, mean = np.empty(len(y)), np.empty(len(y))
    for document in train["document"].unique():
        out = (train["document"] == document).to_numpy()
        predicted[out] = np.polyval(np.polyfit(x[~out], y[~out], 1), x[out])
        mean[out] = y[~out].mean()
    r2 = 1 - ((y - predicted) ** 2).sum() / ((y - mean) ** 2).sum()
    assert model.explained[0] == pytest.approx(r2)
    # The jackknife over documents, by its definition.
    left = [
        np.polyfit(x[train["document"] != d], y[train["document"] != d], 1)[0]
        for d in train["document"].unique()
    ]
    se = np.sqrt(4 / 5 * ((np.array(left) - slope) ** 2).sum())
    assert model.exponent[2] - slope == pytest.approx(stats.t.ppf(0.975, 4) * se)


def test_quantile_fit() -> None:
    random = np.random.default_rng(0)
    y = random.normal(size=101)
    ones = np.ones((101, 1))
    for q in (0.25, 0.5, 0.9):
        assert quantile_fit(ones, y, np.ones(101), q)[0] == pytest.approx(
            np.quantile(y, q), abs=0.1
        )
        x = np.stack([np.ones(101), random.normal(size=101) * 100], 1)
        b = quantile_fit(x, y, np.ones(101), q)

        def loss(beta: np.ndarray, q: float = q, x: np.ndarray = x) -> float:
            r = y - x @ beta
            return float(np.where(r >= 0, q * r, (q - 1) * r).sum())

        best = loss(b)
        for step in random.normal(size=(200, 2)) * [0.05, 0.0005]:
            assert best <= loss(b + step) + 1e-9
        # A weight of two is the row twice.
        w = random.integers(0, 3, 101).astype(float)
        twice = np.repeat(np.arange(101), w.astype(int))
        again = quantile_fit(x[twice], y[twice], np.ones(len(twice)), q)
        np.testing.assert_allclose(quantile_fit(x, y, w, q), again, atol=1e-8)


def test_one_text_a_domain_still_has_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Domains with one text are one stratum, rather than counted as certain."""
    monkeypatch.setattr(regression, "QUANTILE_DRAWS", 30)
    train = made(7, documents=8, each=20)
    train["domain"] = train["document"]
    for quantile in (None, 0.5):
        model = fit_prices(train, action="drop", quantile=quantile, resamples=50)
        for value, low, high in (model.exponent, model.explained, model.spearman):
            assert low < value < high
    row = Prices(train, pd.DataFrame(columns=list(JOINT_COLUMNS)), {}).summary.iloc[0]
    assert row["low"] < row["mean"] < row["high"]


def test_prices_of_zero_count_as_the_floor() -> None:
    train = made(4, documents=8, each=20)
    train.loc[:39, "price"] = 0.0
    model = fit_prices(train, action="drop", resamples=50)
    assert model.floored == pytest.approx(40 / 160) and np.isfinite(model.predict(train)).all()
    same = fit_prices(train.replace({"price": {0.0: FLOOR}}), action="drop", resamples=50)
    assert same.exponent == model.exponent
    assert f"floor of {FLOOR:g} nats" in repr(model)


def test_domains() -> None:
    train, test = made(5), made(6)
    for frame in (train, test):
        frame.loc[frame["domain"] == "y", "price"] *= 20
    plain = fit_prices(train, action="drop", test=test, resamples=50)
    model = fit_prices(train, action="drop", test=test, domain=True, resamples=50)
    assert model.explained[0] > plain.explained[0] + 0.2
    level = model.coefficients.set_index("term").loc["domain y"]
    assert level["low"] < np.log(20) < level["high"]


def test_bad_frames() -> None:
    frame = made(0, documents=4, each=5)
    for bad, told in (
        (frame.drop(columns="margin"), "'margin'"),
        (frame.assign(price=-1.0), "'price'"),
        (frame.assign(weight="heavy"), "'weight'"),
    ):
        with pytest.raises(SchemaError, match=told):
            fit_prices(bad, action="drop")
    for options, told in (
        ({"action": "low_bit"}, "no prices of action 'low_bit'"),
        ({"action": "drop", "predictors": ["colour"]}, "no predictor 'colour'"),
        ({"action": "drop", "quantile": 1.0}, "quantile"),
        ({"action": "drop", "floor": 0.0}, "floor"),
        ({"action": "drop", "test": frame}, "in both frames"),
    ):
        with pytest.raises(StudyError, match=told):
            fit_prices(frame, **options)
    with pytest.raises(StudyError, match="'weight' is not known"):
        fit_prices(frame.assign(weight=np.nan), action="drop")
    with pytest.raises(StudyError, match="at least 3"):
        fit_prices(frame[frame["document"].isin(["0-0", "0-1"])], action="drop")
    with pytest.raises(SchemaError, match="'price'"):
        Prices(frame.assign(price=np.nan), pd.DataFrame(), {})
