"""How well a profile says which experts texts really use.

`python -m tests.support.prediction 5` prints the table for the first five test texts of each
domain, on the shipped model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import moelab
from moelab import labmodel
from moelab.experts.profile import Profile
from moelab.lab import Lab

SHIPPED = Path(__file__).parent.parent.parent / "profiles" / "lab.json"


def recall(real: Profile, other: Profile, layer: int, capacity: int) -> float:
    """Share of the slots really routed that go to the other's `capacity` most used experts."""
    counts = real.counts(layer)
    assert counts is not None
    return float(counts[other.order(layer)[:capacity]].sum() / counts.sum())


def recalls(
    lab: Lab, texts: Sequence[Mapping[str, Any]], capacities: Sequence[int], known: Profile
) -> pd.DataFrame:
    """Recalls by capacity and layer, each text against what is expected of that text.

    Returns:
        `chance` (C/E); means over texts: `discover` (a router-only pass over the text itself),
        `known` (the given profile), `oracle` (the text's own real use: the most that is possible).
    """
    rows = []
    for text in texts:
        real = moelab.profile(lab, [text], progress=False)
        predicted = moelab.discover(lab, [text], progress=False)
        for layer, experts in real.experts.items():
            for capacity in capacities:
                rows.append(
                    {
                        "C": capacity, "layer": layer, "chance": capacity / experts,
                        "discover": recall(real, predicted, layer, capacity),
                        "known": recall(real, known, layer, capacity),
                        "oracle": recall(real, real, layer, capacity),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows).groupby(["C", "layer"]).mean()


def held_out(number: int) -> list[Any]:
    """The first held-out texts of each domain."""
    return [t for domain in labmodel.DOMAINS for t in labmodel.texts(domain, "test")[:number]]


def main(number: int) -> None:
    """Prints the table."""
    with moelab.load("lab", 0.5) as lab:
        table = recalls(lab, held_out(number), (8, 16, 32), moelab.read_profile(SHIPPED))
    mean = table.groupby("C").agg(np.mean)
    sys.stdout.write(f"{table.round(3).to_string()}\n\nmean over layers\n{mean.round(3)}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
