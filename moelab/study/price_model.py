"""What predicts the price of a miss: a regression of its logarithm, judged on other texts.

ln(price) is regressed on the logarithm of the gate weight, the router's margin, depth, rank and
the logarithm of the predictions that the price sums over. Documents are the unit everywhere:
coefficients have jackknife intervals over documents, and figures of fit are out of sample, from
texts that the model has not seen. A predictor is *shown to add* where the interval of its
coefficient excludes 0 and so does that of what it gains out of sample.

A quantile regression (Koenker and Bassett, Econometrica 46, 1978) of the same is there as an
alternative that a few huge prices cannot lead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..display import facts_html, facts_text
from ..errors import StudyError
from ..quality.intervals import clustered
from ..quality.resampling import resampled
from .price_results import check_prices, strata_of
from .regression import FOLDS, interval, left_out, losses_of, solver_of

if TYPE_CHECKING:
    import pandas as pd

    Array = NDArray[np.float64]

FLOOR = 1e-9
"""Nats; prices below it, those of exactly 0 too, count as this much, since ln 0 is not to be had
and what is under it is rounding of the logits."""

PREDICTORS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "ln weight": ("weight", np.log),
    "margin": ("margin", np.asarray),
    "depth": ("depth", np.asarray),
    "(depth − ½)²": ("depth", lambda depth: (depth - 0.5) ** 2),
    "rank": ("rank", np.asarray),
    "ln remaining": ("remaining", np.log),
}
"""Predictors by name: the column that each is made from, and how."""

DEFAULT = ("ln weight", "margin", "depth", "(depth − ½)²", "rank", "ln remaining")
"""What is known of every forced miss before it happens. The second term in depth is for layers at
both ends that cost more, or less, than those between."""


@dataclass(frozen=True, eq=False, repr=False)
class PriceModel:
    """A regression of ln(price) for one miss action.

    Attributes:
        action: The action.
        quantile: None for the mean of ln(price); else which quantile of it.
        coefficients: A row a term: `term`, `value`, `low`, `high` (95% over documents), `gain`,
            `gain_low`, `gain_high` (what the term adds to the share of explained loss on unseen
            texts; NaN for the intercept) and `adds` (both intervals exclude 0, and it is a gain).
        exponent: Value, low and high of the gate weight's exponent, the other predictors held
            fixed; NaN without `ln weight`.
        exponent_alone: The same with the gate weight as the only predictor.
        explained: Share of the loss on unseen texts that the model explains, with its interval:
            R² for the mean, for a quantile the same of the absolute deviations that it minimises.
        spearman: Rank correlation of predicted and true price on unseen texts, with its interval.
        floored: Share of the prices that were below the floor.
        settings: Floor, rows, documents, and what the model was judged on.
    """

    action: str
    quantile: float | None
    coefficients: pd.DataFrame
    exponent: tuple[float, float, float]
    exponent_alone: tuple[float, float, float]
    explained: tuple[float, float, float]
    spearman: tuple[float, float, float]
    floored: float
    settings: Mapping[str, Any]
    _beta: NDArray[np.float64]
    _terms: tuple[str, ...]
    _domains: tuple[str, ...]
    _smear: float

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Returns ln(price) that the model expects for each row, (rows,), float64, ln nats.

        Args:
            frame: Rows with the columns that the predictors are made from.
        """
        return np.asarray(_design(frame, self._terms, self._domains) @ self._beta)

    def expected(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Returns the expected price of each row, (rows,), float64, nats.

        exp of the prediction times the mean of exp of the residuals that the fit left (Duan's
        smearing estimate, JASA 78, 1983), since the mean of a price is not exp of its mean
        logarithm. For a quantile, exp of the prediction: that quantile of the price.
        """
        return np.asarray(np.exp(self.predict(frame)) * self._smear)

    @property
    def added(self) -> list[str]:
        """The predictors that are shown to add."""
        return self.coefficients.loc[self.coefficients["adds"], "term"].tolist()

    @property
    def statement(self) -> str:
        """What the fit says, in words, with its figures."""
        added = ", ".join(self.added) or "none of the predictors"
        measure = "R²" if self.quantile is None else "explained absolute deviation"
        return (
            f"Under {self.action!r}, {added} {'is' if len(self.added) < 2 else 'are'} shown to "
            f"predict the price. On unseen texts: {measure} {_told(self.explained)}, rank "
            f"correlation {_told(self.spearman)}. The price goes with the gate weight to the power "
            f"{_told(self.exponent)} (others held fixed), {_told(self.exponent_alone)} by itself."
        )

    def _facts(self) -> dict[str, str]:
        what = "mean of ln(price)" if self.quantile is None else f"{self.quantile:g} quantile"
        facts = {
            "action": f"{self.action}, {what}",
            "fitted to": f"{self.settings['misses']:,} misses in {self.settings['documents']} "
            f"texts; {self.floored:.1%} of the prices below the floor of "
            f"{self.settings['floor']:g} nats",
            "judged on": str(self.settings["judged_on"]),
            "explained": _told(self.explained),
            "Spearman ρ": _told(self.spearman),
            "weight's exponent": f"{_told(self.exponent)}; alone {_told(self.exponent_alone)}",
        }
        for row in self.coefficients.itertuples():
            facts[str(row.term)] = f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})" + (
                ""
                if np.isnan(row.gain)
                else f", gains {row.gain:.4f} ({row.gain_low:.4f} to {row.gain_high:.4f})"
                + (", shown to add" if row.adds else "")
            )
        return facts

    def __repr__(self) -> str:
        return facts_text("PriceModel", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("PriceModel", self._facts())


def fit_prices(
    frame: pd.DataFrame,
    *,
    action: str,
    test: pd.DataFrame | None = None,
    predictors: Sequence[str] = DEFAULT,
    domain: bool = False,
    quantile: float | None = None,
    floor: float = FLOOR,
    resamples: int = 2000,
    seed: int = 0,
) -> PriceModel:
    """Fits ln(price) to what is known before the miss, and judges it on other texts.

    Args:
        frame: Prices to learn from; see `Prices.frame`.
        action: Which action's.
        test: Prices of other texts to judge on, such as another split's. None leaves a tenth of
            the documents out in turn.
        predictors: Names of `PREDICTORS`.
        domain: Also a level for each domain.
        quantile: Regress this quantile of ln(price), 0 to 1 exclusive; None regresses its mean.
        floor: Nats; lower prices count as this.
        resamples: Draws of documents for the intervals of fit.
        seed: Of the draws and of which documents are left out together.

    Raises:
        SchemaError: If a column is missing or has values that no price has.
        StudyError: If the action has no rows, there are too few documents, a text is in both
            frames, or a predictor is not known for every row.
    """
    train, terms, domains = _prepared(frame, action, predictors, domain, floor)
    _check_options(quantile, floor)
    x, y = _design(train, terms, domains), _log(train, floor)
    documents = _documents(train)
    strata = _strata(train, documents)
    solve = solver_of(quantile)
    beta = solve(x, y, np.ones(len(y)))
    low, high = interval(x, y, beta, documents, strata, quantile, seed)
    if test is None:
        judged, told = train, f"the same texts, a {FOLDS}th left out in turn"
    else:
        judged, _, _ = _prepared(test, action, predictors, domain, floor, domains)
        shared = set(judged["document"]) & set(train["document"])
        if shared:
            raise StudyError(
                f"{len(shared)} texts are in both frames, such as {sorted(shared)[0]!r}, and a "
                "model is judged on texts that it has not seen."
            )
        told = f"{judged['document'].nunique()} other texts, {len(judged):,} misses"
    truth = _log(judged, floor)

    def predictions(columns: Sequence[int]) -> Array:
        if test is None:
            return left_out(x[:, columns], y, documents, solve, seed)
        return _design(judged, terms, domains)[:, columns] @ solve(
            x[:, columns], y, np.ones(len(y))
        )

    every = list(range(x.shape[1]))
    full, constant = predictions(every), predictions([0])
    loss = losses_of(quantile)
    base = loss(truth - constant)
    explained = _ratio(judged, base - loss(truth - full), base)
    rows = []
    for place, name in enumerate(("intercept", *terms, *(f"domain {d}" for d in domains[1:]))):
        gain = (float("nan"),) * 3
        if 0 < place <= len(terms):
            without = predictions([c for c in every if c != place])
            gain = _ratio(judged, loss(truth - without) - loss(truth - full), base)
        adds = (low[place] > 0 or high[place] < 0) and gain[1] > 0
        rows.append((name, beta[place], low[place], high[place], *gain, bool(adds)))
    import pandas as pd

    names = ["term", "value", "low", "high", "gain", "gain_low", "gain_high", "adds"]
    alone, exponent = (float("nan"),) * 3, (float("nan"),) * 3
    if "ln weight" in terms:
        at = 1 + terms.index("ln weight")
        exponent = (beta[at], low[at], high[at])
        one = x[:, [0, at]]
        b = solve(one, y, np.ones(len(y)))
        ends = interval(one, y, b, documents, strata, quantile, seed)
        alone = (b[1], ends[0][1], ends[1][1])
    smear = 1.0 if quantile is not None else float(np.exp(y - x @ beta).mean())
    return PriceModel(
        action, quantile, pd.DataFrame(rows, columns=names), exponent, alone, explained,
        _spearman(judged, truth, full, resamples, seed),
        float((train["price"] < floor).mean()),
        {"floor": floor, "misses": len(train), "documents": len(np.unique(documents)),
         "judged_on": told, "seed": seed, "predictors": list(terms), "domain": domain},
        beta, tuple(terms), tuple(domains), smear,
    )  # fmt: skip


# -- the data ------------------------------------------------------------------------------


def _prepared(
    frame: pd.DataFrame,
    action: str,
    predictors: Sequence[str],
    domain: bool,
    floor: float,
    domains: Sequence[str] = (),
) -> tuple[pd.DataFrame, list[str], list[str]]:
    terms = list(dict.fromkeys(predictors))
    unknown = [name for name in terms if name not in PREDICTORS]
    if unknown:
        raise StudyError(
            f"There is no predictor {unknown[0]!r}. Known: {', '.join(map(repr, PREDICTORS))}."
        )
    columns = list(dict.fromkeys(PREDICTORS[name][0] for name in terms))
    check_prices(frame, ["document", "domain", "action", "price", *columns])
    mine = frame[frame["action"] == action]
    if not len(mine):
        raise StudyError(
            f"There are no prices of action {action!r}; there are "
            f"{', '.join(map(repr, frame['action'].unique()))}."
        )
    for name in columns:
        values = mine[name].to_numpy(np.float64)
        if not np.isfinite(values).all() or (name in ("weight", "remaining") and values.min() <= 0):
            raise StudyError(
                f"Column {name!r} is not known for every miss (NaN, infinite, or a weight of 0): "
                "the family does not show it. Leave out the predictors that are made from it."
            )
    count = mine["document"].nunique()
    if not domains and count < 3:
        raise StudyError(f"Prices of {count} texts cannot say how texts differ: take at least 3.")
    found = list(domains) or (sorted(mine["domain"].unique()) if domain else [""])
    if domain and (other := set(mine["domain"]) - set(found)):
        raise StudyError(f"Domain {sorted(other)[0]!r} is not among those learned from: {found}.")
    return mine.reset_index(drop=True), terms, found


def _check_options(quantile: float | None, floor: float) -> None:
    if quantile is not None and not 0 < quantile < 1:
        raise StudyError(f"quantile must be between 0 and 1, exclusive, got {quantile!r}.")
    if not floor > 0:
        raise StudyError(f"floor is an amount of nats above 0, got {floor!r}.")


def _design(frame: pd.DataFrame, terms: Sequence[str], domains: Sequence[str]) -> Array:
    columns = [np.ones(len(frame))]
    for name in terms:
        column, function = PREDICTORS[name]
        columns.append(np.asarray(function(frame[column].to_numpy(np.float64)), np.float64))
    columns += [(frame["domain"] == d).to_numpy(np.float64) for d in domains[1:]]
    return np.stack(columns, 1)


def _log(frame: pd.DataFrame, floor: float) -> Array:
    return np.asarray(np.log(np.maximum(frame["price"].to_numpy(np.float64), floor)))


def _documents(frame: pd.DataFrame) -> NDArray[np.int64]:
    import pandas as pd

    return np.asarray(pd.factorize(frame["document"])[0], np.int64)


# -- how well it does ----------------------------------------------------------------------


def _ratio(frame: pd.DataFrame, above: Array, below: Array) -> tuple[float, float, float]:
    """Returns Σ above ÷ Σ below with a 95% interval over documents."""
    if not below.sum() > 0:
        return (float("nan"),) * 3
    least = below[below > 0].min()
    told = clustered(
        frame.assign(_value=above / np.maximum(below, least), _weight=np.maximum(below, least)),
        "_value",
        weights="_weight",
        strata=strata_of(frame),
    ).iloc[0]
    return float(told["mean"]), float(told["low"]), float(told["high"])


def _spearman(
    frame: pd.DataFrame, truth: Array, predicted: Array, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Returns the rank correlation, and the ends of its interval from resampled documents.

    Ranks are those among all rows; the draws weigh rows and do not rank anew.
    """
    from scipy import stats

    a, b = (stats.rankdata(v) for v in (truth, predicted))
    documents = _documents(frame)
    weights = np.vstack(
        [
            np.ones((1, documents.max() + 1)),
            resampled(_strata(frame, documents), resamples=resamples, seed=seed),
        ]
    )
    columns = np.stack([np.ones(len(a)), a, b, a * a, b * b, a * b], 1)
    sums = np.zeros((documents.max() + 1, 6))
    np.add.at(sums, documents, columns)
    n, sa, sb, saa, sbb, sab = (weights @ sums).T
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (saa / n - (sa / n) ** 2) * (sbb / n - (sb / n) ** 2)
        rho = (sab / n - sa * sb / n**2) / np.sqrt(np.maximum(spread, 0))
    low, high = np.nanquantile(rho[1:], [0.025, 0.975])
    return float(rho[0]), float(low), float(high)


def _strata(frame: pd.DataFrame, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    import pandas as pd

    first = np.unique(documents, return_index=True)[1]
    if strata_of(frame) is None:
        return np.zeros(len(first), np.int64)
    return np.asarray(pd.factorize(frame["domain"].iloc[first])[0], np.int64)


def _told(figure: tuple[float, float, float]) -> str:
    return f"{figure[0]:.2f} ({figure[1]:.2f} to {figure[2]:.2f})"
