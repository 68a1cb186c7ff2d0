"""The frame of the curves: rows of a layer, of all layers together, and the shares in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .counts import Counted
from .streams import EVENT_PHASES, LayerStream

if TYPE_CHECKING:
    import pandas as pd

ALL_LAYERS = -1
"""What `layer` says in the rows that sum over layers."""

SUMS = (
    "slots", "misses", "compulsory", "needed", "loads", "compulsory_loads", "mass", "missed_mass",
)  # fmt: skip
COLUMNS = (
    "run", "layer", "phase", "policy", "capacity", "experts", "swept", "slots", "misses",
    "miss_ratio", "compulsory", "needed", "loads", "load_ratio", "compulsory_loads", "mass_ratio",
    "chance",
)  # fmt: skip


def layer_rows(
    stream: LayerStream,
    sizes: np.ndarray,
    names: np.ndarray,
    found: Mapping[str, Counted],
    always: np.ndarray,
    largest: int,
) -> pd.DataFrame:
    """Makes the rows of one layer, for each run (`names`), policy and capacity.

    Args:
        stream: The layer.
        sizes: int (capacities,): slots, with the pins.
        names: int (groups,): the runs.
        found: What each policy missed of the experts that are not pinned.
        always: (3, groups): what the pinned experts served.
        largest: Experts that the largest event needs, with the pins.
    """
    import pandas as pd

    parts = []
    for policy, counted in found.items():
        total = counted.total + always
        here = np.flatnonzero(total[1] > 0)
        count = len(sizes)

        def each(values: np.ndarray, here: np.ndarray = here, count: int = count) -> np.ndarray:
            return np.repeat(values[here], count)

        parts.append(
            pd.DataFrame(
                {
                    "run": each(names),
                    "layer": stream.layer,
                    "policy": policy,
                    "capacity": np.tile(sizes, len(here)),
                    "experts": stream.experts,
                    "swept": np.tile(sizes < largest, len(here)),
                    "slots": each(total[1]),
                    "misses": counted.missed[1][here].ravel(),
                    "compulsory": each(counted.first[1]),
                    "needed": each(total[0]),
                    "loads": counted.missed[0][here].ravel(),
                    "compulsory_loads": each(counted.first[0]),
                    "mass": each(total[2]),
                    "missed_mass": counted.missed[2][here].ravel(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def overall_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Sums over layers at capacities that all have; a layer with fewer experts holds them all."""
    import pandas as pd

    own = frame.groupby("layer")["capacity"].agg(["min", "max"])
    sizes = frame["capacity"].unique()
    parts = [frame]
    for layer, highest in own["max"].items():
        full = frame[(frame["layer"] == layer) & (frame["capacity"] == highest)]
        if highest == full["experts"].iloc[0]:
            parts += [full.assign(capacity=size) for size in sizes if size > highest]
    whole = pd.concat(parts)
    layers = whole.groupby("capacity")["layer"].nunique()
    whole = whole[whole["capacity"].isin(layers.index[layers == len(own)])]
    sums = {"experts": "max", "swept": "any", **dict.fromkeys(SUMS, "sum")}
    summed = whole.groupby(["run", "policy", "capacity"], sort=False).agg(sums).reset_index()
    return summed.assign(layer=ALL_LAYERS)


def finished_rows(
    frame: pd.DataFrame, policies: Sequence[str], by_run: bool, phase: str
) -> pd.DataFrame:
    """Makes shares of the sums, and puts the columns in order."""
    import pandas as pd

    frame["phase"] = pd.Categorical([phase] * len(frame), categories=EVENT_PHASES[1:])
    frame["policy"] = pd.Categorical(frame["policy"], categories=policies)
    frame["miss_ratio"] = frame["misses"] / frame["slots"]
    frame["load_ratio"] = frame["loads"] / frame["needed"]
    frame["mass_ratio"] = frame["missed_mass"] / frame["mass"]
    frame["chance"] = 1 - frame["capacity"] / frame["experts"]
    narrow = {name: "int64" for name in SUMS if not name.endswith("mass")}
    narrow |= {"run": "int32", "layer": "int16", "capacity": "int32", "experts": "int32"}
    frame = frame.astype(narrow)[list(COLUMNS)]
    frame.attrs["experts"] = int(frame["experts"].max())
    return frame if by_run else frame.drop(columns="run")
