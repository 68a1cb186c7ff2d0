"""`Comparison`: what `moelab.compare` found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..display import facts_html, facts_text
from ..errors import StudyError
from .arms import mean_by_arm, shares
from .summary import ALL, by_domain_and_all, summarise

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BUCKET = 8
"""Judged tokens a bucket of positions."""


@dataclass(frozen=True)
class Comparison:
    """A constrained model judged against the full one, token by token."""

    tokens: pd.DataFrame
    """A row a judged token: `document`, `domain`, `position`, `phase`, `token_id`, `logprob`,
    `logprob_reference`, `kl`, `same_top1`, `entropy`, `entropy_reference`; see
    `moelab.quality.judge.judge`."""
    settings: dict[str, Any]
    """What was run; enough to run it again."""
    routing_agreement: pd.DataFrame | None
    """A row a layer: `layer`, `agreement` (share of a token's experts in the full run that the
    constrained run's router chose too), `low`, `high`, `se`, `chance` (k/E), `tokens`,
    `documents`. None where the reference is another model."""
    arms: pd.DataFrame | None = None
    """A row a judged token and arm; see `moelab.quality.arms`. None unless asked for."""
    level: float = 0.95
    """Of the intervals."""

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row a domain, then `domain="all"`; columns as `moelab.quality.summary.summarise`."""
        return by_domain_and_all(self.tokens, level=self.level)

    @cached_property
    def shares(self) -> pd.DataFrame:
        """Shares of the damage, by domain and for all; see `moelab.quality.arms.shares`.

        Raises:
            StudyError: If the arms were not run.
        """
        return shares(self._needed_arms(), level=self.level)

    def mean_by_arm(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Gives each arm's mean KL with its interval: `by`, `arm`, `mean`, `low`, `high`, ….

        Raises:
            StudyError: If the arms were not run.
        """
        return mean_by_arm(self._needed_arms(), by, level=self.level)

    def by(self, *columns: str) -> pd.DataFrame:
        """Gives the figures of groups of tokens.

        Args:
            *columns: Columns of `tokens` that group, such as "domain", "phase" or "document".
        """
        return summarise(self.tokens, columns, level=self.level)

    def by_position(self, bucket: int = BUCKET) -> pd.DataFrame:
        """Gives the figures by how far after the prefix a token is.

        Args:
            bucket: Judged tokens a bucket.

        Returns:
            A row a bucket: `after` (int64), tokens from the first judged one to the bucket's
            first; then as `summary`.

        Raises:
            StudyError: If the bucket is no positive int.
        """
        if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
            raise StudyError(f"bucket is a number of tokens, an int from 1 on, got {bucket!r}.")
        place = self.tokens["position"].astype("int64") - (self.settings["prefix"] + 1)
        after = (place // bucket) * bucket
        frame = summarise(self.tokens.assign(after=after), "after", level=self.level)
        return frame.sort_values("after", ignore_index=True)

    @property
    def plot(self) -> ComparisonPlots:
        """Charts of this comparison."""
        return ComparisonPlots(self)

    def _needed_arms(self) -> pd.DataFrame:
        if self.arms is None:
            raise StudyError("The arms were not run. Compare with arms=True.")
        return self.arms

    def _facts(self) -> dict[str, str]:
        row = self.summary[self.summary["domain"] == ALL].iloc[0]
        said = self.settings
        ends = f"{self.level:.0%}"
        capacity = said["capacity"]
        passes = "one at a time" if said["chunk"] is None else f"in chunks of {said['chunk']}"
        domains = self.tokens["domain"].nunique()
        facts = {
            "model": f"{said['model']}, {capacity} of {max(said['experts'])} experts a layer",
            "reference": said["reference"],
            "on a miss": "load (exact)"
            if said["on_miss"] == "load"
            else f"{said['on_miss']}, at most {_budget(said)} in after a step",
            "judged": f"{row['tokens']} tokens of {row['documents']} documents"
            + (f" in {domains} domains" if domains > 1 else "")
            + f", {passes}, after a prefix of {said['prefix']} that ran exactly",
            "KL": f"mean {_span(row, 'kl_mean', ends)}, median {row['kl_median']:.3g}, "
            f"99% {row['kl_p99']:.3g}, most {row['kl_max']:.3g} nats",
            "perplexity": f"{row['ppl']:.4g}, the reference's {row['ppl_reference']:.4g}; "
            f"ln ratio {_span(row, 'ln_ppl_ratio', ends)}",
            "same likeliest token": _span(row, "same_top1", ends),
        }
        if self.arms is not None:
            damage = self.shares[self.shares["domain"] == ALL].set_index("share")
            for share, what in (("rerouting", "by re-routing"), ("inherited", "inherited")):
                facts[f"damage {what}"] = (
                    f"{damage.loc[share, 'mean']:.0%} ({ends}: {damage.loc[share, 'low']:.0%} to "
                    f"{damage.loc[share, 'high']:.0%})"
                )
        return facts

    def __repr__(self) -> str:
        return facts_text("Comparison", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Comparison", self._facts())


@dataclass(frozen=True)
class ComparisonPlots:
    """Charts of a comparison; each returns matplotlib Axes."""

    of: Comparison

    def kl(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draws KL by position; see `moelab.plots.quality.kl_by_position`."""
        from ..plots.quality import kl_by_position

        return kl_by_position(self.of.tokens, ax=ax, **options)

    def quantiles(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draws the percentiles of KL; see `moelab.plots.quality.kl_quantiles`."""
        from ..plots.quality import kl_quantiles

        return kl_quantiles(self.of.tokens, ax=ax, **options)


def _span(row: pd.Series, name: str, ends: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    known = low == low and high == high
    span = f"{ends}: {low:.3g} to {high:.3g}" if known else "no interval: one document a domain"
    return f"{row[name]:.3g} ({span})"


def _budget(said: dict[str, Any]) -> str:
    budget = said["swap_budget"]
    return f"{max(said['top_k'])} (top-k)" if budget is None else str(budget)
