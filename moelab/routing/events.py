"""From a routing frame to the events that a bank saw. Pure numpy and pandas."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ReplayError

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("run", "step", "layer", "rank", "expert")
"""Columns without which nothing can be replayed."""

LOSSLESS = {"hit", "load"}
"""What a recording's `outcome` says where every chosen expert was computed."""


@dataclass(frozen=True, slots=True)
class LayerEvents:
    """The events of one layer, in order of time.

    Pairs are (event, distinct expert), by event and then by expert, ascending.
    """

    layer: int
    top_k: int
    step: np.ndarray
    """int64 (events,): the step of each event, as its place in the order of all steps."""
    start: np.ndarray
    """int64 (events + 1,): first pair of each event, and the number of pairs."""
    expert: np.ndarray
    """int64 (pairs,)."""
    rows: np.ndarray
    """int64 (rows,): the frame's rows of this layer, by position."""
    pair: np.ndarray
    """int64 (rows,): the pair of each of them."""

    def needed(self) -> list[list[int]]:
        """Returns the distinct experts of each event, ascending."""
        flat = self.expert.tolist()
        return [flat[a:b] for a, b in itertools.pairwise(self.start.tolist())]


def check_frame(routing: pd.DataFrame) -> None:
    """Refuses what cannot be replayed.

    Raises:
        ReplayError: If columns are missing, there is no row, or the recording is of a lossy run.
    """
    import pandas as pd

    if not isinstance(routing, pd.DataFrame):
        raise ReplayError(
            f"A replay needs a routing frame such as rec.routing, got {type(routing).__name__}."
        )
    lacks = [name for name in NEEDED if name not in routing.columns]
    if lacks:
        raise ReplayError(
            f"The frame lacks the columns {', '.join(lacks)}; a replay needs {', '.join(NEEDED)}, "
            "as in rec.routing."
        )
    if routing.empty:
        raise ReplayError("The frame has no rows, so there is nothing to replay.")
    if "outcome" in routing.columns:
        lossy = sorted(set(routing["outcome"].dropna().unique()) - LOSSLESS)
        if lossy:
            raise ReplayError(
                "This recording cannot be replayed: it was made with a lossy miss action "
                f"({', '.join(map(str, lossy))}), and after a miss that was not loaded the model "
                "went on from other activations, so that with other residents it would have chosen "
                "other experts. Record with on_miss='load'."
            )
    for name in ("step", "expert"):
        if int(routing[name].min()) < 0:
            raise ReplayError(f"The frame has numbers under 0 in its column {name}.")


def steps_of(routing: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """Finds the steps of all runs and their order in time.

    A recording's rows are in order of time, also where two runs alternate. Where a run's steps
    are not in order (somebody sorted the frame), runs follow each other in the order of their
    first row.

    Returns:
        For each row its step's place in that order, int64 (rows,); and the steps, a row each:
        run, step.
    """
    import pandas as pd

    runs, run_ids = pd.factorize(routing["run"])
    numbers = routing["step"].to_numpy().astype(np.int64)
    width = int(numbers.max()) + 1
    codes, keys = pd.factorize(runs.astype(np.int64) * width + numbers)  # in order of first rows
    steps = pd.DataFrame({"run": np.asarray(run_ids)[keys // width], "step": keys % width})
    if not steps.groupby("run", sort=False)["step"].is_monotonic_increasing.all():
        order = np.argsort(keys)  # by the run's first row, then by step
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        codes, steps = place[codes], steps.iloc[order].reset_index(drop=True)
    return codes.astype(np.int64), steps


def layer_events(routing: pd.DataFrame, step: np.ndarray) -> list[LayerEvents]:
    """Splits a frame into the events of each layer.

    Args:
        routing: The frame.
        step: For each row its step's place in time; see `steps_of`.

    Returns:
        The layers, ascending.
    """
    layers = routing["layer"].to_numpy()
    experts = routing["expert"].to_numpy().astype(np.int64)
    ranks = routing["rank"].to_numpy()
    width = int(experts.max()) + 1
    found = []
    for layer in np.unique(layers):
        rows = np.flatnonzero(layers == layer)
        keys, pair = np.unique(step[rows] * width + experts[rows], return_inverse=True)
        steps, first = np.unique(keys // width, return_index=True)
        found.append(
            LayerEvents(
                int(layer),
                int(ranks[rows].max()) + 1,
                steps,
                np.append(first, len(keys)),
                keys % width,
                rows,
                pair,
            )
        )
    return found
