"""The charts of what a miss costs, from means with intervals."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from moelab import plots


def summary() -> pd.DataFrame:
    rows = [
        (action, capacity, mean, mean - 0.005, mean + 0.005)
        for action, slope in (("low_bit", 0.001), ("drop", 0.02), ("wrong_slot", 0.1))
        for capacity in (48, 32)
        for mean in [slope * (64 - capacity) / 8]
    ]
    return pd.DataFrame(rows, columns=["action", "capacity", "mean", "low", "high"])


def test_charts() -> None:
    ax = plots.cost_by_capacity(summary(), experts=64)
    assert ax.get_yscale() == "log" and ax.xaxis_inverted()
    lines = {line.get_label(): line for line in ax.get_lines()}
    drop = lines["drop"]
    np.testing.assert_allclose(np.sort(drop.get_ydata()), np.exp([0.04, 0.08]))
    ax = plots.safe_capacities(summary())
    colours = {patch.get_facecolor() for patch in ax.patches}
    assert len(ax.patches) == 6 and len(colours) == 4
    shown = {text.get_text() for text in ax.texts}
    assert "×1.08" in shown and "×1.00" in shown
    plt.close("all")
