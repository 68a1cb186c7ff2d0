"""Whether pins help, and for whom."""

from __future__ import annotations

import warnings

from ..pin_transfer import pin_transfer
from .notes import Notes
from .plan import capacities
from .routing import recorded

PINS = "Do pins help, and for whom?"


def whether_pins_help(notes: Notes) -> None:
    """Learns pins on calibration texts and judges them on test texts of every domain."""
    import pandas as pd

    from ...plots import study as plots

    lab = notes.lab
    sizes = capacities(lab, notes.scale)
    # The recordings are made once; capacities and policies replay them.
    learned, judged = recorded(notes, "calibration"), recorded(notes, "test")
    frames, summaries = [], []
    for capacity in sizes[:2]:
        for policy in ("lru", "lfru"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the findings say it
                found = pin_transfer(lab, capacity, policy=policy, calibration=learned, test=judged)
            frames.append(found.frame)
            first = found.frame.iloc[0]
            keys = {"capacity": capacity, "top": first["top"], "policy": policy}
            summaries.append(found.summary.assign(**keys))
            notes.found(PINS, found.statement, "pins.csv", "pins-summary.csv")
            if capacity == sizes[0] and policy == "lru":
                notes.chart("pins", plots.pin_transfer(found.frame, note=notes.note))
                if found.warning:
                    notes.found(PINS, found.warning, "pins.csv", "pins.png")
            if policy == "lru":
                for row in found.summary.itertuples():
                    sign = 1 if row.pins in ("own domain", "all domains") else -1
                    ends = sorted((sign * row.low, sign * row.high))
                    notes.lesson(
                        f"pins-{row.pins}-{capacity}",
                        f"pins of {_called(str(row.pins))} {'help' if sign > 0 else 'harm'}, at "
                        f"{capacity}",
                        {"mean": sign * row.gain, "low": ends[0], "high": ends[1]},
                        "share of the routed slots",
                    )  # fmt: skip
    notes.frame("pins", pd.concat(frames, ignore_index=True))
    notes.frame("pins-summary", pd.concat(summaries, ignore_index=True))


def _called(kind: str) -> str:
    return {
        "own domain": "the text's own domain", "other domains": "another domain",
        "all domains": "all domains together", "random": "no meaning, drawn at random,",
    }.get(kind, kind)  # fmt: skip
