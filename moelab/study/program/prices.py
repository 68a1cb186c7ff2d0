"""What a miss costs and what foretells it; whether a bank should go by that."""

from __future__ import annotations

from typing import Any

from ...quality.intervals import paired
from ..price_policy import compare_policies, price_by_expert
from ..prices import ACTIONS, price_misses
from .notes import PARTS, Notes
from .plan import texts_for
from .routing import recorded

PRICE = "What does a miss cost, and what foretells it?"
POLICY = "Should a lossy bank evict by price?"


def what_a_miss_costs(notes: Notes) -> None:
    """Prices single misses on calibration texts, and judges what foretells them on test texts."""
    import pandas as pd

    from ...plots import study as plots

    lab, scale = notes.lab, notes.scale
    # A price does not depend on the capacity, only the time does.
    before = list(lab.capacities)
    lab.resize(1.0)
    told: dict[str, Any] = {
        "prefix": scale.prefix, "tokens": scale.tokens, "misses": scale.misses,
        "positions": min(4, scale.tokens // 2),
    }  # fmt: skip
    try:
        learnt = price_misses(lab, texts_for(lab, scale, "calibration"), **told)
        judged = price_misses(lab, texts_for(lab, scale, "test"), seed=1, **told)
    finally:
        layers = [site.layer for site in lab.sites]
        lab.resize(dict(zip(layers, before, strict=True)))
    summary = notes.frame("prices", judged.summary)
    additivity = notes.frame("additivity", judged.additivity)
    coefficients = []
    for action in ACTIONS:
        row = summary[summary["action"].eq(action) & summary["domain"].eq("all")].iloc[0]
        notes.found(
            PRICE, f"One miss under `{action}` costs {row['mean']:.4f} [{row['low']:.4f}, "
            f"{row['high']:.4f}] nats on average (median {row['median']:.4f}, 90th percentile "
            f"{row['p90']:.4f}) summed to the window's end; {row['later_share']:.0%} "
            f"[{row['later_low']:.0%}, {row['later_high']:.0%}] of it falls on later tokens.",
            "prices.csv",
        )  # fmt: skip
        model = learnt.fit(action, test=judged.frame)
        notes.found(PRICE, model.statement, "price-model.csv", f"price-{action}.png")
        middle = learnt.fit(action, test=judged.frame, quantile=0.5)
        top = learnt.fit(action, test=judged.frame, quantile=0.9)
        notes.found(
            PRICE, f"`{action}`: the median price goes with the gate weight to the power "
            f"{_span(middle.exponent)}, the 90th percentile {_span(top.exponent)} (other "
            "predictors held fixed).", "price-model.csv",
        )  # fmt: skip
        for kind, fit in (("mean", model), ("median", middle), ("90th percentile", top)):
            coefficients.append(fit.coefficients.assign(action=action, of=kind))
        value, low, high = model.exponent
        notes.lesson(
            f"exponent-{action}", f"the price of `{action}` rises with the gate weight",
            {"mean": value, "low": low, "high": high}, "power",
        )  # fmt: skip
        notes.lesson(
            f"convex-{action}", f"it rises faster than in proportion (`{action}`)",
            {"mean": value - 1, "low": low - 1, "high": high - 1}, "power − 1",
        )  # fmt: skip
        notes.lesson(
            f"later-{action}", f"part of the price of `{action}` falls on later tokens",
            {"mean": row["later_share"], "low": row["later_low"], "high": row["later_high"]},
            "share of the price",
        )  # fmt: skip
        mine = judged.frame[judged.frame["action"].eq(action)]
        notes.chart(f"price-{action}", plots.price_by_weight(mine, model, note=notes.note))
    every = judged.frame
    for more, less in (("drop", "substitute"), ("substitute", "low_bit")):
        row = paired(every, "price", "action", (more, less)).iloc[0]
        notes.lesson(
            f"price-{more}-{less}", f"a miss costs more under `{more}` than under `{less}`", row,
            "nats a miss",
        )  # fmt: skip
    for row in additivity[additivity["kind"].eq("all")].itertuples():
        notes.found(
            PRICE, f"Misses of one token together cost {row.ratio:.2f} [{row.low:.2f}, "
            f"{row.high:.2f}] times the sum of their prices under `{row.action}` "
            f"({row.sets} sets).", "additivity.csv",
        )  # fmt: skip
        notes.lesson(
            f"additivity-{row.action}", f"misses of one token together cost less than their sum "
            f"(`{row.action}`)",
            {"mean": 1 - row.ratio, "low": 1 - row.high, "high": 1 - row.low}, "1 − ratio",
        )  # fmt: skip
    notes.frame("price-model", pd.concat(coefficients, ignore_index=True))
    _policy(notes, learnt)


def _policy(notes: Notes, learnt: Any) -> None:
    lab, scale = notes.lab, notes.scale
    calibration = recorded(notes, "calibration").recording
    experts = {site.layer: site.experts for site in lab.sites}
    tables = {
        action: price_by_expert(learnt, calibration, action, experts=experts)
        for action in ("drop", "substitute")
    }
    found = compare_policies(
        lab, tables, [scale.half], selection=texts_for(lab, scale, "selection"),
        test=texts_for(lab, scale, "test"), out=notes.out / PARTS / "price-policy",
        prefix=scale.prefix, tokens=scale.tokens,
    )  # fmt: skip
    notes.frame("price-policy", found.summary)
    notes.found(POLICY, found.statement, "price-policy.csv")
    for row in found.summary.itertuples():
        notes.lesson(
            f"policy-{row.on_miss}-{row.baseline}",
            f"under `{row.on_miss}`, evicting by expected price hurts less than by "
            f"{str(row.baseline).upper()}",
            {"mean": row.gain, "low": row.low, "high": row.high}, "nats of KL a token",
        )  # fmt: skip


def _span(figure: tuple[float, float, float]) -> str:
    value, low, high = figure
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
