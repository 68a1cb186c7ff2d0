"""Routing frames made up for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd


def from_events(
    layers: Mapping[int, Sequence[Sequence[int]]],
    top_k: int = 1,
    runs: Iterable[int] | None = None,
) -> pd.DataFrame:
    """A frame in which step i needs `layers[layer][i]` at each layer.

    A token has `top_k` slots; the last of an event repeats experts where they do not add up.

    Args:
        layers: Experts of each step, by layer.
        top_k: Slots a token.
        runs: The run of each step; steps are counted within it. One run by default.
    """
    count = len(next(iter(layers.values())))
    of = list(runs) if runs is not None else [0] * count
    rows = []
    for i in range(count):
        step = of[:i].count(of[i])
        tokens = max(-(-len(events[i]) // top_k) for events in layers.values())
        for token in range(tokens):
            for layer, events in layers.items():
                for rank in range(top_k):
                    expert = events[i][(token * top_k + rank) % len(events[i])]
                    rows.append((of[i], 0, step, token, layer, rank, expert, 1.0 / (rank + 1)))
    columns = ["run", "sequence", "step", "position", "layer", "rank", "expert", "weight"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(
        {name: "int16" if name in ("layer", "rank") else "int32" for name in columns[:-1]}
        | {"weight": "float32"}
    ).assign(hit=False, phase="decode")


def uniform(experts: int, top_k: int, tokens: int, seed: int = 0) -> pd.DataFrame:
    """One layer, a token a step, each token's experts drawn without regard to any other's."""
    rng = np.random.default_rng(seed)
    scores = rng.random((tokens, experts), dtype=np.float32)
    chosen = np.argpartition(scores, top_k - 1, axis=1)[:, :top_k].astype(np.int32)
    return pd.DataFrame(
        {
            "run": np.zeros(tokens * top_k, np.int32),
            "step": np.repeat(np.arange(tokens, dtype=np.int32), top_k),
            "layer": np.zeros(tokens * top_k, np.int16),
            "rank": np.tile(np.arange(top_k, dtype=np.int16), tokens),
            "expert": chosen.ravel(),
        }
    )
