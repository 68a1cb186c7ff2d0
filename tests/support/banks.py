"""Labs with another policy, pins and initial contents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import moelab
from moelab.experts.policies import make_policy
from moelab.experts.residency import Residency
from moelab.lab import Lab


def lab_with(
    path: str | Path,
    capacity: int | float,
    policy: Any,
    pins: Mapping[int, Iterable[int]] | None = None,
    first: Iterable[int] = (),
) -> Lab:
    """Loads a model whose bank has this policy, these pins and these initial contents."""
    lab = moelab.load(path, capacity)
    maker = make_policy(policy)
    top_k = {site.layer: site.top_k for site in lab.sites}
    for layer in lab.attachment.bank.layers:
        fixed = frozenset((pins or {}).get(layer.layer, ()))
        layer.residency = Residency(layer.capacity, maker(), fixed)
        layer.load(layer.residency.fill(first, top_k[layer.layer]))
    return lab
