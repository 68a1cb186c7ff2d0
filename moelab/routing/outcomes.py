"""What became of each routed slot under a lossy miss action: which expert ran, at what factor."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..experts.event import LayerEvent
from .columns import OUTCOMES

HIT, DROP = OUTCOMES.index("hit"), OUTCOMES.index("drop")


class Outcome(NamedTuple):
    """By token and place in the router's answer, (tokens, top-k)."""

    computed: np.ndarray
    """int32: the expert whose output was used; -1 where none was."""
    applied: np.ndarray
    """float32: the factor of that output; 0 where none was used, NaN where it is not known."""
    outcome: np.ndarray
    """uint8: codes into `columns.OUTCOMES`."""


def outcome_of(event: LayerEvent, ids: np.ndarray, weights: np.ndarray, experts: int) -> Outcome:
    """Says what became of a layer's routed slots.

    Args:
        event: The layer's step.
        ids: What the router chose by itself, (tokens, top-k).
        weights: float32, the gate weights of `ids`.
        experts: Experts of the layer.
    """
    detail = event.lossy
    if detail is None:
        codes = np.zeros(ids.shape, np.uint8)
        return Outcome(ids.astype(np.int32), weights.astype(np.float32), codes)
    theirs = np.array(detail.ids, copy=False).reshape(ids.shape)
    # Ids past the experts, which need no memory, are never missing.
    missing = np.zeros(max(experts, int(ids.max()) + 1, int(theirs.max()) + 1), np.bool_)
    missing[list(event.missing or ())] = True
    applied = np.full(ids.shape, np.nan, np.float32)
    if detail.applied is not None:
        applied = np.array(detail.applied.astype(mx.float32)).reshape(ids.shape)
    missed = missing[ids]
    codes = np.where(missed, OUTCOMES.index(detail.action), HIT).astype(np.uint8)
    if detail.action == "drop":
        return Outcome(np.where(missed, -1, ids), np.where(missed, 0, applied), codes)
    if detail.action == "wrong_slot":
        return Outcome(np.where(missed, detail.first, ids), applied, codes)
    if detail.action == "low_bit":
        return Outcome(ids.astype(np.int32), applied, codes)
    return _reselected(event, ids, theirs, applied, missing)


def _reselected(
    event: LayerEvent,
    ids: np.ndarray,
    theirs: np.ndarray,
    applied: np.ndarray,
    missing: np.ndarray,
) -> Outcome:
    """Pairs, by rank, the experts that gave way with those that came in their place."""
    detail = event.lossy
    assert detail is not None and detail.scores is not None
    before, after = (np.array(s.astype(mx.float32)).reshape(ids.shape) for s in detail.scores)
    place = ids[:, :, None] == theirs[:, None, :]
    stays = place.any(-1)
    here = ~missing[ids]
    # A substitute that was not to be had leaves any other non-resident in the selection.
    gives_way = ~(stays & here) if detail.action == "substitute" else ~stays
    comes = ~missing[theirs] & ~place.any(1)
    computed = np.where(stays & here, ids, -1).astype(np.int32)
    factor = np.where(stays & here, np.take_along_axis(applied, place.argmax(-1), -1), 0)
    codes = np.where(stays & here, HIT, DROP).astype(np.uint8)
    leaving = np.argsort(np.where(gives_way, -before, np.inf), axis=-1, kind="stable")
    coming = np.argsort(np.where(comes, -after, np.inf), axis=-1, kind="stable")
    pairs = np.minimum(gives_way.sum(-1), comes.sum(-1))
    token, rank = np.nonzero(np.arange(ids.shape[-1]) < pairs[:, None])
    to, by = leaving[token, rank], coming[token, rank]
    computed[token, to] = theirs[token, by]
    factor[token, to] = applied[token, by]
    codes[token, to] = OUTCOMES.index(detail.action)
    return Outcome(computed, factor.astype(np.float32), codes)
