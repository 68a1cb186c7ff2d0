"""What `price_misses` found: the frames, their schema, and figures with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import SchemaError, StudyError
from ..quality.intervals import clustered

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from .price_model import PriceModel

PRICE_COLUMNS: Mapping[str, str] = {
    "document": "str", "domain": "str", "position": "int32", "remaining": "int32",
    "layer": "int16", "expert": "int32", "rank": "int16", "weight": "float64",
    "margin": "float64", "depth": "float64", "action": "str", "price": "float64",
    "price_here": "float64", "later_share": "float64",
}  # fmt: skip
"""Columns of `Prices.frame` and their dtypes."""

JOINT_COLUMNS: Mapping[str, str] = {
    "document": "str", "domain": "str", "position": "int32", "action": "str", "kind": "str",
    "misses": "int16", "joint": "float64", "sum": "float64",
}  # fmt: skip
"""Columns of `Prices.joint` and their dtypes."""


class Prices:
    """Prices of forced misses.

    Attributes:
        frame: A row a forced miss and action: `document`, `domain`; `position` (int32: the token's
            place in the text), `remaining` (int32: predictions that the price sums over, this
            token's own and those after it), `layer`, `expert`, `rank` (0 for the highest weight),
            `weight` (gate weight by the family's rule; NaN where the block does not show it),
            `margin` (z_(k) − z_(k+1) of the router), `depth` (layer ÷ number of decoder layers),
            `action`, `price` (nats: KL(full ‖ forced) summed to the window's end), `price_here`
            (the part of this token's own prediction), `later_share` (the rest's share; NaN where
            the price is 0).
        joint: A row a set of misses that were forced together and an action: `kind` ("pair": two
            at one token; "all": all that were sampled at one token; "neighbours": the same layer
            and rank at two tokens in a row), `misses`, `joint` (nats: their price together) and
            `sum` (nats: of their prices one by one, with the same forward passes).
        settings: What was run: texts, prefix, tokens, sample, model and fingerprint.
    """

    def __init__(
        self, frame: pd.DataFrame, joint: pd.DataFrame, settings: Mapping[str, Any]
    ) -> None:
        self.frame = check_prices(frame)
        self.joint = joint
        self.settings = dict(settings)

    @property
    def summary(self) -> pd.DataFrame:
        """A row an action, then by domain within it.

        Columns: `action`, `domain` ("all" first), `misses`, `documents`; `mean`, `low`, `high`
        (nats, 95% interval over documents), `median`, `p90`, `max`; `zero` (share of misses that
        changed nothing); `later_share`, `later_low`, `later_high` (share of the summed price that
        falls on later tokens).
        """
        import pandas as pd

        rows = []
        for action, mine in self.frame.groupby("action", sort=False):
            domains = list(dict.fromkeys(mine["domain"]))
            for domain in ["all", *(domains if len(domains) > 1 else [])]:
                part = mine if domain == "all" else mine[mine["domain"] == domain]
                rows.append({"action": action, "domain": domain, **_figures(part)})
        return pd.DataFrame(rows)

    @property
    def additivity(self) -> pd.DataFrame:
        """How the price of several misses together compares with the sum of their prices.

        A row an action and kind: `action`, `kind`, `sets`, `documents`; `ratio`, `low`, `high`:
        Σ joint ÷ Σ sum with a 95% interval over documents (1: prices add up; below 1: together
        they cost less); `median_ratio`: of single sets.
        """
        import pandas as pd

        rows = []
        for key, part in self.joint.groupby(["action", "kind"], sort=False):
            priced = part[part["sum"] > 0]
            if not len(priced):
                continue
            ratio = priced["joint"] / priced["sum"]
            # Weighed by the sums, the mean of the ratios is the ratio of the sums.
            told = clustered(
                priced.assign(ratio=ratio), "ratio", weights="sum", strata=strata_of(priced)
            ).iloc[0]
            rows.append(
                {
                    "action": key[0], "kind": key[1], "sets": len(priced),
                    "documents": int(told["documents"]), "ratio": told["mean"],
                    "low": told["low"], "high": told["high"],
                    "median_ratio": float(ratio.median()),
                }
            )  # fmt: skip
        columns = ["action", "kind", "sets", "documents", "ratio", "low", "high", "median_ratio"]
        return pd.DataFrame(rows, columns=columns)

    def fit(self, action: str, **options: Any) -> PriceModel:
        """Explains the prices of one action; see `moelab.study.price_model.fit_prices`."""
        from .price_model import fit_prices

        return fit_prices(self.frame, action=action, **options)

    def plot(self, **options: Any) -> Axes:
        """Draws price against gate weight; see `moelab.plots.study.price_by_weight`."""
        from ..plots import study

        axes: Axes = study.price_by_weight(self.frame, **options)
        return axes

    def _facts(self) -> dict[str, str]:
        frame, summary = self.frame, self.summary
        facts = {
            "model": f"{self.settings.get('model', '?')} ({self.settings.get('fingerprint', '?')})",
            "misses": f"{len(frame) // max(frame['action'].nunique(), 1):,} in "
            f"{frame['document'].nunique()} texts, {frame['layer'].nunique()} layers",
            "window": f"{self.settings.get('tokens', '?')} judged tokens after "
            f"{self.settings.get('prefix', '?')} that run exactly",
        }
        for row in summary[summary["domain"] == "all"].itertuples():
            facts[str(row.action)] = (
                f"{row.mean:.3g} nats a miss ({row.low:.2g} to {row.high:.2g}), median "
                f"{row.median:.2g}, 90th percentile {row.p90:.2g}; {row.later_share:.0%} "
                "on later tokens"
            )
        for row in self.additivity.itertuples():
            facts[f"{row.action}, {row.kind}"] = (
                f"together {row.ratio:.2f} times the sum ({row.low:.2f} to {row.high:.2f}, "
                f"{row.sets} sets)"
            )
        return facts

    def __repr__(self) -> str:
        return facts_text("Prices", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Prices", self._facts())


def _figures(part: pd.DataFrame) -> dict[str, Any]:
    told = clustered(part, "price", strata=strata_of(part)).iloc[0]
    price = part["price"].to_numpy()
    figures = {
        "misses": len(part), "documents": int(told["documents"]), "mean": told["mean"],
        "low": told["low"], "high": told["high"], "median": float(np.median(price)),
        "p90": float(np.quantile(price, 0.9)), "max": float(price.max()),
        "zero": float((price == 0).mean()),
    }  # fmt: skip
    later = dict.fromkeys(("later_share", "later_low", "later_high"), float("nan"))
    priced = part[part["price"] > 0]
    if len(priced):
        share = clustered(
            priced, "later_share", weights="price", strata=strata_of(priced), limits=(0, 1)
        ).iloc[0]
        later = dict(zip(later, (share["mean"], share["low"], share["high"]), strict=True))
    return {**figures, **later}


def strata_of(frame: pd.DataFrame) -> str | None:
    """Returns the column that stratifies documents: the domain, if each has at least two.

    One document cannot say how those of its domain differ. Then all documents are one stratum, and
    what domains differ by counts as chance, which errs on the wide side.
    """
    counts = frame[["domain", "document"]].drop_duplicates()["domain"].value_counts()
    return "domain" if counts.min() > 1 else None


def typed(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Returns a frame with exactly these columns, in order, of these dtypes."""
    return frame[list(columns)].astype(dict(columns))


def check_prices(frame: pd.DataFrame, needed: Sequence[str] = tuple(PRICE_COLUMNS)) -> pd.DataFrame:
    """Returns a frame of prices that is one.

    Raises:
        SchemaError: If a column is missing, is not numbers, or has a value that no price has; the
            message names the column.
        StudyError: If there are no rows.
    """
    for name in needed:
        if name not in frame.columns:
            raise SchemaError(
                f"The frame of prices has no column {name!r}. It needs: {', '.join(needed)}."
            )
        if PRICE_COLUMNS[name] != "str" and frame[name].dtype.kind not in "iuf":
            raise SchemaError(f"Column {name!r} must be numbers, got {frame[name].dtype}.")
    if not len(frame):
        raise StudyError("The frame of prices has no rows.")
    price = frame["price"].to_numpy()
    bad = ~np.isfinite(price) | (price < 0)
    if bad.any():
        raise SchemaError(
            f"Column 'price' has {int(bad.sum())} values that no price has (negative, NaN or "
            f"infinite); the first is {price[bad][0]!r}."
        )
    return frame
