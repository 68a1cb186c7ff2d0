"""The page cache under a calibration: filled beforehand, and what a load takes without it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..lab import Lab

COLD_LAYERS = 4
HELD = 0.95
"""From this share in memory on, files count as warm."""


def _pieces(lab: Lab, layer: Any, experts: Sequence[int]) -> list[Any]:
    from ..check.pagecache import Piece

    return [
        Piece(path, offset, tensor.disk_bytes)
        for tensor in layer.loader.tensors
        for path, offset in map(tensor.place, experts)
    ]


def warm(lab: Lab, limit: float) -> float | None:
    """Reads the experts' files unless they are in memory, for so long; says how much is."""
    from ..check.pagecache import cached_share

    def held() -> float | None:
        layers = lab.attachment.bank.layers
        return cached_share(p for la in layers for p in _pieces(lab, la, range(la.experts)))

    share = held()
    if share is not None and share >= HELD:
        return share
    end = time.perf_counter() + limit
    for path in lab.shards:
        with path.open("rb") as file:
            while time.perf_counter() < end and file.read(1 << 24):
                pass
    return held()


def cold_load(lab: Lab) -> float | None:
    """How much longer a load takes from the disk than from memory; None if that is not to be had.

    The median over events of top-k experts, first with their pages dropped, then once more.
    """
    from ..check.pagecache import cached_share, drop
    from ..experts.residency import Load

    random = np.random.default_rng(0)
    more = []
    try:
        lab.attachment.bank.finish()
        for layer in lab.attachment.bank.layers[:: max(1, len(lab.sites) // COLD_LAYERS)]:
            top_k = layer.site.top_k
            for _ in range(2):
                chosen = random.permutation(layer.experts)[:top_k].tolist()
                loads = [Load(expert, slot, None) for slot, expert in enumerate(chosen)]
                pieces = _pieces(lab, layer, chosen)
                drop(pieces)
                share = cached_share(pieces)
                if share is None or share > 0.1:
                    return None
                times = []
                for _ in range(2):
                    begin = time.perf_counter()
                    layer.loader.read(loads)
                    times.append(time.perf_counter() - begin)
                more.append((times[0] - times[1]) / top_k)
    finally:
        lab.reset()
    return max(0.0, float(np.median(more))) if more else None
