"""What a sweep lets one say: the smallest capacity within a tolerance, and the set of the best.

Many points are compared, so bounds are simultaneous: they hold for all points at once. And they are
honest only for texts that nothing was chosen on: pins, spreads and prices are learned on the
calibration split, policies and actions chosen on the selection split, figures reported on the
test split (`check_split`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..display import facts_html, facts_text
from ..errors import SchemaError, StudyError
from ..quality.clusters import Clusters, clusters_of, names_of, require_columns
from ..quality.intervals import simultaneous
from ..quality.resampling import RESAMPLES, largest
from ..quality.spread import freedom, influence
from .curve import refuse_several

if TYPE_CHECKING:
    import pandas as pd

TOLERANCES = (0.01, 0.05, 0.2)
"""Shares by which perplexity may rise."""

LEARN, CHOOSE, REPORT = "calibration", "selection", "test"
"""What each split of the texts is for."""


@dataclass(frozen=True)
class Within:
    """The smallest tested capacity at which perplexity rises by less than a tolerance."""

    tolerance: float
    """Share by which perplexity may rise."""
    capacity: float | None
    """The smallest whose upper bound is under the tolerance, as those of all larger ones are; None
    if there is none."""
    bound: float
    """Upper bound of the ln ratio there, nats a token; NaN if there is none."""
    level: float
    """Chance that the bounds of all points hold."""
    points: int
    """Points that were compared."""
    documents: int
    split: str
    """Split of the texts; empty if the frame does not say."""
    frame: pd.DataFrame
    """A row a capacity, from the largest on: x, `mean`, `se`, `high` (upper bound), `passes`."""
    x: str = "capacity"

    @property
    def why(self) -> str:
        """The statement in words."""
        bounds = f"simultaneous {self.level:.0%} bounds over {self.points} points"
        texts = f"{self.documents} documents{label_split(self.split)}"
        if self.capacity is None:
            top = self.frame.iloc[0]
            if np.isnan(top["high"]):
                return (
                    f"No {self.x} can be named: each stratum has one document, so there is no "
                    "bound."
                )
            return (
                f"No tested {self.x} keeps perplexity within {self.tolerance:+.0%} at it and at "
                f"all larger ones: at the largest, {top[self.x]:g}, the upper bound is "
                f"{np.expm1(top['high']):+.2%} ({bounds}, {texts})."
            )
        return (
            f"{self.x} {self.capacity:g}: perplexity rises by at most "
            f"{np.expm1(self.bound):.2%}, under {self.tolerance:.0%} ({bounds}, {texts})."
        )

    def _facts(self) -> dict[str, str]:
        return {"tolerance": f"{self.tolerance:.0%}", "statement": self.why}

    def __repr__(self) -> str:
        return facts_text("Within", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Within", self._facts())


def capacity_within(
    frame: pd.DataFrame,
    tolerance: float,
    *,
    y: str = "ln_ppl_ratio",
    x: str = "capacity",
    cluster: str = "prompt",
    strata: str | None = "domain",
    weights: str | None = "tokens",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Within:
    """Finds the smallest capacity whose quality is within a tolerance. The primary statement.

    Args:
        frame: One curve of a sweep: a row a capacity and document.
        tolerance: Share by which perplexity may rise: .01, .05, .2.
        y: Column with the ln ratio of perplexities, nats a token.
        x: Column with the capacity.
        cluster: Column that names the document.
        strata: Column that names its stratum; None for one.
        weights: Column with the row's judged tokens; None weighs rows alike.
        level: Chance that the upper bounds of all points hold.
        resamples: Draws for the simultaneous bounds.
        seed: Of the draws.

    Raises:
        SchemaError: If a column is missing or is not numbers.
        StudyError: If the frame has several curves, one point, other documents at some points, or
            NaN; or the tolerance is not above 0.
    """
    refuse_several(frame, [x])
    found = _within(
        frame, [tolerance], [], y=y, x=x, cluster=cluster, strata=strata, weights=weights,
        level=level, resamples=resamples, seed=seed,
    )  # fmt: skip
    return found[0][1]


def capacities_within(
    frame: pd.DataFrame,
    tolerances: Sequence[float] = TOLERANCES,
    by: str | Sequence[str] = ("on_miss",),
    *,
    y: str = "ln_ppl_ratio",
    x: str = "capacity",
    cluster: str = "prompt",
    strata: str | None = "domain",
    weights: str | None = "tokens",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """As `capacity_within` for several curves and tolerances; the bounds hold for all of them.

    Returns:
        A row a curve and tolerance: `by`, `tolerance`, x (float64, NaN where none will do),
        `bound` (nats a token), `rise` (exp(bound) − 1), `points` (compared in all), `documents`,
        `level`, `split`.
    """
    import pandas as pd

    columns = names_of(by)
    require_columns(frame, columns)
    refuse_several(frame, [x, *columns])
    found = _within(
        frame, tolerances, columns, y=y, x=x, cluster=cluster, strata=strata, weights=weights,
        level=level, resamples=resamples, seed=seed,
    )  # fmt: skip
    rows = [
        {
            **dict(zip(columns, key, strict=True)),
            "tolerance": one.tolerance,
            x: np.nan if one.capacity is None else one.capacity,
            "bound": one.bound,
            "rise": float(np.expm1(one.bound)),
            "points": one.points,
            "documents": one.documents,
            "level": one.level,
            "split": one.split,
        }
        for key, one in found
    ]
    return pd.DataFrame(rows)


def best_set(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    y: str = "kl_mean",
    *,
    best: str = "low",
    cluster: str = "prompt",
    strata: str | None = "domain",
    weights: str | None = "tokens",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Finds the settings that cannot be told apart from the best one.

    All pairs of settings are compared on the same documents, with one critical value for the
    largest t of all pairs. A setting is out if some other one is better beyond doubt; with chance
    `level` the truly best one is in.

    Args:
        frame: A row a setting and document.
        by: Columns that tell settings apart.
        y: The column to compare.
        best: "low" or "high".
        cluster: Column that names the document.
        strata: Column that names its stratum; None for one.
        weights: Column with the row's judged tokens; None weighs rows alike.
        level: Chance that all comparisons hold.
        resamples: Draws for the critical value.
        seed: Of the draws.

    Returns:
        A row a setting, the best first: `by`, `mean`, `behind` (distance to the best mean, from 0
        on), `behind_low`, `behind_high` (simultaneous bounds of the distance to the truly best),
        `best` (bool: in the set), `tokens`, `documents`, `level`, `split`. Without an interval
        (each stratum has one document) all settings are in.

    Raises:
        SchemaError: If a column is missing or is not numbers.
        StudyError: If there is one setting only, or settings have other documents.
    """
    import pandas as pd

    if best not in ("low", "high"):
        raise StudyError(f"best must be 'low' or 'high', got {best!r}.")
    columns = names_of(by)
    require_columns(frame, columns)
    refuse_several(frame, columns)
    data = clusters_of(frame, y, columns, cluster=cluster, strata=strata, weights=weights)
    _same_documents(data, columns)
    count = len(data.keys)
    if count < 2:
        raise StudyError(f"There is one setting of {', '.join(columns)}: nothing to choose from.")
    sign = 1.0 if best == "low" else -1.0
    moves, df, means = influence(data) * sign, freedom(data), data.means * sign
    left, right = np.triu_indices(count, 1)
    factor = largest(
        moves[:, left] - moves[:, right], df[left], level, resamples=resamples, seed=seed
    )
    reach = np.zeros((count, count))
    spread = np.sqrt(((moves[:, left] - moves[:, right]) ** 2).sum(0))
    reach[left, right] = reach[right, left] = factor * spread
    gap = means[:, None] - means[None]
    low, high = (gap - reach).max(1), (gap + reach).max(1)
    named = {name: [key[place] for key in data.keys] for place, name in enumerate(columns)}
    tokens = data.sizes.sum(0)
    return (
        pd.DataFrame(
            {
                **named,
                "mean": data.means,
                "behind": means - means.min(),
                "behind_low": np.maximum(low, 0),
                "behind_high": np.maximum(high, 0),
                "best": ~(low > 0),
                "tokens": tokens,
                "documents": data.documents,
                "level": level,
                "split": _split(frame),
            }
        )
        .sort_values("behind", kind="stable")
        .reset_index(drop=True)
    )


