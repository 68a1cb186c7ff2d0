"""Is there a capacity below which quality breaks down, or does it only get worse and worse?

A *cliff* is a place where a curve breaks: a kink, a step, or a steep ramp between level grounds,
that no smooth curve has. `shapes` says what smooth is: every falling convex curve whose bend eases
off to the right (straight lines, exp(−x/τ), 1/x, powers), its mirror images, S-shaped falls over
half of the tested range or more, and all their sums. A cliff is claimed only if both hold:

1. *No smooth curve will do.* For each candidate ramp r, what smooth curves cannot explain of it is
   v = r − P_N(r), and ⟨v, f⟩ ≤ 0 for every smooth f. The contrast ⟨v, y⟩ is computed document by
   document, and its mean is tested against 0 with the largest t of all candidates, at 5%. The
   test is at its level for a flat curve and below it for any other smooth one, so its false alarms
   do not depend on having guessed the curve's family.
2. *The break predicts documents that were not looked at.* In a cross-validation over whole
   documents, the smooth curve with the break has the smaller squared error.

Which break: a kink, unless a step predicts left-out documents better by more than twice the
standard error, and one of them unless a ramp does. A ramp hardly wider than the distance of two
tested capacities is a step. What is not seen: a cliff between the two lowest or the two highest
tested capacities (one point apart from the rest is no evidence), and a kink too blunt for the
noise; then the verdict is "no cliff", which means that none was shown.

In simulations (`results/cliff-validation.md`) under 3% of smooth curves of each kind were called a
cliff, and the 90% interval held the place of kinks and steps in about 90%. It holds the upper end
of a ramp less often, since a ramp is often taken for a step: read it as a hint there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..display import facts_html, facts_text
from ..quality.spread import checked_level, freedom, influence
from .curve import Curve, curve_of
from .statements import Within, capacity_within
from .verdict import FALSE_ALARMS, FITS, RESAMPLES, judged

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LEAST_POINTS = 6
"""Distinct x below which nothing is claimed: a smooth curve has too much room between fewer."""
LEAST_DOCUMENTS = 6
"""Documents below which nothing is claimed."""


@dataclass(frozen=True, repr=False)
class Cliff:
    """What a curve shows: see the module's text for what is claimed when."""

    verdict: Literal["cliff", "no cliff"]
    breaks: list[float]
    """Where it breaks, in units of x, ascending: one place, or both ends of a ramp. A step is said
    to be in the middle of the two capacities between which it lies. Empty without a cliff."""
    interval: tuple[float, float]
    """Interval for the break, of two for the upper one, below which quality goes; NaN without a
    cliff."""
    level: float
    """Of the interval."""
    p: float
    """Chance of contrasts as large if the curve is smooth (its worst case, a flat one); NaN if
    nothing was tested."""
    why: str
    """Which fit won by how much, or why nothing is claimed."""
    fits: pd.DataFrame
    """A row a fit: `model` (straight, smooth, kink, step, ramp: the last three are the smooth curve
    with that break), `breaks` (how many), `low_break`, `high_break` (x; NaN if it has none),
    `error` (mean squared error of the mean curve), `error_unseen` (the same in documents that were
    left out), `gain_unseen` (the smooth curve's error_unseen less its own), `gain_se`. Empty if
    nothing was fitted."""
    curve: pd.DataFrame
    """A row an x: x, `mean` over tokens, `low`, `high` (95%, each point by itself), `smooth`,
    `broken` (fitted values; NaN if there are none)."""
    x: str
    y: str
    documents: int
    _within: dict[str, Any] = field(repr=False)

    def capacity_within(self, tolerance: float, **options: Any) -> Within:
        """Finds the smallest capacity within a tolerance; see `statements.capacity_within`.

        The ln ratio of perplexities is `ln_ppl_ratio` where the frame has it. With `ppl` as y it
        is taken from `ppl_reference`, or from the largest x if there is none. Any other y is read
        as nats a token above the full model.

        Args:
            tolerance: Share by which perplexity may rise.
            options: `level`, `resamples`, `seed`.
        """
        frame, y = _log_ratio(self._within["frame"], self.x, self.y, self._within["cluster"])
        names = {k: v for k, v in self._within.items() if k != "frame"}
        return capacity_within(frame, tolerance, y=y, x=self.x, **names, **options)

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draws the curve with the smooth fit, the broken one and the break's interval."""
        from ..plots.cliff import cliff as draw

        return draw(self, ax=ax, **options)

    def _facts(self) -> dict[str, str]:
        facts: dict[str, str] = {"verdict": self.verdict}
        if self.breaks:
            facts["break"] = " and ".join(f"{place:.4g}" for place in self.breaks)
            facts[f"{self.level:.0%} interval"] = "{:.4g} to {:.4g}".format(*self.interval)
        facts["curve"] = (
            f"{self.y} by {self.x}, {len(self.curve)} points, {self.documents} documents"
        )
        facts["why"] = self.why
        return facts

    def __repr__(self) -> str:
        return facts_text("Cliff", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Cliff", self._facts())


def cliff(
    frame: pd.DataFrame,
    x: str = "capacity",
    y: str = "ln_ppl_ratio",
    cluster: str = "prompt",
    *,
    strata: str | None = "domain",
    weights: str | None = "tokens",
    level: float = 0.9,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Cliff:
    """Says whether a curve has a cliff, where, and how sure that is.

    Args:
        frame: One curve: a row an x and document. Several rows of both are seeds, and averaged.
            Documents that lack some x are left out, and `why` says how many.
        x: Column with what was varied.
        y: Column with the quality, falling or rising with x; no NaN.
        cluster: Column that names the document: the unit of all errors.
        strata: Column that names a document's stratum, if the frame has it; None for one.
        weights: Column with the row's judged tokens, if the frame has it; None weighs documents
            alike.
        level: Of the interval for the break.
        resamples: Draws of the largest contrast, and of documents for a step's interval.
        seed: Of the draws and the folds.

    Returns:
        The verdict. With fewer than 6 distinct x, fewer than 6 documents, or one document in
        every stratum it is "no cliff", and `why` says so.

    Raises:
        SchemaError: If a column is missing or is not numbers.
        StudyError: If a value is NaN, the frame is empty, or it has several curves (of two
            actions, policies or splits).
    """
    import pandas as pd

    checked_level(level)
    strata = strata if strata in frame.columns else None
    weights = weights if weights in frame.columns else None
    curve = curve_of(frame, x, y, cluster=cluster, strata=strata, weights=weights)
    points, documents = len(curve.x), len(curve.values)
    left = f" {curve.left_out} documents that lack some {x} are left out." if curve.left_out else ""
    given = {"frame": frame, "cluster": cluster, "strata": strata, "weights": weights}
    nan = np.full(points, np.nan)
    mean = curve.mean if documents else nan
    reach = _reach(curve, 0.95) if documents else nan
    table = pd.DataFrame(
        {
            x: curve.x,
            "mean": mean,
            "low": mean - reach,
            "high": mean + reach,
            "smooth": nan,
            "broken": nan,
        }
    )

    def nothing(why: str, p: float = float("nan"), fits: Any = None) -> Cliff:
        none = pd.DataFrame(columns=list(FITS)) if fits is None else fits
        return Cliff(
            "no cliff", [], (np.nan, np.nan), level, p, why + left, none, table, x, y, documents,
            given,
        )  # fmt: skip

    if points < LEAST_POINTS:
        return nothing(
            f"{points} distinct {x}: nothing is claimed from fewer than {LEAST_POINTS}, since a "
            "smooth curve can do anything between so few."
        )
    if documents < LEAST_DOCUMENTS:
        return nothing(
            f"{documents} documents with every {x}: nothing is claimed from fewer than "
            f"{LEAST_DOCUMENTS}."
        )
    if len(np.unique(curve.strata)) == documents:
        return nothing("Each stratum has one document, so nobody can say how documents differ.")
    found = judged(curve, level, resamples=resamples, seed=seed)
    table = table.assign(smooth=found.smooth, broken=found.broken)
    fits = found.fits
    assert fits is not None
    if found.ramp is None:
        return nothing(
            f"No candidate break is left over when a smooth curve is fitted (p = {found.p:.2g}).",
            found.p, fits,
        )  # fmt: skip
    row = fits.set_index("model").loc[found.model]
    said = (
        f"Against all smooth curves: p = {found.p:.2g} (claimed under {FALSE_ALARMS:g}). In "
        f"documents that were left out, the smooth curve with a {found.model} changes the squared "
        f"error of the smooth one by {-row['gain_unseen']:+.3g} (se {row['gain_se']:.2g}) from "
        f"{row['error_unseen'] + row['gain_unseen']:.3g}."
    )
    if found.verdict == "no cliff":
        return nothing(f"A smooth curve will do. {said}", found.p, fits)
    return Cliff(
        "cliff", found.breaks, found.interval, level, found.p,
        f"No smooth curve will do: a {found.ramp.kind} is left. {said}{left}", fits, table, x, y,
        documents, given,
    )  # fmt: skip


def _reach(curve: Curve, level: float) -> NDArray[np.float64]:
    """Returns how far each point's interval reaches to both sides; NaN where nobody can say."""
    from scipy import stats

    data = curve.contrasts(np.eye(len(curve.x)))
    se = np.sqrt((influence(data) ** 2).sum(0))
    return np.asarray(stats.t.ppf((1 + level) / 2, freedom(data)) * se)


def _log_ratio(frame: pd.DataFrame, x: str, y: str, cluster: str) -> tuple[pd.DataFrame, str]:
    if "ln_ppl_ratio" in frame.columns:
        return frame, "ln_ppl_ratio"
    if y != "ppl":
        return frame, y
    if "ppl_reference" in frame.columns:
        return frame.assign(ln_ppl_ratio=np.log(frame["ppl"] / frame["ppl_reference"])), (
            "ln_ppl_ratio"
        )
    whole = frame[frame[x] == frame[x].max()]
    reference = np.log(whole["ppl"]).groupby(whole[cluster]).mean()
    ratio = np.log(frame["ppl"]) - frame[cluster].map(reference)
    return frame.assign(ln_ppl_ratio=ratio), "ln_ppl_ratio"
