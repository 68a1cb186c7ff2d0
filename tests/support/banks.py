"""Labs with another policy, pins and initial contents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import moelab
from moelab.lab import Lab


def lab_with(
    path: str | Path,
    capacity: int | float,
    policy: Any,
    pins: Mapping[int, Iterable[int]] | None = None,
    first: Iterable[int] = (),
) -> Lab:
    """Loads a model whose bank has this policy, these pins and these initial contents."""
    lab = moelab.load(path, capacity, policy=policy, pins=pins)
    top_k = {site.layer: site.top_k for site in lab.sites}
    for layer in lab.attachment.bank.layers:
        layer.clear()
        layer.load(layer.residency.fill(first, top_k[layer.layer]))
    return lab