def check_split(frame: pd.DataFrame, allowed: str | Sequence[str], what: str) -> None:
    """Refuses texts of another split than something is for.

    Args:
        frame: With a column `split`.
        allowed: One or more of "calibration" (to learn pins, spreads and prices), "selection" (to
            choose policies and actions), "test" (to report).
        what: What is done with it, for the error: "Pins are learned".

    Raises:
        SchemaError: If the frame has no column `split`.
        StudyError: If it has rows of another one.
    """
    if "split" not in frame.columns:
        raise SchemaError("The frame has no column 'split', so nobody can say what it may be for.")
    names = [allowed] if isinstance(allowed, str) else list(allowed)
    others = sorted({str(name) for name in frame["split"].unique()} - set(names))
    if others:
        raise StudyError(
            f"{what} on the split {' or '.join(names)}, and the frame has rows of "
            f"{', '.join(others)}. Figures on texts that something was fitted to flatter it."
        )


def label_split(split: str) -> str:
    """Returns what a figure must say of its texts: nothing on the test split."""
    return "" if split in ("", REPORT) else f" of the {split} split, not of {REPORT}"


def _split(frame: pd.DataFrame) -> str:
    if "split" not in frame.columns:
        return ""
    return ", ".join(sorted({str(name) for name in frame["split"].unique()}))


