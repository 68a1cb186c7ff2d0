"""What `pin_transfer` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..display import facts_html, facts_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PinSet = dict[int, list[int]]
"""Pinned experts by layer."""


@dataclass(frozen=True, eq=False, repr=False)
class PinTransfer:
    """What pins learned on one domain do on another.

    Attributes:
        frame: A row a pair: `train` (domain that the pins were learned on; "all" for all domains
            together), `test` (domain judged on), `capacity`, `top` (pins a layer), `policy`,
            `documents`, `slots` (routed slots judged), `hit_rate`, `hit_rate_unpinned` (no pins,
            same capacity), `gain` (their difference; .01 is one hit point), `low`, `high`
            (simultaneous 95% interval over documents, all pairs together), `gain_random` (what
            pins drawn at random gain), `over_random`, `over_low`, `over_high` (gain less that,
            with its own simultaneous interval), `worse` (the interval of the gain is below 0).
        summary: A row a kind of pins, on all test texts: `pins` ("own domain", "other domains",
            "all domains", "random"), `gain`, `low`, `high` (simultaneous), `documents`.
        documents: A row a pair and test document: `train`, `test`, `document`, `slots`, `hits`,
            `hits_unpinned`, `hits_random` (mean over the drawn sets).
        pins: The pins by `train` and layer.
        settings: Texts, windows, drawn sets and seed.
    """

    frame: pd.DataFrame
    summary: pd.DataFrame
    documents: pd.DataFrame
    pins: Mapping[str, PinSet]
    settings: Mapping[str, Any]

    @property
    def warning(self) -> str | None:
        """Says which pins make hits fewer than no pins do; None where none is shown to."""
        worse = self.frame[self.frame["worse"]]
        if not len(worse):
            return None
        told = [
            f"{row.train} → {row.test} {100 * row.gain:+.1f} points "
            f"({100 * row.low:+.1f} to {100 * row.high:+.1f})"
            for row in worse.sort_values("gain").itertuples()
        ]
        more = f" and {len(told) - 6} more" if len(told) > 6 else ""
        return (
            f"Pins make hits fewer than no pins at the same capacity of "
            f"{self.frame['capacity'].iloc[0]}: {'; '.join(told[:6])}{more}."
        )

    @property
    def statement(self) -> str:
        """Whether pins help, in words, with the figures."""
        parts = [
            f"{row.pins} {100 * row.gain:+.1f} points "
            f"({100 * row.low:+.1f} to {100 * row.high:+.1f})"
            for row in self.summary.itertuples()
        ]
        first = self.frame.iloc[0]
        return (
            f"{first['top']} pins a layer at capacity {first['capacity']} under {first['policy']}, "
            f"hits of decoded tokens against no pins: {', '.join(parts)}."
        )

    def plot(self, **options: Any) -> Axes:
        """Draws the matrix of gains; see `moelab.plots.study.pin_transfer`."""
        from ..plots import study

        return study.pin_transfer(self.frame, **options)

    def _facts(self) -> dict[str, str]:
        first = self.frame.iloc[0]
        facts = {
            "pins": f"{first['top']} of {first['capacity']} slots a layer, {first['policy']}",
            "judged on": f"{self.documents['document'].nunique()} documents, "
            f"{self.documents['test'].nunique()} domains, decoded tokens",
        }
        for row in self.summary.itertuples():
            facts[str(row.pins)] = (
                f"{100 * row.gain:+.1f} hit points ({100 * row.low:+.1f} to {100 * row.high:+.1f})"
            )
        if self.warning is not None:
            facts["warning"] = self.warning
        return facts

    def __repr__(self) -> str:
        return facts_text("PinTransfer", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("PinTransfer", self._facts())
