"""Recordings that were cut short: back to the last whole token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import SchemaError, StudyError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("run", "sequence", "step", "position")


def token_rows(routing: pd.DataFrame) -> np.ndarray:
    """Returns for each row of a recording's `routing` the number of its token, int64 (rows,).

    Rows are in the order in which they were recorded, a token's together, by layer and rank. A new
    token begins where a key changes, or where layer and rank do not go up.

    Raises:
        SchemaError: If a column lacks.
    """
    lacks = [name for name in (*KEYS, "layer", "rank") if name not in routing.columns]
    if lacks:
        raise SchemaError(
            f"The frame lacks the columns {', '.join(lacks)}; give a recording's routing."
        )
    if routing.empty:
        return np.zeros(0, np.int64)
    place = routing["layer"].to_numpy().astype(np.int64) << 32 | routing["rank"].to_numpy()
    begins = place[1:] <= place[:-1]
    for name in KEYS:
        values = routing[name].to_numpy()
        begins |= values[1:] != values[:-1]
    return np.concatenate([[0], np.cumsum(begins)])


def recover(
    routing: pd.DataFrame, layers: Sequence[int], top_k: Sequence[int] | None = None
) -> pd.DataFrame:
    """Leaves out tokens that a crash or an interrupt cut short, with a warning that counts them.

    A token is cut short if it reached only the first of the layers, or, as the very last one of
    the frame, fewer ranks of its last layer than any other token has there. (A family with
    identity experts leaves out the slots that go to them, so that fewer ranks alone say nothing.)

    Args:
        routing: A recording's `routing`, in its own order.
        layers: The MoE layers that a whole token reaches, ascending.
        top_k: Experts a token by layer; by default what the frame shows.

    Returns:
        The frame itself if all tokens are whole, else the rows of those that are.

    Raises:
        SchemaError: If columns lack.
        StudyError: If the frame has other layers, or no whole token.
    """
    token = token_rows(routing)
    if not len(token):
        raise StudyError("The recording has no rows.")
    order = {layer: place for place, layer in enumerate(layers)}
    given = routing["layer"].to_numpy()
    others = sorted(set(np.unique(given).tolist()) - set(order))
    if others:
        raise StudyError(f"The frame has the layers {others}, and the model has {list(layers)}.")
    place = np.array([order.get(layer, 0) for layer in range(max(layers) + 1)])[given]
    last = np.append(np.flatnonzero(np.diff(token)), len(token) - 1)
    reached = place[last] + 1
    if len(layers) > 1:
        cut = reached < len(layers)
    else:
        cut = np.zeros(len(reached), bool)
    ranks = np.bincount(token[place == len(layers) - 1], minlength=len(reached))
    if not cut[-1] and len(reached) > 1:
        whole = ranks[:-1][~cut[:-1]]
        least = int(whole.min(initial=np.iinfo(np.int64).max)) if len(whole) else 0
        if top_k is not None:
            least = min(least, int(top_k[-1]))
        cut[-1] = bool(len(whole)) and ranks[-1] < least
    elif not cut[-1] and top_k is not None:
        cut[-1] = ranks[-1] < top_k[-1]
    if not cut.any():
        return routing
    if cut.all():
        raise StudyError("The recording was cut short within its first token: nothing is left.")
    count = int(cut.sum())
    warnings.warn(
        f"{count} token{'s' if count > 1 else ''} of {len(cut):,} did not reach all layers, since "
        "the recording was cut short there, and are left out.",
        stacklevel=2,
    )
    return routing[~cut[token]].reset_index(drop=True)