def _within(
    frame: pd.DataFrame,
    tolerances: Sequence[float],
    columns: list[str],
    *,
    y: str,
    x: str,
    cluster: str,
    strata: str | None,
    weights: str | None,
    level: float,
    resamples: int,
    seed: int,
) -> list[tuple[tuple[object, ...], Within]]:
    for tolerance in tolerances:
        if not 0 < tolerance < np.inf:
            raise StudyError(
                f"A tolerance is a share above 0, such as .05 for 5%, got {tolerance!r}."
            )
    data = clusters_of(
        frame, y, [*columns, x], cluster=cluster, strata=strata, weights=weights
    )  # fmt: skip
    _same_documents(data, [*columns, x])
    table = simultaneous(
        frame, y, [*columns, x], cluster=cluster, strata=strata, weights=weights, level=level,
        sides=1, resamples=resamples, seed=seed,
    ).drop(columns="low")  # fmt: skip
    curves = (
        list(table.groupby(columns, sort=False, observed=True, dropna=False))
        if columns
        else [((), table)]
    )
    out: list[tuple[tuple[object, ...], Within]] = []
    for key, curve in curves:
        if len(curve) < 2:
            raise StudyError(
                f"There is one {x} only, {curve[x].iloc[0]:g}: a smallest one needs at least two. "
                "Sweep more, or read the interval of that point."
            )
        falling = curve.sort_values(x, ascending=False).reset_index(drop=True)
        for tolerance in tolerances:
            passes = (falling["high"] < np.log1p(tolerance)).cummin()
            rows = falling.assign(passes=passes)
            good = rows[rows["passes"]]
            out.append(
                (
                    key,
                    Within(
                        tolerance=float(tolerance),
                        capacity=good[x].iloc[-1].item() if len(good) else None,
                        bound=float(good["high"].iloc[-1]) if len(good) else float("nan"),
                        level=level,
                        points=len(table),
                        documents=int(falling["documents"].iloc[0]),
                        split=_split(frame),
                        frame=rows,
                        x=x,
                    ),
                )
            )
    return out


def _same_documents(data: Clusters, columns: list[str]) -> None:
    """Raises if some points have other documents: their difference would be one of texts."""
    first = data.sizes[:, 0]
    for key, sizes in zip(data.keys, data.sizes.T, strict=True):
        if not np.array_equal(sizes > 0, first > 0):
            raise StudyError(
                f"The point {', '.join(f'{n}={k}' for n, k in zip(columns, key, strict=True))} has "
                f"{int((sizes > 0).sum())} documents that are not the {int((first > 0).sum())} of "
                "the first point. Keep the documents that all points have."
            )
